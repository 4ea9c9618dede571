// Before the first paint: the colours chosen in this browser, if any; the system's otherwise.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("rethaw-theme");
  } catch {
    // Storage is switched off: the system's colours it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
