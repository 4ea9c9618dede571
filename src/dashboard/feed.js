// The live feed. EventSource cannot send the key, so the stream is read by hand.

import { ask, lines } from "./api.js";

const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 10_000;
// The service sends a point every two seconds; silence means that the connection is gone.
const SILENCE = 15_000;

// Calls `on.event(name, data)` for every event and `on.state("live" | "lost")`; starts over after a
// break. Ends, by throwing, when the service refuses.
export async function follow(on, signal) {
  let pause = FIRST_PAUSE;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    signal.addEventListener("abort", stop);
    let watchdog = setTimeout(stop, SILENCE);
    try {
      const reply = await ask("GET", "/v1/events", { signal: attempt.signal });
      let name = "message";
      for await (const line of lines(reply)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(stop, SILENCE);
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) {
          on.event(name, JSON.parse(line.slice(6)));
          if (name === "snapshot") {
            on.state("live");
            pause = FIRST_PAUSE;
          }
        }
      }
    } catch (error) {
      // A busy service says 429 or 503 and means later; anything else it means.
      if (error.status && error.status !== 429 && error.status < 500) throw error;
    } finally {
      clearTimeout(watchdog);
      signal.removeEventListener("abort", stop);
      attempt.abort();
    }
    if (signal.aborted) return;
    on.state("lost");
    await new Promise((done) => { setTimeout(done, pause); });
    pause = Math.min(pause * 2, LONGEST_PAUSE);
  }
}
