// The marks within a line of Markdown: code, links, emphasis. Every result is a DOM node made of text.
//
// What a model writes is not to be trusted: no HTML is understood, only absolute links to http(s) and mailto are made,
// pictures are never loaded. Time grows with the length of the text alone, whatever it holds: each search is bounded.
import { element } from "./dom.js";

const CODE = /(`+)/g;
const LINK = /(!?)\[([^[\]\n]{0,500})\]\(\s{0,9}<?((?:[^\s()<>]|\([^\s()<>]{0,200}\)){1,2000})>?(?:\s{1,9}"[^"\n]{0,200}")?\s{0,9}\)/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const PLAIN = /[^\\![<*_~h\n]+/y;
const MARK = /\*+|_+|~~/y;
const DEEPEST = 24; // marks within each other
const WORD = /[\p{L}\p{N}]/u;

/** A link where its address may be followed; null otherwise. Control characters do not fool the browser's own parser. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return ["http:", "https:", "mailto:"].includes(address.protocol) ? address.href : null;
  } catch {
    return null;
  }
}

function link(address, children) {
  return element("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank", title: address }, ...children);
}

/** The nodes of a piece of text. */
export function inline(text) {
  const out = new Nest();
  for (const piece of codeSpans(text)) {
    if (piece.code !== undefined) out.add(element("code", {}, piece.code));
    else marks(piece.text, out);
  }
  return out.close();
}

/** Text cut into {text} and {code}: a run of backticks up to the next run of the same length. */
function* codeSpans(text) {
  const runs = [...text.matchAll(CODE)];
  const next = new Map(); // length of a run -> where runs of that length are, the last one first
  for (let i = runs.length - 1; i >= 0; i--) {
    const length = runs[i][1].length;
    if (!next.has(length)) next.set(length, []);
    next.get(length).push(i);
  }
  let from = 0;
  for (let i = 0; i < runs.length; i++) {
    const places = next.get(runs[i][1].length);
    while (places.length && places.at(-1) <= i) places.pop();
    if (!places.length || runs[i].index < from) continue;
    const closing = runs[places.at(-1)];
    if (runs[i].index > from) yield { text: text.slice(from, runs[i].index) };
    const code = text.slice(runs[i].index + runs[i][1].length, closing.index).replaceAll("\n", " ");
    yield { code: /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code };
    from = closing.index + closing[1].length;
  }
  if (from < text.length) yield { text: text.slice(from) };
}

/** What matches exactly at a place, or null. */
function at(pattern, text, place) {
  pattern.lastIndex = place;
  return pattern.exec(text);
}

function marks(text, out) {
  for (let i = 0; i < text.length; ) {
    const plain = at(PLAIN, text, i);
    if (plain) {
      out.add(plain[0]);
      i += plain[0].length;
      continue;
    }
    i += special(text, i, out);
  }
}

/** Whatever begins at a place with a character that may mean something; returns how long it is. */
function special(text, i, out) {
  let found;
  switch (text[i]) {
    case "\n":
      out.add(element("br"));
      return 1;
    case "\\":
      found = at(ESCAPED, text, i);
      out.add(found ? found[1] : "\\");
      return found ? 2 : 1;
    case "!":
    case "[":
      return linkAt(text, i, out);
    case "<":
      found = at(ANGLED, text, i);
      return addressAt(found?.[1], found?.[0].length ?? 1, "<", out);
    case "h":
      found = WORD.test(text[i - 1] ?? "") ? null : at(BARE, text, i)?.[0].replace(/[.,;:!?)\]*_~]+$/, "");
      return addressAt(found, found?.length ?? 1, "h", out);
    default:
      found = at(MARK, text, i);
      if (!found) {
        out.add(text[i]);
        return 1;
      }
      out.mark(found[0], text[i - 1] ?? " ", text[i + found[0].length] ?? " ");
      return found[0].length;
  }
}

function linkAt(text, i, out) {
  const found = at(LINK, text, i);
  const address = found && safeAddress(found[3]);
  if (!address) {
    out.add(text[i]); // as it was written: nothing is hidden behind other words
    return 1;
  }
  const label = found[2] || address;
  out.add(link(address, found[1] ? [`picture: ${label}`] : emphasised(label)));
  return found[0].length;
}

function emphasised(label) {
  const nest = new Nest();
  for (let i = 0; i < label.length; ) {
    const found = at(MARK, label, i);
    if (found) nest.mark(found[0], label[i - 1] ?? " ", label[i + found[0].length] ?? " ");
    else nest.add(label[i]);
    i += found?.[0].length ?? 1;
  }
  return nest.close();
}

function addressAt(text, length, otherwise, out) {
  const address = text && safeAddress(text);
  out.add(address ? link(address, [text]) : otherwise);
  return address ? length : 1;
}

const TAGS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** Emphasis within emphasis: marks that have been opened and wait for their end. */
class Nest {
  constructor() {
    this.open = [{ mark: "", children: [] }];
  }

  add(child) {
    const children = this.open.at(-1).children;
    if (typeof child === "string" && typeof children.at(-1) === "string") children.push(children.pop() + child);
    else children.push(child);
  }

  /** A run of marks, with the characters before and behind it. */
  mark(run, before, behind) {
    const within = run[0] === "_" && WORD.test(before) && WORD.test(behind); // snake_case
    const opens = !within && behind.trim() !== "";
    const closes = !within && before.trim() !== "";
    for (let left = run.length; left > 0; ) {
      const closed = closes ? this.#matching(run[0], left) : -1;
      if (closed > 0) {
        left -= this.#end(closed);
        continue;
      }
      const mark = left >= 2 ? run[0].repeat(2) : run[0];
      if (opens && left <= 3 && this.open.length < DEEPEST) this.open.push({ mark, children: [] });
      else this.add(mark);
      left -= mark.length;
    }
  }

  #matching(character, left) {
    for (let i = this.open.length - 1; i > 0; i--) {
      const { mark, children } = this.open[i];
      if (mark[0] === character && mark.length <= left && children.length) return i;
    }
    return -1;
  }

  #end(index) {
    while (this.open.length - 1 > index) this.#give();
    const { mark, children } = this.open.pop();
    this.add(element(TAGS[mark], {}, ...children));
    return mark.length;
  }

  /** The newest mark had no end: it is text. */
  #give() {
    const { mark, children } = this.open.pop();
    for (const child of [mark, ...children]) this.add(child);
  }

  close() {
    while (this.open.length > 1) this.#give();
    return this.open[0].children;
  }
}
