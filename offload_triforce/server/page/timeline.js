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

/** `pass`: {ms, spans: [[track, start_ms, end_ms, bytes]]} or null. */
export function timeline(pass) {
  if (!pass || !pass.spans.length) return element("p", { className: "quiet" }, "No pass has been recorded yet.");
  const tracks = TRACKS.filter(([name]) => pass.spans.some(([track]) => track === name));
  const height = tracks.length * ROW;
  const scale = WIDTH / Math.max(pass.ms, 1e-6);
  const bars = tracks.flatMap(([name, , kind], row) =>
    merged(pass.spans.filter(([track]) => track === name), 0.5 / scale).map(([start, end]) =>
      svg("rect", { class: kind, x: start * scale, y: row * ROW + 3, height: ROW - 6, width: Math.max(0.6, (end - start) * scale) }),
    ),
  );
  const told = tracks.map(([name, label]) => `${label} ${number(busy(pass.spans, name))} ms`).join(", ");
  const label = `The last pass took ${number(pass.ms)} ms: ${told}`;
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", height, role: "img", "aria-label": label }, ...bars);
  const keys = tracks.map(([name, text, kind]) => {
    const moved = pass.spans.reduce((sum, [track, , , size]) => sum + (track === name ? size : 0), 0);
    const share = `${number((100 * busy(pass.spans, name)) / pass.ms, 0)} %`;
    return element("li", {}, element("i", { className: kind }), `${text}: ${share} of the time${moved ? `, ${bytes(moved)}` : ""}`);
  });
  return element("div", { className: "timeline" }, picture, element("p", { className: "axis quiet" }, element("span", {}, "0"), element("span", {}, `${number(pass.ms)} ms`)), element("ul", { "aria-hidden": "true" }, ...keys));
}

/** Spans by their beginning, those put together between which nothing could be seen. */
function merged(spans, gap) {
  const out = [];
  for (const [, start, end] of [...spans].sort((a, b) => a[1] - b[1])) {
    const last = out.at(-1);
    if (last && start <= last[1] + gap) last[1] = Math.max(last[1], end);
    else out.push([start, end]);
  }
  return out;
}

/** Milliseconds in which at least one span of a track was under way. */
function busy(spans, name) {
  return merged(spans.filter(([track]) => track === name), 0).reduce((sum, [start, end]) => sum + end - start, 0);
}
