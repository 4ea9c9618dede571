// Requests to the service, and the key they carry. The key is kept for as long as the tab is open.

const SLOT = "rethaw-key";
let key = null;

export function load() {
  try {
    key = sessionStorage.getItem(SLOT);
  } catch {
    // Storage is switched off: the key lives in this page only.
  }
  return key;
}

export function remember(given) {
  key = given;
  try {
    sessionStorage.setItem(SLOT, given);
  } catch {
    // As above.
  }
}

export function forget() {
  key = null;
  try {
    sessionStorage.removeItem(SLOT);
  } catch {
    // As above.
  }
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// A request; a refusal is an error with the service's own words.
export async function ask(method, path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const text = body === undefined ? undefined : JSON.stringify(body);
  const reply = await fetch(path, { method, headers, body: text, signal, cache: "no-store" });
  if (reply.ok) return reply;
  const problem = await reply.json().catch(() => ({}));
  throw new Refused(reply.status, problem.message ?? `the service answered with status ${reply.status}`);
}

export async function askJson(method, path, options) {
  const reply = await ask(method, path, options);
  return reply.status === 204 ? null : reply.json();
}

// The lines of a streamed reply as they come.
export async function* lines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.map((line) => line.replace(/\r$/, ""));
  }
  if (rest) yield rest;
}
