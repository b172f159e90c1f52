// Light, dark, or the system's setting. Loaded before the page is drawn, to avoid a flash.
(() => {
  const KEY = "lora-trainer-theme";
  const CHOICES = ["auto", "light", "dark"];

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is disabled: the setting lasts as long as the page
    }
  }

  function apply(choice) {
    document.documentElement.dataset.theme = choice;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${choice}`;
    document.dispatchEvent(new Event("themechange"));
  }

  function next() {
    const now = CHOICES.indexOf(document.documentElement.dataset.theme);
    const choice = CHOICES[(now + 1) % CHOICES.length];
    try {
      localStorage.setItem(KEY, choice);
    } catch {
      // as above
    }
    apply(choice);
  }

  const first = remembered();
  const choice = CHOICES.includes(first) ? first : "auto";
  apply(choice);
  document.addEventListener("DOMContentLoaded", () => {
    apply(choice);
    document.getElementById("theme").addEventListener("click", next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    document.dispatchEvent(new Event("themechange"));
  });
})();
