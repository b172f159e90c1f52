// The top of the page: phase, health, problems and remedies, progress, key figures.

import { byId, el, setText, update } from "./dom.js";
import { UNKNOWN, bytes, clock, count, duration, number, percent } from "./wording.js";

const TONES = { finished: "good", failed: "bad", stopped: "warn", training: "busy" };
const ENDINGS = ["finished", "failed", "stopped"];
const CONNECTIONS = {
  connecting: "Connecting…",
  live: "Live",
  reconnecting: "Reconnecting…",
};

let announced = "";

/** Show all that the top says of the run. */
export function showOverview(run) {
  const { status, health, metrics } = run;
  const phase = health?.phase || status?.phase;
  if (!phase) return showConnection(run);
  showConnection(run);
  showPhase(run, phase);
  showTrouble(status, health);
  showProgress(run, phase);
  showTiles(status ?? {}, metrics ?? {}, run);
  announce(run, phase);
}

/** Whether the run is over; after its last word the report may still be in the making. */
const isOver = (status) => ENDINGS.includes(status?.phase) || Number.isFinite(status?.exit_code);

function showConnection({ status, connection }) {
  const isGone = connection === "reconnecting" && isOver(status);
  const node = byId("connection");
  setText(node, isGone ? "Server closed: last known state" : CONNECTIONS[connection]);
  node.dataset.state = isGone ? "gone" : connection;
}

function showPhase({ status, health }, phase) {
  const name = status?.run_name || "Training run";
  setText(byId("run-name"), name);
  const pill = byId("phase");
  setText(pill, phase);
  pill.dataset.tone = TONES[phase] ?? "plain";
  setText(byId("phase-detail"), status?.detail ?? "");
  const isWell = health?.status !== "unhealthy";
  const node = byId("health");
  node.dataset.tone = isWell ? "good" : "bad";
  const since = health?.seconds_since_progress;
  const progress = isOver(status) || !(since >= 5) ? "" : `, last progress ${duration(since)} ago`;
  setText(node, (isWell ? "Healthy" : "Unhealthy") + progress);
  const { done, total } = progressOf(status);
  const share = total > 0 ? `${Math.floor((100 * done) / total)}% ` : "";
  setText(document.querySelector("title"), `${isWell ? "" : "⚠ "}${share}${phase} · ${name}`);
}

/** What is wrong: the problems of a failure, or why the run is not healthy. */
function showTrouble(status, health) {
  const problems = status?.failure?.problems ?? [];
  const isUnwell = health?.status === "unhealthy";
  const what = { what: health?.reason ?? "", remedy: health?.remedy ?? "" };
  const shown = problems.length ? problems : isUnwell ? [what] : [];
  const node = byId("trouble");
  node.hidden = shown.length === 0;
  const code = isOver(status) ? status.exit_code : status?.failure?.exit_code;
  const title = problems.length ? "The run failed" : "The run is not healthy";
  update(node, [shown, code], () => [
    el("h2", {}, title, code ? el("small", {}, ` exit code ${code}`) : null),
    ...shown.map(problem),
  ]);
}

function problem({ what, where, why, remedy }) {
  return el("div", { class: "problem" },
    el("p", { class: "what" }, what || "unknown"),
    el("dl", {},
      ...[["Where", where], ["Why", why]].flatMap(([name, text]) =>
        text ? [el("dt", {}, name), el("dd", {}, text)] : []),
      ...(remedy ? [el("dt", {}, "Remedy"), el("dd", {}, remedyText(remedy))] : [])));
}

function remedyText(remedy) {
  const text = el("span", { class: "remedy" }, remedy);
  if (!navigator.clipboard) return text;
  const button = el("button", { type: "button", class: "quiet" }, "Copy");
  button.setAttribute("aria-label", "Copy the remedy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(remedy).catch(() => {});
    setText(button, "Copied");
  });
  const place = el("span", { class: "copyable" }, text, button);
  return place;
}

function progressOf(status) {
  const inside = status?.progress;
  if (inside) return { done: inside.done, total: inside.total, unit: inside.unit };
  return { done: status?.step ?? 0, total: status?.total_steps ?? 0, unit: "" };
}

function showProgress(run, phase) {
  const { status, metrics } = run;
  const { done, total, unit } = progressOf(status);
  const bar = byId("progress");
  const isUnknown = !(total > 0);
  const isWaiting = isUnknown && !isOver(status);
  if (isWaiting) bar.removeAttribute("value");
  else bar.value = isUnknown ? 0 : Math.min(1, done / total);
  bar.dataset.tone = TONES[phase] ?? "plain";
  const epoch = metrics?.epoch ?? status?.epoch;
  const of = isUnknown ? count(done) : `${count(done)} of ${count(total)}`;
  const steps = unit ? `${phase}: ${of} ${unit}` : done || !isUnknown ? `Step ${of}` : phase;
  const share = isUnknown ? "" : ` · ${percent(done / total, 0)}`;
  const epochs = !unit && Number.isFinite(epoch) ? ` · epoch ${epoch.toFixed(2)}` : "";
  setText(byId("done"), `${steps}${share}${epochs}`);
  bar.setAttribute("aria-valuetext", `${steps}${share}`);
  setText(byId("left"), timeLeft(run));
}

