// The live page: fetches the state, follows the events, and shows both.
//
// Only the server folds events into a status. Steps and ticks are shown as they arrive, and after
// any other event the status is fetched again; a new connection fetches everything again.

import { byId, setText } from "./dom.js";
import { showOverview } from "./overview.js";
import { Panels } from "./panels.js";
import { hasBokeh } from "./plot.js";
import { Log, showMachine, showRanks, showRecords } from "./records.js";
import { MAX_POINTS, Series } from "./series.js";
import { Stream } from "./stream.js";
import { count } from "./wording.js";

const WINDOWS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];
const AGAIN_MS = 400; // between two fetches of the same thing
const BEGINNINGS = new Set(["run_started", "restart", "resumed", "reset"]);

const run = {
  status: null, health: null, metrics: null, host: null, gpus: null, latest: null,
  connection: "connecting", fetched: 0, ticked: 0, // both in seconds since the epoch
};
const series = new Series();
const panels = new Panels(byId("charts"), byId("machine-charts"), series);
const log = new Log(byId("log"));

async function get(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  byId("locked").hidden = response.status !== 401;
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response.json();
}

/** Make a function that fetches when called, never twice at once, and once more if called then. */
function fetching(path, take) {
  let isBusy = false;
  let isWanted = false;
  const start = async () => {
    isWanted = true;
    if (isBusy) return;
    isBusy = true;
    while (isWanted) {
      isWanted = false;
      try {
        take(await get(path));
      } catch {
        // the stream notices a lost server, and fetches again when it is back
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
    isBusy = false;
  };
  return start;
}

const fetchStatus = fetching("status", (status) => {
  const isNewRun = run.status && run.status.config_digest !== status.config_digest;
  if (isNewRun) run.latest = null;
  run.status = status;
  run.fetched = Date.now() / 1000;
  run.health = status.health ?? run.health;
  takeMachine(status);
  showRecords(status);
  chooseWindow(status.total_steps);
  draw();
});

const fetchHistory = fetching(`history?max_points=${MAX_POINTS}`, (history) => {
  series.replace(history);
  panels.schedule();
});

const fetchLog = fetching("log?lines=200", ({ lines }) => log.replace(lines ?? []));

function fetchAll() {
  fetchStatus();
  fetchHistory();
  fetchLog();
}

function takeMachine({ host, gpus }) {
  run.host = host ?? run.host;
  run.gpus = gpus ?? run.gpus;
  showMachine(run.host, run.gpus);
}

let isDrawing = false;

/** Show the top of the page with the next frame. */
function draw() {
  if (isDrawing) return;
  isDrawing = true;
  const show = () => {
    isDrawing = false;
    showOverview(run);
  };
  if (document.hidden) setTimeout(show, 1000); // the title still shows it
  else requestAnimationFrame(show);
}

function onEvent(kind, data) {
  if (kind === "step") onStep(data);
  else if (kind === "tick") onTick(data ?? {});
  else if (kind === "ranks") showRanks(data?.ranks);
  else if (kind === "log") log.add(data?.lines ?? []);
  else if (kind === "progress") {
    if (run.status && data) run.status.progress = data;
    draw();
  } else {
    if (kind === "eval") onEval(data);
    fetchStatus();
    if (BEGINNINGS.has(kind)) fetchHistory();
  }
}

function onStep(step) {
  if (!step) return;
  if (!series.add(step) || series.isLong) fetchHistory();
  run.latest = step;
  if (run.status) {
    run.status.step = step.step;
    run.status.epoch = step.epoch;
    run.status.progress = null;
  }
  panels.schedule();
  draw();
}

function onEval(given) {
  series.addEval(given);
  panels.schedule();
}

function onTick({ health, metrics, host, gpus }) {
  run.health = health ?? run.health;
  run.metrics = metrics ?? run.metrics;
  run.ticked = Date.now() / 1000;
  const isNewPhase = run.status && health && health.phase !== run.status.phase;
  if (isNewPhase) fetchStatus();
  if (host || gpus) {
    takeMachine({ host, gpus });
    series.addMoment(Date.now() / 1000, host, gpus ?? []);
    panels.schedule();
  }
  draw();
}

function onState(state) {
  run.connection = state;
  if (state === "live") fetchAll();
  draw();
}

// --- user settings --------------------------------------------------------------------------------

let isWindowChosen = false;

function showWindow() {
  const window = WINDOWS[byId("smoothing").value];
  const text = window === 1 ? "off" : `${count(window)} steps`;
  setText(byId("smoothing-value"), text);
  byId("smoothing").setAttribute("aria-valuetext", text);
  panels.set({ window });
}

/** Smooth over about a fortieth of the run, until the reader chooses. */
function chooseWindow(totalSteps) {
  if (isWindowChosen || !(totalSteps > 0)) return;
  const wanted = totalSteps / 40;
  const at = WINDOWS.findLastIndex((window) => window <= Math.max(1, wanted));
  if (byId("smoothing").value === String(at)) return;
  byId("smoothing").value = at;
  showWindow();
}

byId("smoothing").max = WINDOWS.length - 1;
byId("smoothing").addEventListener("input", () => {
  isWindowChosen = true;
  showWindow();
});
byId("log-scale").addEventListener("change", (event) => panels.set({ isLog: event.target.checked }));
byId("range").addEventListener("change", (event) => panels.set({ share: Number(event.target.value) }));

byId("no-charts").hidden = hasBokeh();
byId("all-runs").hidden = location.pathname === "/"; // one run of many, or the only one
setInterval(draw, 1000); // the clocks
showWindow();
fetchAll();
new Stream("events", onEvent, onState).open();
