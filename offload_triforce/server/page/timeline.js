// The last pass as a picture: what the link, the computation and the drafting did when.
import { element, svg } from "./dom.js";
import { bytes, number } from "./words.js";

// From the top down: track of the trace, what people read, class for the colour.
const TRACKS = [
  ["host to device", "copies to the card", "in"],
  ["compute", "attention over tiles", "compute"],
  ["draft step", "drafting", "draft"],
  ["device to host", "copies to the host", "out"],
];
const ROW = 22;
const WIDTH = 300;

/** `pass`: {ms, tracks: {name: {busy_ms, bytes, spans: [[start_ms, end_ms, share]]}}} or null. */
export function timeline(pass) {
  const rows = TRACKS.filter(([name]) => pass?.tracks[name]).map(([name, label, kind]) => ({ label, kind, ...pass.tracks[name] }));
  if (!rows.length) return element("p", { className: "quiet" }, "No pass has been recorded yet.");
  const scale = WIDTH / Math.max(pass.ms, 1e-6);
  const bars = rows.flatMap(({ kind, spans }, row) =>
    // Short things are thin and faint, as they would be without the merging: the picture shows no more than there was.
    spans.map(([start, end, share]) => {
      const place = { x: start * scale, y: row * ROW + 3, height: ROW - 6, width: (end - start) * scale };
      return svg("rect", { class: kind, opacity: share, ...place });
    }),
  );
  const told = rows.map(({ label, busy_ms: busy }) => `${label} ${number(busy)} ms`).join(", ");
  const height = rows.length * ROW;
  const about = { role: "img", "aria-label": `The last pass took ${number(pass.ms)} ms: ${told}` };
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", height, ...about }, ...bars);
  const keys = rows.map(({ label, kind, busy_ms: busy, bytes: moved }) => {
    const part = `${label}: ${number((100 * busy) / pass.ms, 0)} % of the time${moved ? `, ${bytes(moved)}` : ""}`;
    return element("li", {}, element("i", { className: kind }), part);
  });
  const axis = element("p", { className: "axis quiet" }, element("span", {}, "0"), element("span", {}, `${number(pass.ms)} ms`));
  return element("div", { className: "timeline" }, picture, axis, element("ul", { "aria-hidden": "true" }, ...keys));
}
