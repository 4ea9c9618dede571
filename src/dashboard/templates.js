// Templates: what stands on what, with sizes, and the log of the build that is chosen.

import { byId, el, reconcile, setText } from "./dom.js";
import { bytes, mebibytes } from "./format.js";
import * as log from "./log.js";

let chosen = null;

// Each template with its depth, parents before children.
function tree(templates) {
  const bySnapshot = new Map(templates.filter((t) => t.snapshot).map((t) => [t.snapshot.id, t.name]));
  const parentOf = (template) => template.from ?? bySnapshot.get(template.snapshot?.parent) ?? null;
  const names = new Set(templates.map((template) => template.name));
  const children = new Map();
  for (const template of templates) {
    const parent = parentOf(template);
    const under = parent !== template.name && names.has(parent) ? parent : null;
    children.set(under, [...(children.get(under) ?? []), template]);
  }
  const rows = [];
  const walk = (parent, depth) => {
    for (const template of children.get(parent) ?? []) {
      rows.push({ template, depth });
      walk(template.name, depth + 1);
    }
  };
  walk(null, 0);
  return rows;
}

function make({ template }) {
  return el("li", {},
    el("button", { type: "button", class: "tree-row", onclick: () => {
      chosen = template.name;
      document.dispatchEvent(new Event("template-chosen"));
    } },
      el("span", { class: "tree-name" }, el("span", { class: "twig", "aria-hidden": "true" }), el("span", { class: "mono name" }, template.name), el("span", { class: "pill state" })),
      el("span", { class: "tree-size" }, el("b", { class: "real" }), el("span", { class: "muted apparent" })),
      el("span", { class: "size-bar", "aria-hidden": "true" }, el("span", { class: "size-fill" })),
      el("span", { class: "tree-note muted small" })));
}

function update(row, { template, depth }, largest) {
  const { snapshot } = template;
  const put = (selector, text) => setText(row.querySelector(selector), text);
  row.dataset.depth = Math.min(depth, 6);
  row.querySelector(".tree-row").setAttribute("aria-pressed", String(template.name === chosen));
  put(".state", template.state);
  row.querySelector(".state").dataset.is = template.state;
  put(".real", snapshot ? bytes(snapshot.allocated_bytes) : "–");
  put(".apparent", snapshot ? ` of ${bytes(snapshot.bytes)}` : "");
  row.querySelector(".size-fill").style.width = snapshot ? `${Math.max(1, (snapshot.allocated_bytes / largest) * 100)}%` : "0";
  const machine = snapshot ? `${snapshot.vcpus} vCPU · ${mebibytes(snapshot.memory_bytes)} memory` : "";
  put(".tree-note", template.error ?? (template.state === "ready" ? machine : template.message));
}

export function render({ templates }) {
  const rows = tree(templates);
  if (!templates.some((template) => template.name === chosen)) {
    // What is being built is what one wants to see.
    chosen = (templates.find((t) => t.state !== "ready" && t.state !== "failed") ?? templates[0])?.name ?? null;
  }
  const largest = Math.max(...templates.map((t) => t.snapshot?.allocated_bytes ?? 0), 1);
  reconcile(byId("templates"), rows, ({ template }) => template.name, make, (row, entry) => update(row, entry, largest));
  const total = templates.reduce((all, t) => all + (t.snapshot?.allocated_bytes ?? 0), 0);
  setText(byId("templates-note"), `${bytes(total)} on disk`);
  log.show(templates.find((template) => template.name === chosen));
}
