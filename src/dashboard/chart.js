// Lines over time, drawn as SVG: read with the eye, the pointer, or the arrow keys.

import { el, svg } from "./dom.js";
import { clock } from "./format.js";

const MARGIN = { left: 58, right: 14, top: 10, bottom: 24 };
// What is shown: the shortest of these that has everything. Seconds, and between two marks.
const SPANS = [[120, 30], [300, 60], [600, 120]];
// Neighbours further apart than this are not joined.
const GAP_MS = 30_000;
let charts = 0;

function niceSteps(max) {
  const raw = max / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((n) => n * power >= raw) * power;
  const ticks = [];
  for (let value = 0; ; value += step) {
    ticks.push(value);
    if (value >= max) return ticks;
  }
}

function decades(min, max) {
  const ticks = [];
  const from = Math.floor(Math.log10(min));
  const to = Math.ceil(Math.log10(max));
  const inner = to - from <= 2 ? [1, 2, 5] : to - from <= 3 ? [1, 3] : [1];
  for (let exponent = from; exponent <= to; exponent += 1) {
    ticks.push(...inner.map((n) => n * 10 ** exponent));
  }
  const first = ticks.findLastIndex((tick) => tick <= min);
  const last = ticks.findIndex((tick) => tick >= max);
  return ticks.slice(Math.max(first, 0), last < 0 ? undefined : Math.max(last, first + 1) + 1);
}

export class Chart {
  // `series`: [{name, class, area?}]; `format`: a value as text; `mark`: the same on the axis; `log`:
  // logarithmic.
  constructor(host, { label, series, format, mark = format, log = false, least = 1 }) {
    Object.assign(this, { label, series, format, mark, log, least });
    this.id = `chart-${charts += 1}`;
    this.rows = [];
    this.at = null;
    this.figure = svg("svg", { role: "img", tabindex: "0", class: "plot" });
    this.tip = el("div", { class: "tip", role: "status", hidden: true });
    this.legend = el("ul", { class: "legend" });
    host.append(this.legend, el("div", { class: "plot-box" }, this.figure, this.tip));
    this.values = series.map((one) => {
      const value = el("b", {}, "–");
      this.legend.append(el("li", {}, el("i", { class: `swatch ${one.class}`, "aria-hidden": "true" }), `${one.name} `, value));
      return value;
    });
    new ResizeObserver(() => this.render()).observe(this.figure);
    this.figure.addEventListener("pointermove", (event) => this.point(event));
    this.figure.addEventListener("pointerleave", () => this.choose(null));
    this.figure.addEventListener("blur", () => this.choose(null));
    this.figure.addEventListener("keydown", (event) => this.key(event));
  }

  // `rows`: [{t, values}], oldest first; a value may be null.
  draw(rows, now) {
    const chosen = this.at === null ? null : this.rows[this.at]?.t;
    this.rows = rows;
    this.now = now;
    const age = rows.length > 0 ? (now - rows[0].t) / 1000 : 0;
    const [span, step] = SPANS.find(([seconds]) => seconds >= age) ?? SPANS.at(-1);
    Object.assign(this, { spanMs: span * 1000, step });
    // What was chosen stays chosen while the ground moves under it.
    const at = chosen === null ? -1 : rows.findIndex((row) => row.t === chosen);
    this.at = at < 0 ? null : at;
    this.render();
  }

  latest(index) {
    for (let i = this.rows.length - 1; i >= 0; i -= 1) {
      const value = this.rows[i].values[index];
      if (value !== null) return value;
    }
    return null;
  }

  scale() {
    const values = this.rows.flatMap((row) => row.values).filter((value) => value !== null && (!this.log || value > 0));
    const max = Math.max(this.least, ...values);
    if (!this.log) return { ticks: niceSteps(max), place: (value, top) => value / top };
    const ticks = decades(Math.min(this.least, ...values), max);
    const low = Math.log(ticks[0]);
    return { ticks, place: (value, top) => (Math.log(Math.max(value, ticks[0])) - low) / (Math.log(top) - low) };
  }

