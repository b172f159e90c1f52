// The series behind the charts: the response of /history, and the steps since then.

export const MAX_POINTS = 1000;
const MAX_LIVE_STEPS = 500; // then the server is asked to merge them
const MAX_MOMENTS = 1800; // of the machine's figures: an hour at one every two seconds

const POINT_FIELDS = [
  "step", "epoch", "loss", "loss_min", "loss_max", "learning_rate", "grad_norm",
  "tokens_per_second", "memory_bytes", "gpu_memory_bytes",
];
const EVAL_FIELDS = ["step", "eval_loss", "eval_perplexity", "eval_token_accuracy"];

const columns = (fields) => Object.fromEntries(fields.map((field) => [field, []]));

export class Series {
  constructor() {
    this.points = columns(POINT_FIELDS);
    this.evals = columns(EVAL_FIELDS);
    this.resumes = [];
    this.hardware = { time: [], memory_used_bytes: [], gpu: [] };
    this.live = []; // the steps after the history
    this.version = 0; // changes with every change
  }

  get lastStep() {
    return this.points.step.at(-1) ?? 0;
  }

  /** Whether so many steps came since that the server should merge them. */
  get isLong() {
    return this.live.length > MAX_LIVE_STEPS;
  }

  /** Take the history; steps that arrived while it was fetched stay. */
  replace(history) {
    for (const field of POINT_FIELDS) this.points[field] = history.points?.[field] ?? [];
    for (const field of EVAL_FIELDS) this.evals[field] = history.evals?.[field] ?? [];
    this.resumes = history.resumes ?? [];
    this.hardware = history.hardware ?? this.hardware;
    this.hardware.gpu ??= [];
    const later = this.live.filter((step) => step.step > this.lastStep);
    this.live = [];
    for (const step of later) this.add(step);
    this.version += 1;
  }

  /** Take one step; false if it does not follow, so that the history must be fetched. */
  add(step) {
    if (typeof step?.step !== "number") return true;
    if (step.step <= this.lastStep) return false;
    const { points } = this;
    const speed = step.step_seconds > 0 ? step.tokens / step.step_seconds : null;
    for (const field of POINT_FIELDS) points[field].push(step[field] ?? null);
    for (const field of ["loss_min", "loss_max"]) points[field][points.step.length - 1] = step.loss;
    points.tokens_per_second[points.step.length - 1] = speed;
    this.live.push(step);
    this.version += 1;
    return true;
  }

  /** Take an evaluation; one of a step that is known already comes instead of it. */
  addEval(given) {
    if (typeof given?.step !== "number") return;
    const { evals } = this;
    while (evals.step.at(-1) >= given.step) for (const field of EVAL_FIELDS) evals[field].pop();
    for (const field of EVAL_FIELDS) evals[field].push(given[field] ?? null);
    this.version += 1;
  }

  /** Take the machine's figures of a moment. */
  addMoment(time, host, gpus) {
    const { hardware } = this;
    hardware.time.push(time);
    hardware.memory_used_bytes.push(host?.memory_used_bytes ?? null);
    gpus.forEach((gpu, at) => {
      hardware.gpu[at] ??= { index: gpu.index, memory_used_bytes: [], utilization_percent: [] };
      for (const field of ["memory_used_bytes", "utilization_percent"]) {
        const column = hardware.gpu[at][field];
        while (column.length < hardware.time.length - 1) column.push(null);
        column.push(gpu[field] ?? null);
      }
    });
    if (hardware.time.length > MAX_MOMENTS) {
      for (const column of allColumns(hardware)) column.shift();
    }
    this.version += 1;
  }
}

function allColumns(hardware) {
  const ofGpus = hardware.gpu.flatMap((gpu) => [gpu.memory_used_bytes, gpu.utilization_percent]);
  return [hardware.time, hardware.memory_used_bytes, ...ofGpus];
}

/**
 * Average over about so many steps, weighing the newest most; gaps stay gaps.
 *
 * Points may stand for one step or for a hundred, so the weight follows the steps between.
 */
export function smoothed(steps, values, window) {
  if (window <= 1) return values.map((value) => value ?? NaN);
  let mean = 0;
  let weight = 0;
  let before = steps[0] - 1;
  return values.map((value, at) => {
    if (value === null || !Number.isFinite(value)) return NaN;
    const kept = Math.exp(-(2 * Math.max(1, steps[at] - before)) / window);
    before = steps[at];
    mean = kept * mean + (1 - kept) * value;
    weight = kept * weight + (1 - kept);
    return mean / weight;
  });
}

/** The index of the first point within the last `share` of the steps. */
export function firstWithin(steps, share) {
  if (share >= 1 || steps.length === 0) return 0;
  const from = steps.at(-1) * (1 - share);
  const at = steps.findIndex((step) => step >= from);
  return at < 0 ? 0 : at;
}
