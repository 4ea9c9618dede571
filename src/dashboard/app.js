// The way in: the key, the feed, and the parts of the page that show what it says.

import * as api from "./api.js";
import { byId, setText } from "./dom.js";
import { follow } from "./feed.js";
import { span } from "./format.js";
import * as log from "./log.js";
import * as pools from "./pools.js";
import * as sandboxes from "./sandboxes.js";
import * as templates from "./templates.js";
import * as vitals from "./vitals.js";

const root = document.documentElement;
// All that the feed has told, in its own form.
let state = null;
// How far this machine's clock is behind the service's.
let skew = 0;
let connection = null;
let painting = false;

const now = () => Date.now() + skew;

function paint() {
  if (painting) return;
  painting = true;
  // Events come in bunches; one picture shows them all.
  requestAnimationFrame(() => {
    painting = false;
    if (state === null) return;
    vitals.render(state);
    pools.render(state);
    templates.render(state);
    tick();
  });
}

// What moves on although nothing happened.
function tick() {
  if (state === null) return;
  sandboxes.render(state, now());
  setText(byId("about-uptime"), span((now() - Date.parse(state.service.started_at)) / 1000));
}

const on = {
  event(name, data) {
    if (name === "snapshot") {
      state = data;
      skew = Date.parse(data.service.now) - Date.now();
      setText(byId("about-vmm"), data.service.vmm);
      setText(byId("about-version"), data.service.version);
    } else if (state === null) {
      return;
    } else if (name === "point") {
      const { points, capacity } = state.history;
      points.push(data);
      if (points.length > capacity) points.shift();
      skew = Date.parse(data.at) - Date.now();
    } else if (name in state) {
      state[name] = data;
    }
    paint();
  },
  state(link) {
    show(link);
  },
};

function show(link) {
  const words = { closed: "Not connected", opening: "Connecting", live: "Live", lost: "Connection lost, trying again" };
  byId("link").dataset.state = link;
  setText(byId("link-text"), words[link]);
  byId("board").classList.toggle("stale", link === "lost");
  if (link === "live") {
    byId("gate").hidden = true;
    byId("board").hidden = false;
    byId("about").hidden = false;
  }
}

function gate(message = "") {
  connection?.abort();
  log.stop();
  state = null;
  byId("board").hidden = true;
  byId("about").hidden = true;
  byId("forget").hidden = true;
  byId("gate").hidden = false;
  byId("gate-error").textContent = message;
  show("closed");
  byId("key").focus();
}

async function connect() {
  connection?.abort();
  connection = new AbortController();
  const { signal } = connection;
  show("opening");
  byId("forget").hidden = root.dataset.key === "none";
  try {
    await follow(on, signal);
  } catch (error) {
    if (signal.aborted) return;
    api.forget();
    gate(error.status === 401 ? "That is not this service's key." : error.message);
  }
}

function themes() {
  const order = ["auto", "light", "dark"];
  const words = { auto: ["Auto", "as the system"], light: ["Light", "light"], dark: ["Dark", "dark"] };
  const apply = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    setText(byId("theme-text"), words[theme][0]);
    byId("theme").setAttribute("aria-label", `Colours: ${words[theme][1]}`);
  };
  let theme = root.dataset.theme ?? "auto";
  apply(theme);
  byId("theme").addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    apply(theme);
    try {
      localStorage.setItem("rethaw-theme", theme);
    } catch {
      // It holds until the page is left.
    }
  });
}

themes();
sandboxes.start();
byId("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!key) return;
  byId("key").value = "";
  // A header takes nothing else.
  if (!/^[\x21-\x7e]+$/.test(key)) {
    byId("gate-error").textContent = "A key has only letters, digits and signs of ASCII, without spaces.";
    return;
  }
  byId("gate-error").textContent = "";
  api.remember(key);
  connect();
});
byId("forget").addEventListener("click", () => {
  api.forget();
  gate();
});
document.addEventListener("template-chosen", paint);
setInterval(tick, 1000);
if (api.load() || root.dataset.key === "none") connect();
else gate();
