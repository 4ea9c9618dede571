// Numbers and times as people read them.

export function millis(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 10) return `${ms.toFixed(2)} ms`;
  if (ms < 100) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${ms.toFixed(0)} ms`;
  return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (count >= 999.5 && unit + 1 < units.length) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toFixed(unit > 0 && count < 99.95 ? 1 : 0)} ${units[unit]}`;
}

export function count(n) {
  if (n === null || n === undefined) return "–";
  if (n < 10_000) return Math.round(n).toLocaleString("en");
  if (n < 999_950) return `${(n / 1000).toFixed(1)}k`;
  return `${(n / 1e6).toFixed(1)}M`;
}

// A mark on an axis, which is a round number.
export function millisMark(ms) {
  return ms < 1000 ? `${Number(ms.toPrecision(3))} ms` : `${Number((ms / 1000).toPrecision(3))} s`;
}

export const mebibytes = (count) => `${Math.round(count / (1 << 20))} MiB`;

// Nothing is called 100 % that is not.
export function percent(part) {
  const digits = part > 0.99 && part < 1 ? 1 : 0;
  const factor = 10 ** digits;
  return `${(Math.floor(part * 100 * factor) / factor).toFixed(digits)} %`;
}

// `42s`, `7m45s`, `3h12m`, `2d4h`.
export function span(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${s % 60}s`;
  if (s < 86_400) return `${Math.floor(s / 3600)}h${Math.floor((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86_400)}d${Math.floor((s % 86_400) / 3600)}h`;
}

export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
