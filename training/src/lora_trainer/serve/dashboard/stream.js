// The connection to /events: opens it, notices when it dies, opens it again.
//
// Browsers give up on a server-sent stream after an HTTP error and do not notice one that
// goes silent, so retries are implemented here. After each opening the page fetches the whole
// state again; nothing depends on the events missed in between.

const KINDS = [
  "run_started", "phase", "plan", "progress", "step", "eval", "generated", "sample",
  "checkpoint", "resumed", "warning", "memory", "restart", "ranks", "failed", "finished", "stopped",
  "ended", "tick", "log", "reset",
];
const SILENCE_MS = 15_000; // the server ticks every second
const DELAYS_MS = [500, 1000, 2000, 4000, 8000, 15_000];

export class Stream {
  /** `onEvent(kind, data)` receives every event, `onState` "live" or "reconnecting". */
  constructor(url, onEvent, onState) {
    this.url = url;
    this.onEvent = onEvent;
    this.onState = onState;
    this.failures = 0;
    this.source = null;
    this.retry = null;
    this.heard = Date.now();
    setInterval(() => this.#checkSilence(), 1000);
    window.addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#retryNow();
    });
  }

  open() {
    this.#close();
    this.heard = Date.now();
    const source = new EventSource(this.url);
    this.source = source;
    source.onopen = () => {
      this.failures = 0;
      this.heard = Date.now();
      this.onState("live");
    };
    source.onerror = () => this.#fail();
    for (const kind of KINDS) {
      source.addEventListener(kind, (message) => {
        this.heard = Date.now();
        this.onEvent(kind, parsed(message.data));
      });
    }
  }

  #fail() {
    this.#close();
    const delay = DELAYS_MS[Math.min(this.failures, DELAYS_MS.length - 1)];
    this.failures += 1;
    this.onState("reconnecting");
    // Pages that lost the same server do not all reconnect at the same instant.
    this.retry = setTimeout(() => this.open(), delay * (0.75 + Math.random() / 2));
  }

  #retryNow() {
    if (this.retry !== null) this.open();
  }

  #checkSilence() {
    if (this.source !== null && Date.now() - this.heard > SILENCE_MS) this.#fail();
  }

  #close() {
    clearTimeout(this.retry);
    this.retry = null;
    this.source?.close();
    this.source = null;
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
