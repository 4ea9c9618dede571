// Pools: a cell for every VM that should wait; they fill and drain as it happens.

import { askJson } from "./api.js";
import { spark } from "./chart.js";
import { byId, el, reconcile, setText, toast } from "./dom.js";

// More cells than this say less than a bar.
const MOST_CELLS = 64;
const MAX_TARGET = 1000;

async function resize(template, target) {
  try {
    await askJson("PUT", `/v1/pools/${encodeURIComponent(template)}`, { body: { target } });
  } catch (error) {
    toast(`Pool ${template}: ${error.message}`);
  }
}

function make(pool) {
  const { template } = pool;
  // The target at the time of the click, not of the making.
  const by = (step) => () => {
    const target = Number(card.dataset.target) + step;
    if (target >= 0 && target <= MAX_TARGET) resize(template, target);
  };
  const card = el("article", { class: "pool", "aria-label": `Pool ${template}` },
    el("div", { class: "pool-head" },
      el("h3", { class: "mono" }, template),
      el("p", { class: "pool-ready" }, el("strong", { class: "ready-now" }), el("span", { class: "muted target-now" })),
      el("div", { class: "stepper" },
        el("button", { type: "button", "aria-label": `One VM less in pool ${template}`, onclick: by(-1) }, "−"),
        el("button", { type: "button", "aria-label": `One VM more in pool ${template}`, onclick: by(1) }, "+"))),
    el("div", { class: "cells", role: "img" }),
    el("div", { class: "pool-foot" }, el("p", { class: "muted small numbers" }), el("div", { class: "pool-line" })));
  return card;
}

function cells(pool) {
  const shown = Math.min(Math.max(pool.target, pool.ready + pool.restoring), MOST_CELLS);
  const scale = Math.max(pool.target, pool.ready + pool.restoring) / Math.max(shown, 1);
  const ready = Math.round(pool.ready / scale);
  const thawing = Math.round((pool.ready + pool.restoring) / scale);
  return Array.from({ length: shown }, (_, i) => (i < ready ? "cell ready" : i < thawing ? "cell thawing" : "cell"));
}

function update(card, pool, points) {
  const find = (selector) => card.querySelector(selector);
  card.dataset.target = pool.target;
  card.dataset.ready = pool.ready;
  setText(find(".ready-now"), String(pool.ready));
  setText(find(".target-now"), ` of ${pool.target} parked`);
  const box = find(".cells");
  const wanted = cells(pool);
  while (box.children.length > wanted.length) box.lastElementChild.remove();
  wanted.forEach((kind, i) => {
    const cell = box.children[i] ?? box.appendChild(el("span", {}));
    // Set only on a change, or the animation would start over.
    if (cell.className !== kind) cell.className = kind;
  });
  box.setAttribute("aria-label", `${pool.ready} parked, ${pool.restoring} being restored, ${pool.target} wanted`);
  setText(find(".numbers"), `${pool.claimed} claimed · ${pool.restoring} restoring · ${pool.misses_total} ${pool.misses_total === 1 ? "miss" : "misses"}`);
  const seen = points.slice(-150).map((point) => point.pools[pool.template]?.low ?? null);
  find(".pool-line").replaceChildren(spark(seen, { kind: "c-ice", step: true, max: pool.target }));
}

export function render({ pools, history }) {
  reconcile(byId("pools"), pools, (pool) => pool.template, make, (card, pool) => update(card, pool, history.points));
}
