// Markdown as DOM nodes: headings, lists, tables, quotations, code. Never by way of HTML.
//
// An answer is drawn again each time that it grows. Its blocks are compared with those that stand there, and only what
// has changed is made anew: the last one, mostly.
import { element } from "./dom.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8; // lists and quotations within each other; deeper ones stay text
const LONGEST = 2000; // characters of a line in which structure is looked for: no heading or table row is longer

/** Draw `text` into a box that holds an earlier state of it, or nothing. Returns its blocks, one for each child of the box. */
export function draw(box, text) {
  const blocks = split(text.replaceAll("\0", "\uFFFD").split(/\r\n|\n|\r/));
  const standing = [...box.children]; // asked once: the browser counts them anew after each change
  standing.slice(blocks.length).forEach((each) => each.remove());
  blocks.forEach((block, index) => {
    const there = standing[index];
    if (there && there.source === block.source && there.kind === block.kind) return;
    const made = build(block, 0);
    made.source = block.source;
    made.kind = block.kind;
    if (there) there.replaceWith(made);
    else box.append(made);
  });
  return blocks;
}

/** The blocks of some lines: {kind, source, ...}. `source` tells two states of a block apart. */
function split(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (lines[i].trim() === "") {
      i += 1;
      continue;
    }
    const block = begin(lines, i);
    block.source = lines.slice(i, block.end).join("\n");
    blocks.push(block);
    i = block.end;
  }
  return blocks;
}

function begin(lines, i) {
  const line = lines[i];
  if (line.length > LONGEST) return paragraph(lines, i);
  let found;
  if ((found = FENCE.exec(line))) return fence(lines, i, found);
  if ((found = HEADING.exec(line))) return { kind: `h${found[1].length}`, text: found[2].trim().replace(/[ \t]#+$/, ""), end: i + 1 };
  if (RULE.test(line)) return { kind: "rule", end: i + 1 };
  if (QUOTE.test(line)) return quote(lines, i);
  if (ITEM.test(line)) return list(lines, i);
  if (startsTable(lines, i)) return table(lines, i);
  return paragraph(lines, i);
}

function fence(lines, i, [, mark, info]) {
  let end = i + 1;
  const closing = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  while (end < lines.length && !closing(lines[end])) end += 1;
  const language = info.trim().split(/\s+/)[0];
  // A fence without an end goes on to the last line: the answer is still coming.
  return { kind: "code", language, text: lines.slice(i + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

function quote(lines, i) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return { kind: "quote", lines: lines.slice(i, end).map((line) => line.replace(QUOTE, "")), end };
}

const width = (space) => space.replaceAll("\t", "    ").length;

function list(lines, i) {
  const [, indent, bullet] = ITEM.exec(lines[i]);
  const [base, ordered] = [width(indent), /\d/.test(bullet)];
  const items = [];
  let end = i;
  let content = 0;
  for (; end < lines.length; end++) {
    const line = lines[end];
    const found = line.length > LONGEST ? null : ITEM.exec(line);
    const depth = width(/^\s*/.exec(line.slice(0, 200))[0]);
    if (found && depth < base + 2 && depth >= base && !RULE.test(line)) {
      if (/\d/.test(found[2]) !== ordered) break;
      content = found[0].length;
      items.push([line.slice(content)]);
    } else if (line.trim() === "") {
      const next = lines[end + 1] ?? "";
      const more = width(/^\s*/.exec(next.slice(0, 200))[0]);
      if (next.trim() === "" || (more < base + 2 && !(ITEM.test(next.slice(0, 200)) && more >= base))) break;
      items.at(-1).push("");
    } else if (depth >= base + 2) {
      items.at(-1).push(line.slice(Math.min(content, line.length - line.trimStart().length)));
    } else if (found || lines[end - 1].trim() === "" || FENCE.test(line.slice(0, LONGEST)) || HEADING.test(line.slice(0, LONGEST))) {
      break;
    } else {
      items.at(-1).push(line); // goes on with the paragraph above
    }
  }
  return { kind: ordered ? "ol" : "ul", items, start: ordered ? Number.parseInt(bullet, 10) : 1, end };
}

function startsTable(lines, i) {
  const divider = lines[i + 1] ?? "";
  return lines[i].includes("|") && divider.length <= LONGEST && divider.includes("-") && DIVIDER.test(divider)
    && cells(divider).length === cells(lines[i]).length;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, i) {
  let end = i + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].length <= LONGEST) end += 1;
  const sides = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : "left"));
  return { kind: "table", head: cells(lines[i]), sides, rows: lines.slice(i + 2, end).map(cells), end };
}

function paragraph(lines, i) {
  let end = i + 1;
  const other = (line) => line.length <= LONGEST && (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || ITEM.test(line));
  while (end < lines.length && lines[end].trim() !== "" && !other(lines[end])) end += 1;
  return { kind: "p", text: lines.slice(i, end).join("\n").trim(), end };
}

function build(block, depth) {
  const heading = /^h(\d)$/.exec(block.kind);
  // The page's own headings are h1 and h2.
  if (heading) return element(`h${Math.min(6, Number(heading[1]) + 2)}`, {}, ...inline(block.text));
  switch (block.kind) {
    case "rule":
      return element("hr");
    case "code":
      return buildCode(block);
    case "quote":
      return element("blockquote", {}, ...nested(block.lines, depth));
    case "table":
      return buildTable(block);
    case "ul":
    case "ol": {
      const items = block.items.map((lines) => element("li", {}, ...item(lines, depth)));
      return element(block.kind, block.kind === "ol" ? { start: block.start } : {}, ...items);
    }
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function nested(lines, depth) {
  if (depth >= DEEPEST) return [element("p", {}, lines.join("\n"))];
  return split(lines).map((block) => build(block, depth + 1));
}

/** One paragraph alone needs no box of its own. */
function item(lines, depth) {
  const made = nested(lines, depth);
  const [first, ...rest] = made;
  return first?.tagName === "P" && rest.every((each) => each.tagName !== "P") ? [...first.childNodes, ...rest] : made;
}

function buildCode({ language, text }) {
  const code = element("code", {}, text);
  const pre = element("pre", { tabIndex: 0, role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, code);
  const copy = navigator.clipboard
    ? element("button", { type: "button", className: "copy", onclick: () => copyText(copy, text) }, "Copy")
    : null;
  return element("div", { className: "code" }, element("div", { className: "row" }, element("span", {}, language), copy), pre);
}

/** Copy, and say so on the button. */
export async function copyText(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}

function buildTable({ head, sides, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, ...head.map((_, i) => element(tag, { className: sides[i] ?? "left" }, ...inline(texts[i] ?? ""))));
  const body = rows.map((texts) => row("td", texts));
  const made = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...body));
  return element("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" }, made);
}
