// The page of a folder of runs: lists them, and overlays the curves of those that are chosen.
//
// The choice is in the address after the #, so that it can be bookmarked and sent to others.

import { byId, el, heads, setText, update } from "./dom.js";
import { Overlay } from "./overlay.js";
import { hasBokeh } from "./plot.js";
import { UNKNOWN, bytes, clock, count, duration, number, percent } from "./wording.js";

const MOST_CHOSEN = 6; // as many colours can be told apart
const POLL_MS = 4000;
const WINDOWS = [1, 2, 5, 10, 20, 50, 100, 200, 500];
const TONES = { running: "busy", finished: "good", failed: "bad", stopped: "warn", interrupted: "warn" };
const COLUMNS = ["Run", "State", "Steps", "Loss", "Evaluation loss", "Exact match", "Started", "Time", "Size"];

const overlay = new Overlay(byId("charts"));
const curves = new Map(); // address -> the history of a chosen run
let runs = [];
let chosen = null; // addresses; null until the list is there

async function get(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  byId("locked").hidden = response.status !== 401;
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response.json();
}

/** Ask again and again; a list that fails is asked for at the next turn. */
async function poll() {
  try {
    const listed = await get("runs");
    runs = listed.runs;
    setText(byId("folder"), listed.folder);
    setText(byId("tensorboard"), listed.tensorboard);
    chosen ??= fromAddress() ?? runs.filter(({ step }) => step > 0).slice(0, 3).map(addressOf);
    chosen = chosen.filter((address) => runs.some((run) => run.address === address));
    showConnection("live", "Live");
    await fetchChosen();
  } catch {
    showConnection("reconnecting", "Reconnecting…");
  }
  show();
  setTimeout(poll, POLL_MS);
}

/** Fetch the curves of the chosen runs: of one that is going on each time, of others once. */
async function fetchChosen() {
  for (const run of runs.filter(({ address }) => chosen.includes(address))) {
    if (curves.has(run.address) && curves.get(run.address).state === "over") continue;
    const history = await get(`${run.path}history?max_points=1000`);
    curves.set(run.address, { state: run.state === "running" ? "going on" : "over", history });
  }
  const named = chosen.map((address) => `run=${encodeURIComponent(address)}`).join("&");
  showDifferences(chosen.length > 1 ? await get(`differences?${named}`) : { keys: {}, notes: [] });
}

function show() {
  const focused = document.activeElement?.ariaLabel;
  update(byId("runs"), [runs, chosen], () => [
    heads(COLUMNS),
    el("tbody", {}, ...runs.map(row)),
  ]);
  if (focused) document.querySelector(`#runs [aria-label="${CSS.escape(focused)}"]`)?.focus();
  overlay.set((chosen ?? []).map(curveOf).filter(Boolean));
}

function curveOf(address, at) {
  const run = runs.find((one) => one.address === address);
  const known = curves.get(address);
  return run && known ? { name: run.name, ink: `run${at}`, history: known.history } : null;
}

function row(run) {
  const at = (chosen ?? []).indexOf(run.address);
  const box = el("input", { type: "checkbox", checked: at >= 0, "aria-label": `Compare ${run.name}` });
  box.addEventListener("change", () => choose(run.address, box.checked));
  const key = at >= 0 ? el("i", { class: `key ink-run${at}` }) : null;
  const code = run.state === "failed" && run.exit_code ? ` (${run.exit_code})` : "";
  const cells = [
    el("span", { class: "pill", "data-tone": TONES[run.state] }, run.state + code),
    run.total_steps ? `${count(run.step)} of ${count(run.total_steps)}` : count(run.step),
    change(run.first_loss, run.last_loss, number),
    change(run.eval_loss_before, run.eval_loss, number),
    change(run.exact_match_before, run.exact_match, percent),
    clock(run.started_time, false),
    duration(run.seconds),
    bytes(run.bytes),
  ];
  const link = el("a", { href: run.path, title: run.name }, run.name);
  return el("tr", {}, el("th", { scope: "row" }, box, key, link), ...cells.map((cell) => el("td", {}, cell)));
}

const change = (before, after, words) =>
  [before, after].filter((value) => value !== null).map((value) => words(value)).join(" → ") || UNKNOWN;

function showDifferences({ keys, notes }) {
  const names = chosen.map((address) => runs.find((run) => run.address === address).name);
  byId("differences").closest("section").hidden = chosen.length < 2;
  update(byId("notes"), notes, () => notes.map((note) => el("li", {}, note)));
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const lines = Object.entries(keys).map(([key, values]) =>
    el("tr", {}, el("th", { scope: "row" }, key), ...values.map((value) => el("td", {}, text(value)))),
  );
  update(byId("differences"), [names, keys], () => [
    heads(["Key", ...names]),
    el("tbody", {}, ...(lines.length ? lines : [el("tr", {}, el("td", {}, "none"))])),
  ]);
}

// --- user settings --------------------------------------------------------------------------------

async function choose(address, isOn) {
  chosen = isOn ? [...chosen, address].slice(-MOST_CHOSEN) : chosen.filter((one) => one !== address);
  history.replaceState(null, "", `#${chosen.map(encodeURIComponent).join("&")}`);
  show();
  try {
    await fetchChosen();
  } catch {
    // the next turn fetches them
  }
  show();
}

function fromAddress() {
  const text = location.hash.slice(1);
  return text ? text.split("&").map(decodeURIComponent).slice(0, MOST_CHOSEN) : null;
}

const addressOf = ({ address }) => address;

function showConnection(state, text) {
  byId("connection").dataset.state = state;
  setText(byId("connection"), text);
}

byId("smoothing").max = WINDOWS.length - 1;
byId("smoothing").addEventListener("input", (event) => {
  const window = WINDOWS[event.target.value];
  setText(byId("smoothing-value"), window === 1 ? "off" : `${count(window)} steps`);
  overlay.view({ window });
});
byId("log-scale").addEventListener("change", (event) => overlay.view({ isLog: event.target.checked }));
byId("no-charts").hidden = hasBokeh();
document.addEventListener("themechange", () => overlay.redraw());
poll();