  render() {
    const { width, height } = this.figure.getBoundingClientRect();
    if (width < 50 || height < 50 || this.now === undefined) return;
    const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    const { ticks, place } = this.scale();
    const top = ticks.at(-1);
    this.x = (t) => MARGIN.left + inner.w * (1 - (this.now - t) / this.spanMs);
    this.y = (value) => MARGIN.top + inner.h * (1 - place(value, top));
    const parts = ticks.map((tick) => {
      const y = Math.round(this.y(tick)) + 0.5;
      return svg("g", { class: "grid" },
        svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, this.mark(tick)));
    });
    // A narrow chart has room for the ends and the middle.
    const span = this.spanMs / 1000;
    const step = inner.w > 420 ? this.step : span / 2;
    for (let seconds = span; seconds >= 0; seconds -= step) {
      const x = this.x(this.now - seconds * 1000);
      const anchor = seconds === 0 ? "end" : seconds === span ? "start" : "middle";
      const text = seconds === 0 ? "now" : seconds % 60 ? `−${seconds} s` : `−${seconds / 60} min`;
      parts.push(svg("text", { x, y: height - 5, class: "when", "text-anchor": anchor }, text));
    }
    // The first series is drawn last, over the others.
    for (let i = this.series.length - 1; i >= 0; i -= 1) parts.push(...this.line(this.series[i], i));
    this.cursor = svg("g", { class: "cursor" });
    this.figure.replaceChildren(...parts, this.cursor);
    this.figure.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const words = this.series.map((one, index) => {
      const value = this.latest(index);
      const text = value === null ? "–" : this.format(value);
      this.values[index].textContent = text;
      return `${one.name} ${value === null ? "none" : text}`;
    });
    this.figure.setAttribute("aria-label", `${this.label}. Last: ${words.join(", ")}. Arrow keys move through time.`);
    this.trace();
  }

  line(one, index) {
    const runs = [];
    let before = null;
    for (const row of this.rows) {
      const value = row.values[index];
      if (value === null || row.t < this.now - this.spanMs) continue;
      if (before === null || row.t - before > GAP_MS) runs.push([]);
      runs.at(-1).push([this.x(row.t), this.y(value)]);
      before = row.t;
    }
    const made = [];
    for (const run of runs) {
      const path = run.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
      if (one.area) {
        const floor = this.y(0);
        made.push(svg("path", { class: `area ${one.class}`, d: `${path}L${run.at(-1)[0].toFixed(1)} ${floor}L${run[0][0].toFixed(1)} ${floor}Z` }));
      }
      made.push(svg("path", { class: `line ${one.class}`, d: path }));
      // A few values are shown as what they are; a lone one would be invisible.
      if (run.length === 1 || (run.length < 40 && !one.area)) {
        made.push(...run.map(([x, y]) => svg("circle", { class: `dot ${one.class}`, cx: x, cy: y, r: 2.2 })));
      }
    }
    return made;
  }

  point(event) {
    if (!this.x || this.rows.length === 0) return;
    const x = event.clientX - this.figure.getBoundingClientRect().left;
    const distance = (row) => Math.abs(this.x(row.t) - x);
    let best = 0;
    this.rows.forEach((row, i) => { if (distance(row) < distance(this.rows[best])) best = i; });
    this.choose(best);
  }

  key(event) {
    const last = this.rows.length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -15, PageDown: 15, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") this.choose(null);
    else if (event.key in steps && last >= 0) {
      event.preventDefault();
      const from = this.at ?? (steps[event.key] < 0 ? last + 1 : last);
      this.choose(Math.min(Math.max(from + steps[event.key], 0), last));
    }
  }

  choose(at) {
    this.at = at;
    this.trace();
  }

  trace() {
    const row = this.at === null ? undefined : this.rows[this.at];
    this.tip.hidden = row === undefined;
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    if (row === undefined) return;
    const x = this.x(row.t);
    const { width, height } = this.figure.getBoundingClientRect();
    this.cursor.append(svg("line", { x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom }));
    row.values.forEach((value, i) => {
      if (value !== null) this.cursor.append(svg("circle", { class: `dot ${this.series[i].class}`, cx: x, cy: this.y(value), r: 3.5 }));
    });
    this.tip.replaceChildren(el("div", { class: "tip-time" }, clock(row.t)), ...this.series.map((one, i) =>
      el("div", {}, el("i", { class: `swatch ${one.class}`, "aria-hidden": "true" }), `${one.name} `, el("b", {}, row.values[i] === null ? "–" : this.format(row.values[i])))));
    const left = x > width / 2 ? x - this.tip.offsetWidth - 12 : x + 12;
    this.tip.style.transform = `translate(${Math.max(0, left)}px, 6px)`;
  }
}

// A line without axes; `values` may hold nulls, which are skipped.
export function spark(values, { kind = "", step = false, max } = {}) {
  const width = 120;
  const height = 30;
  const top = Math.max(max ?? 0, ...values.filter((value) => value !== null), 1e-9);
  const x = (i) => (values.length < 2 ? width : (i / (values.length - 1)) * width);
  const y = (value) => height - 2 - (value / top) * (height - 4);
  let path = "";
  let before = null;
  values.forEach((value, i) => {
    if (value === null) return;
    if (step && before !== null) path += `H${x(i).toFixed(1)}`;
    path += `${before === null ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    before = value;
  });
  const line = svg("path", { d: path, class: "line", "vector-effect": "non-scaling-stroke" });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: `spark ${kind}`, "aria-hidden": "true" }, line);
}
