// Before anything is painted: the chosen theme, else the page would flash in the other one. Not a module, which would wait.
"use strict";
try {
  const chosen = localStorage.getItem("offload-triforce.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is forbidden: the system's own theme then.
}
