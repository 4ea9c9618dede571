// The row of numbers, the two charts, and the host.

import { Chart, spark } from "./chart.js";
import { byId, el, setText } from "./dom.js";
import { bytes, count, millis, millisMark, percent } from "./format.js";

const TILES = [
  ["claim", "Warm claim, median"],
  ["restore", "Restore, median"],
  ["hits", "Claims served warm"],
  ["parked", "Parked VMs"],
  ["running", "Running sandboxes"],
  ["faults", "Page faults per second"],
];

const tiles = new Map();
const meters = new Map();
let latency;
let faults;

function build() {
  for (const [id, title] of TILES) {
    const value = el("strong", {}, "–");
    const note = el("span", { class: "note" });
    const line = el("div", { class: "tile-line" });
    byId("tiles").append(el("div", { class: `tile tile-${id}`, id: `tile-${id}` }, el("h3", {}, title), value, note, line));
    tiles.set(id, { value, note, line });
  }
  for (const [id, title] of [["cpu", "CPU"], ["memory", "Memory"], ["disk", "Disk"]]) {
    const bar = el("div", { class: "meter-fill" });
    const text = el("span", { class: "meter-text" });
    const box = el("div", { class: "meter-bar", role: "meter", "aria-label": title, "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
    const line = el("div", { class: "meter-line" });
    byId("host").append(el("div", { class: "meter" }, el("span", { class: "meter-name" }, title), box, text, line));
    meters.set(id, { bar, box, text, line });
  }
  latency = new Chart(byId("latency-chart"), {
    label: "Latency of claims and restores",
    series: [
      { name: "claim p50", class: "c-claim" },
      { name: "claim p99", class: "c-claim-high" },
      { name: "cold claim p50", class: "c-cold" },
      { name: "cold claim p99", class: "c-cold-high" },
      { name: "restore p50", class: "c-restore" },
      { name: "restore p99", class: "c-restore-high" },
    ],
    format: millis,
    mark: millisMark,
    log: true,
    least: 1,
  });
  faults = new Chart(byId("faults-chart"), {
    label: "Page faults per second",
    series: [{ name: "faults/s", class: "c-faults", area: true }],
    format: count,
    least: 100,
  });
}

function show(id, value, note, values, options) {
  const tile = tiles.get(id);
  setText(tile.value, value);
  setText(tile.note, note);
  tile.line.replaceChildren(spark(values.slice(-90), options));
}

function meter(id, part, text, parts) {
  const { bar, box, text: label, line } = meters.get(id);
  bar.style.width = `${Math.min(100, part * 100)}%`;
  box.dataset.level = part > 0.9 ? "high" : part > 0.75 ? "raised" : "fine";
  box.setAttribute("aria-valuenow", Math.round(part * 100));
  box.setAttribute("aria-valuetext", text);
  setText(label, text);
  line.replaceChildren(spark(parts, { kind: "c-ice", max: 1 }));
}

const sum = (items, pick) => items.reduce((all, item) => all + pick(item), 0);

export function render({ history, pools, sandboxes, page_server: pager, service }) {
  if (!latency) build();
  const { points } = history;
  const last = points.at(-1);
  const now = last ? Date.parse(last.at) : Date.parse(service.now);
  const newest = (pick) => points.findLast((point) => pick(point).count > 0);

  const warm = newest((p) => p.claims_warm)?.claims_warm;
  const warmCount = sum(points, (p) => p.claims_warm.count);
  const coldCount = sum(points, (p) => p.claims_cold.count);
  const several = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
  show("claim", millis(warm?.p50_ms), warm ? `p99 ${millis(warm.p99_ms)} · ${several(warmCount, "claim")}` : "none in 10 min", points.map((p) => p.claims_warm.p50_ms), { kind: "c-claim" });
  const restored = newest((p) => p.restores)?.restores;
  show("restore", millis(restored?.p50_ms), restored ? `p99 ${millis(restored.p99_ms)} · ${several(sum(points, (p) => p.restores.count), "restore")}` : "none in 10 min", points.map((p) => p.restores.p50_ms), { kind: "c-restore" });
  const claims = warmCount + coldCount;
  show("hits", claims ? percent(warmCount / claims) : "–", claims ? `${several(coldCount, "miss").replace("misss", "misses")} in 10 min` : "no claim in 10 min", points.map((p) => (p.claims_warm.count + p.claims_cold.count ? p.claims_warm.count / (p.claims_warm.count + p.claims_cold.count) : null)), { kind: "c-ok", max: 1 });
  const target = sum(pools, (pool) => pool.target);
  const restoring = sum(pools, (pool) => pool.restoring);
  show("parked", `${sum(pools, (pool) => pool.ready)} / ${target}`, restoring ? `${restoring} being restored` : "none being restored", points.map((p) => sum(Object.values(p.pools), (pool) => pool.low)), { kind: "c-ice", step: true, max: target });
  const paused = sandboxes.by_state.paused ?? 0;
  show("running", String(sandboxes.by_state.running ?? 0), paused ? `${paused} paused on disk` : "none paused", points.map((p) => p.sandboxes_running), { kind: "c-warm", step: true });
  const micros = points.findLast((p) => p.faults.p99_micros)?.faults.p99_micros;
  show("faults", count(last?.faults.per_second ?? 0), micros ? `99 % within ${micros < 1000 ? `${micros} µs` : millis(micros / 1000)}` : "none yet", points.map((p) => p.faults.per_second), { kind: "c-faults" });

  latency.draw(points.map((p) => ({
    t: Date.parse(p.at),
    values: [p.claims_warm, p.claims_cold, p.restores].flatMap((of) => [of.p50_ms, of.p99_ms]),
  })), now);
  faults.draw(points.map((p) => ({ t: Date.parse(p.at), values: [p.faults.per_second] })), now);
  const ratio = pager.working_set_hit_ratio;
  setText(byId("faults-note"), `${count(pager.faults_total)} in all · ${bytes(pager.copied_bytes_total)} copied${ratio === null ? "" : ` · ${percent(ratio)} foreseen`}`);

  if (last) {
    const { host } = last;
    meter("cpu", host.cpu_percent / 100, `${host.cpu_percent.toFixed(0)} % of ${service.cpus}`, points.map((p) => p.host.cpu_percent / 100));
    meter("memory", host.memory_used_bytes / host.memory_total_bytes, `${bytes(host.memory_used_bytes)} of ${bytes(host.memory_total_bytes)}`, points.map((p) => p.host.memory_used_bytes / p.host.memory_total_bytes));
    meter("disk", host.disk_used_bytes / host.disk_total_bytes, `${bytes(host.disk_used_bytes)} of ${bytes(host.disk_total_bytes)}`, points.map((p) => p.host.disk_used_bytes / p.host.disk_total_bytes));
    setText(byId("host-note"), `load ${host.load_1m.toFixed(2)} · ${pager.vms} VMs with the page server${pager.restarts_total ? ` · restarted ${pager.restarts_total}×` : ""}`);
  }
}
