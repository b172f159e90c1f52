// Number formats. Unknown values are an en dash; NaN and infinity are "not finite".

export const UNKNOWN = "–";
const BYTES = ["B", "KB", "MB", "GB", "TB"];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** A figure of any size with so many significant digits: 0.0312, 2.00e-4, 1,234. */
export function number(value, digits = 4) {
  if (!isNumber(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(digits - 2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** A whole number with separators. */
export function count(value) {
  return isNumber(value) ? Math.round(value).toLocaleString("en") : UNKNOWN;
}

/** A share of one as a percentage. */
export function percent(share, digits = 1) {
  return isNumber(share) ? `${(100 * share).toFixed(digits)}%` : UNKNOWN;
}

/** Bytes in decimal units, as disks and the terminal show them. */
export function bytes(value) {
  if (!isNumber(value)) return UNKNOWN;
  let unit = 0;
  while (value >= 1000 && unit < BYTES.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${BYTES[unit]}`;
}

/** Seconds as 4.2 s, 3 min 20 s, 2 h 05 min, 3 d 4 h. */
export function duration(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  let left = Math.round(seconds);
  if (left < 60) return `${left} s`;
  if (left < 3600) return `${Math.floor(left / 60)} min ${left % 60} s`;
  left = Math.round(left / 60);
  if (left < 24 * 60) return `${Math.floor(left / 60)} h ${String(left % 60).padStart(2, "0")} min`;
  left = Math.round(left / 60);
  return `${Math.floor(left / 24)} d ${left % 24} h`;
}

/** Seconds since the epoch as the reader's wall clock; with the day if it is another one. */
export function clock(seconds, hasSeconds = true) {
  if (!isNumber(seconds)) return UNKNOWN;
  const moment = new Date(1000 * seconds);
  const time = moment.toLocaleTimeString("en-GB", hasSeconds ? {} : { timeStyle: "short" });
  if (moment.toDateString() === new Date().toDateString()) return time;
  return `${moment.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** A key as words: `eval_every_steps` -> `eval every steps`; the unit goes with the figure. */
export function label(key) {
  return key.replace(/_seconds$/, "_time").replace(/_(bytes|celsius|watts|percent)$/, "").replaceAll("_", " ");
}

/** Any JSON value as a reader wants it; the key's ending names the unit. */
export function value(key, given) {
  if (given === null || given === undefined || given === "") return UNKNOWN;
  if (typeof given === "boolean") return given ? "yes" : "no";
  if (typeof given === "number") {
    if (key.endsWith("_bytes")) return bytes(given);
    if (key.endsWith("seconds")) return duration(given);
    if (key.endsWith("_percent")) return percent(given / 100, 0);
    if (key.endsWith("_celsius")) return `${Math.round(given)} °C`;
    if (key.endsWith("_watts")) return `${Math.round(given)} W`;
    return Number.isInteger(given) ? count(given) : number(given);
  }
  if (Array.isArray(given)) return given.map((item) => value(key, item)).join(", ") || "none";
  return typeof given === "object" ? JSON.stringify(given) : String(given);
}