function timeLeft({ status, metrics, fetched, ticked }) {
  const now = Date.now() / 1000;
  const isStill = isOver(status) || status?.is_running === false;
  const elapsed = status?.elapsed_seconds;
  const since = isStill ? 0 : Math.max(0, now - fetched);
  const passed = Number.isFinite(elapsed) ? duration(elapsed + since) : UNKNOWN;
  const paused = status?.paused_seconds >= 1
    ? `, and ${duration(status.paused_seconds)} paused between starts` : "";
  if (isOver(status)) return `took ${passed}${paused}`;
  if (isStill) return `stopped after ${passed}`;
  if (!Number.isFinite(metrics?.eta_seconds)) return `${passed} so far`;
  const end = ticked + metrics.eta_seconds;
  const left = duration(Math.max(0, end - now));
  return `${left} left · ends about ${clock(end, false)} · ${passed} so far`;
}

function showTiles(status, metrics, { latest, host, gpus }) {
  const evals = status.evals ?? [];
  const held = evals.at(-1);
  const finite = evals.filter(({ eval_loss: loss }) => Number.isFinite(loss));
  const best = finite.reduce((a, b) => (a && a.eval_loss <= b.eval_loss ? a : b), null);
  const loss = latest?.loss ?? metrics.last_loss;
  const isMissing = !latest && !(metrics.current_step > 0);
  const tiles = [
    ["Loss", isMissing ? UNKNOWN : (Number.isFinite(loss) ? number(loss) : "not finite"), ""],
    ["Held-out loss", number(held?.eval_loss),
      best ? `best ${number(best.eval_loss)} at step ${count(best.step)}` : ""],
    ["Tokens per second", count(metrics.tokens_per_second),
      metrics.tokens_seen
        ? `mean ${count(metrics.mean_tokens_per_second)}, ${count(metrics.tokens_seen)} seen` : ""],
    ["Learning rate", number(latest?.learning_rate ?? metrics.learning_rate, 3),
      latest?.step === 1 && latest.learning_rate === 0 ? "the warmup begins at 0" : ""],
    ["Gradient norm", number(latest?.grad_norm ?? metrics.grad_norm, 3), ""],
    ["Worker memory", bytes(latest?.memory_bytes || metrics.memory_bytes),
      host?.memory_limit_bytes
        ? `host ${bytes(host.memory_used_bytes)} of ${bytes(host.memory_limit_bytes)}` : ""],
    ...gpuTile(gpus ?? []),
    ["Disk free", bytes(host?.disk_free_bytes),
      host?.disk_total_bytes ? `of ${bytes(host.disk_total_bytes)}` : ""],
  ];
  const place = byId("tiles");
  const kept = tiles.filter(([, value]) => value !== UNKNOWN);
  const names = kept.map(([name]) => name);
  update(place, names, () => names.map((name) =>
    el("div", {}, el("dt", {}, name), el("dd", {}), el("dd", { class: "soft" }))));
  kept.forEach(([, value, note], at) => {
    const [, figure, more] = place.children[at].children;
    setText(figure, value);
    setText(more, note);
  });
}

function gpuTile(gpus) {
  if (gpus.length === 0) return [];
  const sum = (field) => gpus.reduce((total, gpu) => total + (gpu[field] ?? 0), 0);
  const use = sum("utilization_percent") / gpus.length / 100;
  const memory = `${bytes(sum("memory_used_bytes"))} of ${bytes(sum("memory_total_bytes"))}`;
  return [[gpus.length > 1 ? `${gpus.length} GPUs` : "GPU", percent(use, 0), memory]];
}

/** Tell a screen reader of a new phase, of health, and of the connection; of nothing else. */
function announce({ status, health, connection }, phase) {
  const isUnwell = health?.status === "unhealthy";
  const words = [
    `Phase ${phase}.`,
    isUnwell ? `Unhealthy: ${health.reason}.` : "",
    connection === "reconnecting" && !isOver(status) ? "Connection lost, reconnecting." : "",
  ];
  const key = [phase, isUnwell, connection].join(" ");
  if (key === announced) return;
  announced = key;
  setText(byId("announcer"), words.filter(Boolean).join(" "));
}
