// The lists and tables of the page: held-out figures, samples, timeline, checkpoints, warnings,
// machine, ranks, plan, log.

import { byId, el, heads, rows, setText, update } from "./dom.js";
import { UNKNOWN, bytes, clock, count, duration, label, number, percent, value } from "./wording.js";

const FIRST_SAMPLES = 6;
const KEPT_LINES = 500;

/** Show everything of the status that is a list or a table. */
export function showRecords(status) {
  section("held-out", heldOut(status), comparisonTable);
  section("samples", pairs(status.samples ?? []), samples);
  section("timeline", moments(status), timeline);
  section("checkpoints", status.checkpoints ?? [], checkpointTable);
  section("warnings", allWarnings(status), warnings);
  showRanks(status.ranks);
  section("plan", Object.entries(status.plan ?? {}), plan);
  section("about", about(status), facts);
}

/** Show what each process of several does. */
export function showRanks(ranks) {
  section("ranks", ranks ?? [], objectTable);
}

/** Show the machine's figures. */
export function showMachine(host, gpus) {
  section("gpus", gpus ?? [], objectTable);
  section("host-facts", Object.entries(host ?? {}).filter(([, given]) => given !== null), facts);
}

/** A section is there when it has something to show. */
function section(id, data, make) {
  const place = byId(id);
  place.closest("section").hidden = data.length === 0;
  if (data.length) update(place, data, make);
}

function heldOut(status) {
  const { before, after } = status.generated ?? {};
  const evals = status.evals ?? [];
  const first = evals.find(({ step }) => step === 0);
  const last = evals.at(-1) === first ? undefined : evals.at(-1);
  const share = (generated) => (generated ? percent(generated.exact_match) : UNKNOWN);
  const all = (before ?? after)?.rows;
  const table = [
    [`Exact match${all ? ` (${count(all)} rows)` : ""}`, share(before), share(after),
      change(before?.exact_match, after?.exact_match, true)],
    ["Loss", number(first?.eval_loss), number(last?.eval_loss), change(first?.eval_loss, last?.eval_loss)],
    ["Perplexity", number(first?.eval_perplexity), number(last?.eval_perplexity),
      change(first?.eval_perplexity, last?.eval_perplexity)],
    ["Token accuracy", percent(first?.eval_token_accuracy), percent(last?.eval_token_accuracy),
      change(first?.eval_token_accuracy, last?.eval_token_accuracy, true)],
  ];
  const known = table.filter(([, ...cells]) => cells.slice(0, 2).some((cell) => cell !== UNKNOWN));
  const isDone = Boolean(after) || status.phase === "finished";
  return known.length ? [{ step: last?.step, isDone, known }] : [];
}

function change(before, after, isShare = false) {
  if (!Number.isFinite(before) || !Number.isFinite(after)) return "";
  const sign = after >= before ? "+" : "−";
  const size = Math.abs(after - before);
  return sign + (isShare ? `${(100 * size).toFixed(1)} pts` : number(size, 3));
}

function comparisonTable([{ step, isDone, known }]) {
  const now = isDone ? "after" : step ? `step ${count(step)}` : "now";
  return [heads(["", "before", now, "change"]), el("tbody", {}, ...rows(known))];
}

/** The answers to one prompt, before and after, side by side. */
function pairs(given) {
  const found = new Map();
  for (const sample of given) {
    const pair = found.get(sample.index) ?? { prompt: sample.prompt, expected: sample.expected };
    pair[sample.when] = { answer: sample.answer, step: sample.step };
    found.set(sample.index, pair);
  }
  return [...found.entries()].sort(([a], [b]) => a - b).map(([index, pair]) => ({ index, ...pair }));
}

function samples(shown) {
  const cards = shown.map(sampleCard);
  const more = cards.slice(FIRST_SAMPLES);
  if (more.length === 0) return cards;
  const rest = el("details", {}, el("summary", {}, `${more.length} more`), ...more);
  return [...cards.slice(0, FIRST_SAMPLES), rest];
}

function sampleCard({ index, prompt, expected, before, after }) {
  return el("article", { class: "sample" },
    el("h3", {}, `Prompt ${index + 1}`),
    quoted("", prompt),
    el("div", { class: "answers" },
      quoted("Expected", expected),
      answer("Before", before, expected),
      answer("After", after, expected)));
}

function answer(title, given, expected) {
  if (!given) return el("div", {}, el("h4", {}, title), el("p", { class: "soft" }, "not yet"));
  const isRight = given.answer.trim() === expected.trim();
  const verdict = el("span", { class: `verdict ${isRight ? "good" : "bad"}` },
    isRight ? "as expected" : "differs");
  return quoted(title, given.answer, verdict);
}

