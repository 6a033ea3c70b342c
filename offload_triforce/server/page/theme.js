// Light, dark, or what the system says. `early.js` sets it before the first paint.
import { keep } from "./store.js";

const ORDER = ["system", "light", "dark"];

/** Let a button go through the themes. */
export function startTheme(button) {
  const root = document.documentElement;
  let now = root.dataset.theme ?? "system";
  const show = () => {
    if (now === "system") delete root.dataset.theme;
    else root.dataset.theme = now;
    button.textContent = { system: "System", light: "Light", dark: "Dark" }[now];
    button.setAttribute("aria-label", `Theme: ${now}`);
    button.title = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = ORDER[(ORDER.indexOf(now) + 1) % ORDER.length];
    keep("theme", now);
    show();
  });
  show();
}
