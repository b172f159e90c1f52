// The curves of several runs on common axes, one colour for each run.

import { el, setText } from "./dom.js";
import { Plot, hasBokeh } from "./plot.js";
import { smoothed } from "./series.js";
import { number } from "./wording.js";

const CHARTS = [
  { id: "loss", title: "Loss", part: "points", field: "loss", height: 280, isLoss: true, isSmooth: true },
  { id: "eval", title: "Evaluation loss", part: "evals", field: "eval_loss", height: 200, isLoss: true },
  { id: "norm", title: "Gradient norm", part: "points", field: "grad_norm", height: 200, isSmooth: true },
  { id: "rate", title: "Learning rate", part: "points", field: "learning_rate", height: 200, format: "rate" },
];

export class Overlay {
  constructor(place) {
    this.runs = []; // {name, ink, history}
    this.settings = { window: 1, isLog: false };
    this.charts = CHARTS.map((chart) => ({ ...chart, ...frameOf(chart), plot: null, drawn: "" }));
    place.append(...this.charts.map(({ figure }) => figure));
  }

  /** Show other runs. */
  set(runs) {
    this.runs = runs;
    for (const chart of this.charts) this.#draw(chart);
  }

  /** Change how curves are shown: {window, isLog}. */
  view(settings) {
    Object.assign(this.settings, settings);
    this.set(this.runs);
  }

  /** Draw everything again, in the colours of another theme. */
  redraw() {
    for (const chart of this.charts) chart.drawn = "";
    this.set(this.runs);
  }

  async #draw(chart) {
    const curves = this.runs.map((run) => this.#curve(chart, run)).filter(({ x }) => x.length);
    chart.figure.hidden = curves.length === 0;
    setText(chart.summary, summaryOf(curves));
    chart.place.ariaLabel = `${chart.title}: ${summaryOf(curves)}`;
    if (!curves.length || !hasBokeh()) return;
    const isLog = Boolean(chart.isLoss) && this.settings.isLog;
    const key = JSON.stringify([isLog, curves.map(({ name, ink }) => [name, ink])]);
    if (chart.drawn !== key) {
      chart.drawn = key;
      await chart.plot?.remove();
      chart.plot = new Plot(chart.place, {
        height: chart.height,
        isLog,
        format: chart.format ?? "number",
        lines: curves.map(({ name, ink }) => ({
          field: "y", label: name, ink, weight: "bold", source: ink,
        })),
      });
    }
    const data = Object.fromEntries(curves.map(({ ink, x, y }) => [ink, { x, y }]));
    chart.plot.set({ ...data, marks: { x: [] } });
  }

  #curve(chart, { name, ink, history }) {
    const steps = history[chart.part]?.step ?? [];
    const values = history[chart.part]?.[chart.field] ?? [];
    const window = chart.isSmooth ? this.settings.window : 1;
    return { name, ink, x: steps, y: smoothed(steps, values, window) };
  }
}

function frameOf({ id, title, height }) {
  const place = el("div", { class: "plot", role: "img" });
  const summary = el("p", { class: "unseen" });
  const caption = el("figcaption", {}, el("h3", {}, title));
  const isWide = height > 200;
  const figure = el(
    "figure", { id: `chart-${id}`, class: `card chart${isWide ? " wide" : ""}`, hidden: true },
    caption, place, summary,
  );
  return { figure, place, summary };
}

const summaryOf = (curves) =>
  curves
    .map(({ name, x, y }) => `${name}: ${number(y.at(0))} to ${number(y.at(-1))} at step ${x.at(-1)}`)
    .join("; ");
