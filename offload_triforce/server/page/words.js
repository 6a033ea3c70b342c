// Figures as people read them. All sizes are decimal, as the rest of the program says them.

const whole = new Intl.NumberFormat("en");

/** 12,345 */
export const count = (value) => whole.format(Math.round(value));

/** A number with at most so many digits behind the point. */
export const number = (value, digits = 1) => value.toLocaleString("en", { maximumFractionDigits: digits });

/** Bytes: "17.2 GB". */
export function bytes(value) {
  if (value >= 1e9) return `${number(value / 1e9)} GB`;
  if (value >= 1e6) return `${number(value / 1e6)} MB`;
  return `${number(value / 1e3)} kB`;
}

/** A share: "87 %"; "none yet" where nothing has been counted. */
export const share = (value) => (value === null || value === undefined ? "none yet" : `${number(100 * value, 0)} %`);

/** Seconds as "about 2 min 5 s". */
export function about(seconds) {
  const left = Math.max(1, Math.ceil(seconds));
  if (left < 60) return `about ${left} s`;
  if (left < 3600) return `about ${Math.floor(left / 60)} min ${left % 60} s`;
  return `about ${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`;
}