function quoted(title, text, note = null) {
  return el("div", {}, title ? el("h4", {}, title, " ", note) : null,
    text ? el("pre", { dir: "auto" }, text) : el("p", { class: "soft" }, "empty text"));
}

/** What happened, newest first; checkpoints and evaluations come beside the timeline's own. */
function moments(status) {
  const own = (status.timeline ?? []).map(({ time, kind, text }) => ({ time, kind, text }));
  const saved = (status.checkpoints ?? [])
    .filter(({ time }) => Number.isFinite(time))
    .map(({ time, step, bytes: size, is_best: isBest }) => ({
      time, kind: "checkpoint",
      text: `Checkpoint of step ${count(step)}, ${bytes(size)}${isBest ? ", best so far" : ""}`,
    }));
  return [...saved, ...own].reverse().sort((a, b) => b.time - a.time);
}

const KIND_NAMES = { bad: "fault", good: "done", gap: "…" };

function timeline(shown) {
  return shown.map(({ time, kind, text }) =>
    el("li", { "data-kind": kind },
      el("time", { datetime: new Date(1000 * time).toISOString() }, clock(time)),
      el("span", { class: "kind" }, KIND_NAMES[kind] ?? kind),
      el("span", { class: "text" }, text)));
}

function checkpointTable(shown) {
  // Each was the best when it was saved; only the last one still is.
  const best = shown.filter(({ is_best: wasBest }) => wasBest).at(-1)?.step;
  const cells = [...shown].reverse().map(({ step, path, bytes: size, seconds }) =>
    [count(step), bytes(size), duration(seconds), path.split("/").at(-1),
      step === best ? "best" : ""]);
  return [heads(["step", "size", "saved in", "folder", ""]), el("tbody", {}, ...rows(cells))];
}

function allWarnings(status) {
  const leftOut = status.warnings_left_out ?? 0;
  const more = leftOut ? [{ message: `${count(leftOut)} more are not shown`, count: 1 }] : [];
  return [...(status.warnings ?? []), ...more];
}

function warnings(shown) {
  return shown.map(({ message, count: times }) =>
    el("li", {}, message, times > 1 ? el("span", { class: "soft" }, ` (${count(times)} times)`) : null));
}

/** A table of objects that have the same keys: GPUs, ranks. */
function objectTable(shown) {
  const keys = [...new Set(shown.flatMap(Object.keys))].filter((key) =>
    shown.some((item) => item[key] !== null && item[key] !== undefined));
  const cells = shown.map((item) => keys.map((key) => value(key, item[key])));
  return [heads(keys.map(label)), el("tbody", {}, ...rows(cells))];
}

function facts(entries) {
  return entries.map(([key, given]) =>
    el("div", {}, el("dt", {}, label(key)), el("dd", {}, value(key, given))));
}

function plan(entries) {
  const reasons = entries.find(([key]) => key === "reasons")?.[1] ?? [];
  return [
    el("dl", { class: "facts" }, ...facts(entries.filter(([key]) => key !== "reasons"))),
    ...(reasons.length
      ? [el("h3", {}, "Why"), el("ul", {}, ...reasons.map((reason) => el("li", {}, String(reason))))]
      : []),
  ];
}

function about(status) {
  const keys = [
    "device", "gpu_name", "gpu_count", "precision", "attention", "output_dir", "config_digest",
    "attempt", "pid",
  ];
  const known = keys.filter((key) => ![null, undefined, "", 0].includes(status[key]));
  const started = status.started_time ? [["started", clock(status.started_time)]] : [];
  return [...started, ...known.map((key) => [key, key === "pid" ? String(status.pid) : status[key]])];
}

/** The log's tail; it follows the end unless the reader has scrolled up. */
export class Log {
  constructor(node) {
    this.node = node;
    this.lines = [];
  }

  replace(lines) {
    this.lines = lines.slice(-KEPT_LINES);
    this.#show();
  }

  add(lines) {
    this.lines = [...this.lines, ...lines].slice(-KEPT_LINES);
    this.#show();
  }

  #show() {
    const { node } = this;
    node.closest("section").hidden = this.lines.length === 0;
    const isAtEnd = node.scrollHeight - node.scrollTop - node.clientHeight < 24;
    setText(node, this.lines.join("\n"));
    if (isAtEnd) node.scrollTop = node.scrollHeight;
  }
}
