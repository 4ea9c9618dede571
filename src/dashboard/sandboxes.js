// Live sandboxes: the table, and one of them in full.

import { askJson } from "./api.js";
import { byId, el, reconcile, setText, toast } from "./dom.js";
import { clock, count, millis, span } from "./format.js";

// Phases in the order in which they happen; those inside another one are not bars of their own.
const PHASES = ["disk", "spawn", "load", "resume", "agent", "identity", "claim", "revive", "freeze", "memory", "scratch", "publish"];

let shown = null;
let asked = 0;

function make(sandbox) {
  const cell = (kind, ...children) => el("td", { class: kind }, ...children);
  const pill = (kind) => el("span", { class: `pill ${kind}` });
  const name = el("button", { type: "button", class: "link-button", onclick: () => open(sandbox.id) },
    el("span", { class: "mono id" }, sandbox.id), el("span", { class: "name muted" }));
  return el("tr", {}, el("th", { scope: "row" }, name), cell("mono template"), cell("", pill("state")), cell("", pill("origin")),
    cell("number took"), cell("number faults"), cell("number age"), cell("number left"));
}

function update(row, sandbox, now) {
  const put = (selector, text) => setText(row.querySelector(selector), text);
  put(".name", sandbox.name ?? "");
  put(".template", sandbox.template);
  put(".state", sandbox.state);
  row.querySelector(".state").dataset.is = sandbox.state;
  put(".origin", sandbox.origin);
  row.querySelector(".origin").dataset.is = sandbox.origin;
  put(".took", millis(sandbox.total_ms));
  put(".faults", count(sandbox.page_faults));
  put(".age", span((now - Date.parse(sandbox.created_at)) / 1000));
  put(".left", sandbox.state === "paused" ? "–" : span((Date.parse(sandbox.expires_at) - now) / 1000));
}

export function render({ sandboxes }, now) {
  reconcile(byId("sandboxes"), sandboxes.items, (s) => s.id, make, (row, s) => update(row, s, now));
  setText(byId("sandboxes-count"), String(sandboxes.total));
  byId("sandboxes-empty").hidden = sandboxes.total > 0;
  byId("sandboxes-empty").parentElement.querySelector("table").hidden = sandboxes.total === 0;
  const more = sandboxes.total - sandboxes.items.length;
  const states = Object.entries(sandboxes.by_state).map(([state, n]) => `${n} ${state}`);
  setText(byId("sandboxes-note"), states.join(" · ") + (more > 0 ? ` · the newest ${sandboxes.items.length} are shown` : ""));
  follow(sandboxes.items);
}

// Keeps the open dialog in step with the feed.
function follow(items) {
  if (shown === null) return;
  const now = items.find((sandbox) => sandbox.id === shown.id);
  if (!now) byId("detail").close();
  // What is being deleted may not be there any more when it is asked for.
  else if (now.state !== shown.state && now.state !== "deleting") load(shown.id);
}

function open(id) {
  byId("detail-body").replaceChildren();
  byId("detail-actions").replaceChildren();
  setText(byId("detail-title"), id);
  shown = { id, state: null };
  byId("detail").showModal();
  load(id);
}

async function load(id) {
  const turn = asked += 1;
  try {
    const sandbox = await askJson("GET", `/v1/sandboxes/${id}`);
    // Another one was opened meanwhile, or none.
    if (turn !== asked || shown?.id !== id) return;
    shown = sandbox;
    byId("detail-body").replaceChildren(...body(sandbox));
    byId("detail-actions").replaceChildren(...actions(sandbox));
  } catch (error) {
    toast(error.message);
  }
}

function facts(entries) {
  return el("dl", { class: "facts" }, entries.filter(([, value]) => value).map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", { class: "mono" }, value))));
}

function body(sandbox) {
  const { identity, timings_ms: timings } = sandbox;
  const bars = PHASES.filter((phase) => timings[phase] !== undefined);
  const longest = Math.max(...bars.map((phase) => timings[phase]), 0.001);
  const metadata = Object.entries(sandbox.metadata);
  return [
    facts([
      ["Template", sandbox.template], ["State", sandbox.state], ["Origin", sandbox.origin], ["VMM", sandbox.vmm],
      ["Created", clock(sandbox.created_at)], ["Expires", `${clock(sandbox.expires_at)}, then ${sandbox.on_timeout}`],
      ["Host name", identity.hostname], ["Machine id", identity.machine_id], ["MAC", identity.mac],
      ["Boot id", identity.boot_id], ["Generation", identity.generation],
    ]),
    metadata.length > 0 && el("h3", {}, "Metadata"),
    metadata.length > 0 && facts(metadata),
    el("h3", {}, `Where the time went${timings.total === undefined ? "" : `: ${millis(timings.total)}`}`),
    el("ul", { class: "phases" }, bars.map((phase) => {
      const bar = el("span", { class: "phase-fill" });
      bar.style.width = `${Math.max(1, (timings[phase] / longest) * 100)}%`;
      return el("li", {}, el("span", {}, phase), el("span", { class: "phase-bar", "aria-hidden": "true" }, bar), el("b", {}, millis(timings[phase])));
    })),
    el("h3", {}, "Identity, as read back from the guest"),
    el("ul", { class: "items" }, identity.items.map((item) =>
      el("li", { class: item.verified ? "ok" : "bad" }, el("span", { class: "tick", "aria-hidden": "true" }, item.verified ? "✓" : "✗"), item.item, el("span", { class: "visually-hidden" }, item.verified ? " verified" : " not verified")))),
  ].filter(Boolean);
}

function actions(sandbox) {
  const path = `/v1/sandboxes/${sandbox.id}`;
  const act = (label, method, to, kind = "") => el("button", {
    type: "button",
    class: kind,
    onclick: async (event) => {
      const button = event.currentTarget;
      // Nothing is destroyed at one press.
      if (kind === "danger" && !button.dataset.sure) {
        button.dataset.sure = "yes";
        button.textContent = "Really delete?";
        return;
      }
      button.disabled = true;
      try {
        await askJson(method, path + to, method === "POST" ? { body: {} } : {});
      } catch (error) {
        button.disabled = false;
        toast(`${label}: ${error.message}`);
      }
    },
  }, label);
  const made = [];
  if (sandbox.state === "running") made.push(act("Pause", "POST", "/pause"));
  if (sandbox.state === "paused") made.push(act("Resume", "POST", "/resume"));
  if (sandbox.state === "running" || sandbox.state === "paused") made.push(act("Delete", "DELETE", "", "danger"));
  return made;
}

export function start() {
  byId("detail-close").addEventListener("click", () => byId("detail").close());
  // The event comes a moment later: by then the dialog may be open again, for another one.
  byId("detail").addEventListener("close", () => { if (!byId("detail").open) shown = null; });
}
