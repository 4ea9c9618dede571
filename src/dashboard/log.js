// The log of one template's build, followed while it grows.

import { ask, lines } from "./api.js";
import { byId, el, setText } from "./dom.js";
import { millis } from "./format.js";

// Lines kept on the page.
const MOST = 2000;

let shown = "";
let reading = null;

function line({ kind, step, text }) {
  const kinds = { step: "step", stderr: "bad", state: "faded", end: "faded" };
  const label = kind === "step" ? `${step}  ${text}` : text;
  return el("div", { class: kinds[kind] }, label);
}

async function read(name, box, signal) {
  try {
    const reply = await ask("GET", `/v1/templates/${encodeURIComponent(name)}/log?follow=true`, { signal });
    for await (const text of lines(reply)) {
      // Whoever scrolled up is reading.
      const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
      box.append(line(JSON.parse(text)));
      if (box.children.length > MOST) box.firstElementChild.remove();
      if (atEnd) box.scrollTop = box.scrollHeight;
    }
    if (!box.hasChildNodes()) box.append(el("div", { class: "faded" }, "This build wrote no log."));
  } catch (error) {
    if (signal.aborted) return;
    // Tried again at the next change.
    shown = "";
    box.append(el("div", { class: "bad" }, error.message));
  }
}

function boot(template) {
  const times = template.snapshot?.boot_ms;
  const rows = [el("div", { class: "faded" }, `${template.name} is booted from its image; no steps were run.`)];
  for (const [name, ms] of Object.entries(times ?? {})) {
    if (typeof ms === "number") rows.push(el("div", {}, `${name.replace(/_ms$/, "").replaceAll("_", " ").padEnd(14)} ${millis(ms)}`));
  }
  if (template.state !== "ready") rows.push(el("div", { class: template.error ? "bad" : "" }, template.error ?? template.message));
  return rows;
}

export function show(template) {
  const box = byId("log");
  setText(byId("log-note"), template?.name ?? "");
  const built = template?.steps !== undefined;
  // A template that is built anew has another time.
  const key = template ? JSON.stringify([template.name, template.created_at, built || [template.state, template.message]]) : "";
  if (key === shown) return;
  shown = key;
  reading?.abort();
  reading = new AbortController();
  box.replaceChildren(...(template && !built ? boot(template) : []));
  if (built) read(template.name, box, reading.signal);
}

export function stop() {
  reading?.abort();
  shown = "";
}
