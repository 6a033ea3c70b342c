// Elements are built, never parsed: whatever a text holds, it stays text.

/**
 * An element with properties and children. Strings become text nodes; null and false are left out.
 * `properties`: "data-x", "aria-x", "role" and other names with a dash are set as attributes.
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.includes("-") || name === "role") made.setAttribute(name, String(value));
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG, by attributes. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

let clearing = 0;

/** Say something to everybody for some seconds: `role=alert` reads it out. */
export function notify(text) {
  const box = byId("notices");
  const line = element("p", { className: "notice" }, text);
  box.replaceChildren(line);
  clearTimeout(clearing);
  clearing = setTimeout(() => line.remove(), 9000);
}

/** Tell screen readers alone. */
export function announce(text) {
  byId("status").textContent = text;
}
