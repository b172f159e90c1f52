// The charts, their series and their texts: each has its newest
// value beside the title, a summary for screen readers, and a table.

import { el, heads, rows, setText, update } from "./dom.js";
import { Plot, hasBokeh } from "./plot.js";
import { firstWithin, smoothed } from "./series.js";
import { bytes, clock, count, number, percent } from "./wording.js";

const GIGA = 1e9;
const INKS = ["line", "held", "good", "warn", "bad", "soft"];
const TABLE_ROWS = 24;
const REDRAW_MS = 900;

/** A chart over steps with the raw values, and smoothed. */
function bySteps(id, title, field, words, more = {}) {
  return {
    id, title, words, format: "number", height: 150, ...more,
    lines: () => [
      { field: "raw", label: "each", ink: "line", weight: "thin" },
      { field: "mean", label: "smoothed", ink: "line", weight: "bold" },
    ],
    data: (series, view) => {
      const from = firstWithin(series.points.step, view.share);
      const steps = series.points.step;
      const mean = smoothed(steps, series.points[field], view.window);
      return {
        x: steps.slice(from),
        raw: gaps(series.points[field], from),
        mean: mean.slice(from),
      };
    },
  };
}

/** A chart over steps or time with lines as they are. */
function plain(id, title, words, lines, data, more = {}) {
  return { id, title, words, format: "decimal", height: 150, lines, data, ...more };
}

const inGigabytes = (value) => bytes(value * GIGA);

const PANELS = [
  {
    ...bySteps("loss", "Loss", "loss", number, { height: 280, isWide: true, hasDots: true }),
    data: (series, view) => {
      const { points, evals } = series;
      const base = bySteps("", "", "loss").data(series, view);
      const from = firstWithin(points.step, view.share);
      const first = base.x[0] ?? 0;
      const held = evals.step.map((step, at) => [step, evals.eval_loss[at]]);
      const shown = held.filter(([step, loss]) => loss !== null && (step >= first || view.share === 1));
      return {
        ...base,
        low: gaps(points.loss_min, from),
        high: gaps(points.loss_max, from),
        dots: { x: shown.map(([step]) => step), y: shown.map(([, loss]) => loss) },
      };
    },
    hasBand: true,
  },
  bySteps("speed", "Tokens per second", "tokens_per_second", count, { format: "count" }),
  bySteps("norm", "Gradient norm", "grad_norm", number),
  plain("rate", "Learning rate", (value) => number(value, 3),
    () => [{ field: "rate", label: "rate", ink: "line", weight: "bold" }],
    (series, view) => stepColumns(series, view, { rate: "learning_rate" }),
    { format: "rate", isFromZero: true }),
  plain("memory", "Worker memory, GB", inGigabytes,
    (series) => [
      { field: "main", label: "main memory", ink: "line", weight: "bold" },
      ...(series.points.gpu_memory_bytes.some((value) => value > 0)
        ? [{ field: "gpu", label: "GPU", ink: "held", weight: "bold" }]
        : []),
    ],
    (series, view) =>
      stepColumns(series, view, { main: "memory_bytes", gpu: "gpu_memory_bytes" }, GIGA),
    { isFromZero: true }),
  plain("host", "Host memory used, GB", inGigabytes,
    () => [{ field: "used", label: "used", ink: "line", weight: "bold" }],
    (series) => ({
      x: moments(series),
      used: scaled(series.hardware.memory_used_bytes, GIGA),
    }),
    { isTime: true, isFromZero: true }),
  plain("gpu-use", "GPU utilisation", (value) => percent(value / 100, 0),
    (series) => gpuLines(series), (series) => gpuColumns(series, "utilization_percent", 1),
    { isTime: true, isFromZero: true, format: "count" }),
  plain("gpu-memory", "GPU memory used, GB", inGigabytes,
    (series) => gpuLines(series), (series) => gpuColumns(series, "memory_used_bytes", GIGA),
    { isTime: true, isFromZero: true }),
];

const gaps = (column, from = 0) => column.slice(from).map((value) => value ?? NaN);
const scaled = (column, unit) => column.map((value) => (value === null ? NaN : value / unit));

function stepColumns(series, view, fields, unit = 1) {
  const from = firstWithin(series.points.step, view.share);
  const columns = { x: series.points.step.slice(from) };
  for (const [name, field] of Object.entries(fields)) {
    columns[name] = scaled(series.points[field].slice(from), unit);
  }
  return columns;
}

/** The moments as the chart wants them: milliseconds, and on the reader's clock. */
function moments(series) {
  const offset = 60_000 * new Date().getTimezoneOffset();
  return series.hardware.time.map((time) => 1000 * time - offset);
}

function gpuLines(series) {
  return series.hardware.gpu.map((gpu, at) => ({
    field: `gpu${gpu.index}`, label: `GPU ${gpu.index}`, ink: INKS[at % INKS.length], weight: "bold",
  }));
}

function gpuColumns(series, field, unit) {
  const columns = { x: moments(series) };
  for (const gpu of series.hardware.gpu) columns[`gpu${gpu.index}`] = scaled(gpu[field], unit);
  return columns;
}

