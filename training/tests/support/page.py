"""The dashboard in a headless Chromium: opens it, waits for what it shows, reads its console."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

SECONDS = 30.0
# Chromium breaks off what it loads when an interface comes or goes, as containers' do.
NETWORK_CHANGED = "net::ERR_NETWORK_CHANGED"
BROWSER, DRIVER = "chromium", "chromedriver"
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
PHONE, TABLET, DESKTOP = (360, 740), (820, 1180), (1440, 900)
# Counts, in all canvases of a chart, the pixels that have the colour of a line.
INKED = """
const [chart, ink] = arguments;
const probe = document.createElement("span");
probe.className = `ink-${ink}`;
document.body.append(probe);
const wanted = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
probe.remove();
const canvases = [];
const visit = (node) => {
  if (node.tagName === "CANVAS") canvases.push(node);
  for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) visit(child);
};
const figure = document.getElementById(`chart-${chart}`);
if (figure.hidden) return 0;
visit(figure);
let count = 0;
for (const canvas of canvases.filter(({ width, height }) => width && height)) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.length; at += 4) {
    if (data[at + 3] > 200 && wanted.every((part, i) => Math.abs(data[at + i] - part) < 6)) count++;
  }
}
return count;
"""


class Page:
    """One browser window, used by one test after the other."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which(BROWSER) or BROWSER
        for flag in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # A driver that is named is not looked for, and not downloaded.
        service = Service(shutil.which(DRIVER) or DRIVER)
        self._said: list[str] = []  # by the console, not yet asked for
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(SECONDS)

    def open(
        self, url: str, size: tuple[int, int] = DESKTOP, *, scheme: str = "light", motion: str = ""
    ) -> None:
        """Open an address, in a window of that size, for a reader with these preferences."""
        self.resize(size)
        self.prefer(scheme, motion)
        for _ in range(3):
            self.driver.get("about:blank")  # the page before may still ask for a server long gone
            self.errors()
            self.driver.get(url)
            if not any(NETWORK_CHANGED in line for line in self._console()):
                break

    def prefer(self, scheme: str, motion: str = "") -> None:
        """Take on a reader's preferences: light or dark, reduced motion."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, size: tuple[int, int]) -> None:
        """Give the window another size; a narrow one is a phone's."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        metrics["mobile"] = size[0] < 600
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """Return the text of all elements that a selector finds."""
        texts = "[...document.querySelectorAll(arguments[0])].map((n) => n.textContent).join(' ')"
        return self.js(f"return {texts}", selector)

    def is_shown(self, selector: str) -> bool:
        """Return whether an element takes room on the page."""
        return self.js(
            "return Boolean(document.querySelector(arguments[0])?.offsetParent)", selector
        )

    def inked(self, chart: str, ink: str = "line") -> int:
        """Return how many pixels of a chart have the colour of its line."""
        return self.js(INKED, chart, ink)

    def summary(self, chart: str) -> str:
        """Return what a screen reader says of a chart; empty until it is drawn."""
        return self.js(
            "return document.querySelector(arguments[0])?.ariaLabel ?? ''", f"#chart-{chart} .plot"
        )

    def press(self, key: str) -> None:
        """Press a key, wherever the focus is."""
        ActionChains(self.driver).send_keys(getattr(Keys, key.upper())).perform()

    def wait_for(self, what: str, is_it: Callable[[], Any]) -> Any:
        """Wait until something is so; return it."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            if value := is_it():
                return value
            time.sleep(0.05)
        raise AssertionError(f"{what}: not seen; the console says {self.errors()}")

    def wait_for_text(self, selector: str, wanted: str) -> None:
        """Wait until an element has a text."""
        self.wait_for(f"{wanted!r} in {selector}", lambda: wanted in self.text(selector))

    def errors(self) -> list[str]:
        """Return what went wrong since the last call: faults, refusals, failed requests."""
        self._console()
        lines, self._said = self._said, []
        return [message for message in lines if NETWORK_CHANGED not in message]

    def _console(self) -> list[str]:
        new = [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING") and entry["source"] != "rendering"
        ]
        self._said += new
        return new

    def shoot(self, name: str, scheme: str) -> None:
        """Take a picture of the whole page, if a folder for pictures is given."""
        folder = os.environ.get("LORA_SCREENSHOTS")
        if folder is None:
            return
        self.prefer(scheme)
        width, height = self.js("return [innerWidth, innerHeight]")
        full = self.js("return document.documentElement.scrollHeight")
        self.resize((width, min(full, 5000)))
        time.sleep(2)  # charts that were out of sight are drawn
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(Path(folder, f"{name}.png")))
        self.resize((width, height))

    def quit(self) -> None:
        """End the browser."""
        self.driver.quit()