class Panel {
  constructor(spec) {
    this.spec = spec;
    this.plot = null;
    this.key = "";
    this.drawn = "";
    this.isVisible = true;
    this.latest = el("span", { class: "latest" });
    this.place = el("div", { class: `plot${spec.isWide ? " tall" : ""}`, role: "img" });
    this.table = el("table");
    this.details = el("details", {}, el("summary", {}, `${spec.title} as a table`),
      el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `${spec.title}, table` },
        this.table));
    this.details.addEventListener("toggle", () => { this.drawn = ""; });
    this.legend = el("span", { class: "legend" });
    this.node = el("figure", { class: `card chart${spec.isWide ? " wide" : ""}`, id: `chart-${spec.id}` },
      el("figcaption", {}, el("h3", {}, spec.title), this.legend, this.latest),
      this.place, this.details);
    this.node.hidden = true;
  }

  /** Draw if there is something new; the words are made in any case. */
  draw(series, view, version) {
    if (version === this.drawn || !this.isVisible) return;
    this.drawn = version;
    const lines = this.spec.lines(series);
    const { dots, ...main } = this.spec.data(series, view);
    const isEmpty = lines.length === 0 || !main.x.length
      || lines.every(({ field }) => main[field].every((value) => !Number.isFinite(value)));
    this.node.hidden = isEmpty && !(dots?.x.length > 0);
    if (this.node.hidden) return;
    this.#describe(lines, main, dots);
    if (!hasBokeh()) return;
    const isLog = Boolean(this.spec.isWide && view.isLog);
    const key = JSON.stringify([lines, isLog, view.theme]);
    if (key !== this.key) {
      this.plot?.remove();
      this.plot = new Plot(this.place, { ...this.spec, lines, isLog });
      this.key = key;
    }
    const first = main.x[0];
    const marks = this.spec.isTime ? [] : series.resumes.filter((step) => step >= first);
    this.plot.set({ main, dots, marks: { x: marks } });
  }

  #describe(lines, main, dots) {
    const { title, words, isTime } = this.spec;
    const last = lines.at(-1);
    const newest = main[last.field].findLastIndex((value) => Number.isFinite(value));
    setText(this.latest, newest < 0 ? "not finite" : words(main[last.field][newest]));
    const place = (at) => (isTime ? clock(epoch(main.x[at])) : `step ${count(main.x[at])}`);
    const texts = lines.map(({ field, label }) => {
      const values = main[field].filter((value) => Number.isFinite(value));
      if (values.length === 0) return `${label}: no finite value`;
      const low = values.reduce((a, b) => Math.min(a, b));
      const high = values.reduce((a, b) => Math.max(a, b));
      return `${label}: from ${words(values[0])} to ${words(values.at(-1))}, `
        + `lowest ${words(low)}, highest ${words(high)}`;
    });
    if (dots?.x.length) texts.push(`held out: ${words(dots.y.at(-1))} at step ${count(dots.x.at(-1))}`);
    const range = newest < 0 ? "" : `, ${place(0)} to ${place(newest)}`;
    this.place.setAttribute("aria-label", `Chart of ${title}${range}. ${texts.join(". ")}.`);
    this.#explain(lines, dots);
    if (this.details.open || !hasBokeh()) this.#tabulate(lines, main, place);
  }

  #explain(lines, dots) {
    const keys = lines.map(({ label, ink, weight }) => [label, `key ink-${ink} ${weight}`]);
    if (dots) keys.push(["held out", "key ink-held dot"]);
    update(this.legend, keys.length > 1 ? keys : [], (shown) =>
      shown.map(([label, style]) =>
        el("span", {}, el("i", { class: style, "aria-hidden": "true" }), label)));
  }

  #tabulate(lines, main, place) {
    const every = Math.max(1, Math.ceil(main.x.length / TABLE_ROWS));
    const chosen = [...main.x.keys()].filter((at) => (main.x.length - 1 - at) % every === 0).reverse();
    const cells = chosen.map((at) => [place(at), ...lines.map(({ field }) => this.spec.words(main[field][at]))]);
    update(this.table, cells, () => [
      heads([this.spec.isTime ? "time" : "step", ...lines.map((line) => line.label)]),
      el("tbody", {}, ...rows(cells)),
    ]);
  }
}

const epoch = (milliseconds) => (milliseconds + 60_000 * new Date().getTimezoneOffset()) / 1000;

/** All charts, drawn at most once a second and only where they can be seen. */
export class Panels {
  constructor(place, machinePlace, series) {
    this.series = series;
    this.view = { window: 1, share: 1, isLog: false, theme: 0 };
    this.changes = 0;
    this.panels = PANELS.map((spec) => new Panel(spec));
    for (const panel of this.panels) {
      if (panel.spec.isTime) machinePlace.lastElementChild.before(panel.node);
      else place.append(panel.node);
    }
    this.timer = null;
    this.after = 0;
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const panel = this.panels.find(({ node }) => node === entry.target);
        panel.isVisible = entry.isIntersecting || panel.node.hidden;
      }
      this.schedule();
    }, { rootMargin: "200px" });
    for (const { node } of this.panels) watcher.observe(node);
    document.addEventListener("visibilitychange", () => this.schedule());
    document.addEventListener("themechange", () => this.set({ theme: this.view.theme + 1 }));
  }

  /** Change how the charts look: {window, share, isLog, theme}. */
  set(changed) {
    Object.assign(this.view, changed);
    this.changes += 1;
    this.after = 0;
    this.schedule();
  }

  /** Draw soon; a machine that draws slowly is asked less often. */
  schedule() {
    if (document.hidden) return;
    if (this.timer !== null && this.after > 0) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.timer = null;
      const begun = performance.now();
      const version = `${this.series.version} ${this.changes}`;
      for (const panel of this.panels) {
        panel.draw(this.series, this.view, `${version} ${panel.details.open}`);
      }
      this.after = Math.max(REDRAW_MS, 8 * (performance.now() - begun));
    }, this.after);
  }
}
