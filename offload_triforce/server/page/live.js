// What the runtime is doing: asked of the server every now and then, while somebody can see it.
import { ApiError, live } from "./api.js";
import { byId, element } from "./dom.js";
import { timeline } from "./timeline.js";
import { bytes, count, number, share } from "./words.js";

const QUICK = 700; // ms between two questions while there is an answer
const SLOW = 4000;

export class Live {
  constructor() {
    this.panel = byId("live");
    this.known = null; // the last snapshot
    this.timer = 0;
    this.gone = false; // this server has nothing to tell
    this.parts = new Map(); // name -> {box, drawn}: what has not changed stays, and with it what has been unfolded
    const button = byId("show-live");
    const wide = matchMedia("(min-width: 62rem)");
    this.open = wide.matches;
    button.addEventListener("click", () => this.#show(!this.open));
    wide.addEventListener("change", () => this.#show(wide.matches)); // where there is no room, it would cover the chat
    this.button = button;
    document.addEventListener("visibilitychange", () => this.ask());
    this.#show(this.open);
  }

  /** Whether PDF can be read there. */
  get pdf() {
    return this.known?.pdf === true;
  }

  /** Ask now; an answer begins, or something has changed. */
  async ask() {
    clearTimeout(this.timer);
    if (document.hidden || this.gone) return;
    if (this.asking) {
      this.missed = true; // what comes may be older than what has just happened
      return;
    }
    this.asking = true;
    try {
      this.known = await live(this.open);
      this.#draw();
    } catch (error) {
      this.gone = error instanceof ApiError && error.status === 404;
      const text = error.status === 401 ? "The server wants an API key." : this.gone ? "This server tells nothing of itself." : error.message;
      this.parts.clear();
      this.panel.replaceChildren(element("p", { className: "quiet" }, text));
    }
    this.asking = false;
    if (this.missed) {
      this.missed = false;
      return this.ask();
    }
    if (!this.open && this.known) return; // nobody looks
    this.timer = setTimeout(() => this.ask(), this.known?.busy || this.hurry ? QUICK : SLOW);
  }

  /** `hurry`: an answer of this page is under way. */
  turn(hurry) {
    this.hurry = hurry;
    this.ask();
  }

  #show(open) {
    this.open = open;
    document.body.classList.toggle("with-live", open);
    this.button.setAttribute("aria-expanded", String(open));
    this.ask();
  }

  #draw() {
    if (!this.open) return;
    const { busy, waiting, answer, link, memory, pass } = this.known;
    if (!this.parts.size) this.panel.replaceChildren(element("h2", {}, "Runtime"));
    const quiet = (text) => [element("p", { className: "quiet" }, text)];
    this.#part("state", queueWords(busy, waiting, answer), quiet);
    this.#part("answer", answer, (now) => (now ? [figures(now), acceptance(now.acceptance)] : quiet("Nothing has been asked yet.")));
    this.#part("link", answer && [answer, link], (now) => (now ? linkPart(...now) : []));
    this.#part("pass", pass, (now) => [element("h3", {}, "The last pass"), timeline(now)]);
    this.#part("memory", memory, (now) => (now ? memoryParts(now) : []));
  }

  /** Draw a part of the panel anew if what it shows is another. `make`: its nodes. */
  #part(name, shown, make) {
    if (!this.parts.has(name)) {
      const box = element("section", { id: `live-${name}` });
      this.parts.set(name, { box, drawn: null });
      this.panel.append(box);
    }
    const part = this.parts.get(name);
    const text = JSON.stringify(shown);
    if (part.drawn === text) return;
    const unfolded = [...part.box.querySelectorAll("details")].map((each) => each.open);
    part.drawn = text;
    part.box.replaceChildren(...make(shown));
    part.box.querySelectorAll("details").forEach((each, i) => (each.open = unfolded[i] ?? false));
  }
}

function queueWords(busy, waiting, answer) {
  if (!busy) return "Idle";
  const doing = answer && answer.passes ? "Decoding" : "Reading the prompt";
  return waiting ? `${doing}; ${count(waiting)} waiting` : doing;
}

function figures(answer) {
  const rows = [
    ["Tokens per pass", answer.passes ? number(answer.tokens_per_pass, 2) : "none yet"],
    ["Time per token", answer.new_tokens ? `${number(answer.ms_per_token)} ms` : "none yet"],
    ["New tokens", `${count(answer.new_tokens)} in ${count(answer.passes)} ${answer.passes === 1 ? "pass" : "passes"}`],
    ["Prompt", `${count(answer.prompt_tokens)} tokens${answer.reused_tokens ? `, ${count(answer.reused_tokens)} reused` : ""}`],
    ["Drafting hidden by passes", share(answer.hidden_share)],
  ];
  return element("dl", {}, ...rows.flatMap(([name, value], i) => [element("dt", {}, name), element("dd", i ? {} : { className: "big" }, value)]));
}

function acceptance({ draft, retrieval }) {
  return element(
    "div",
    {},
    element("h3", {}, "Draft tokens accepted"),
    meter("Drafter's, by the retrieval level", draft, share(draft)),
    meter("Retrieval level's, by the target", retrieval, share(retrieval)),
  );
}

function linkPart(answer, link) {
  const now = answer.link_gbps === null ? "nothing crosses it yet" : `${number(answer.link_gbps, 2)} GB/s`;
  const limit = link.limit_gbps === null ? "" : ` of ${number(link.limit_gbps, 2)} GB/s`;
  const fill = link.limit_gbps && answer.link_gbps !== null ? answer.link_gbps / link.limit_gbps : null;
  return [
    element("h3", {}, "Link"),
    meter("While decoding", fill, now + (answer.link_gbps === null ? "" : limit)),
    element("p", { className: "quiet" }, `${bytes(answer.link_bytes)} so far. The limit is ${link.source}.`),
  ];
}

function meter(label, value, text) {
  const fill = element("div", { className: "fill" });
  fill.style.width = `${100 * Math.min(1, value ?? 0)}%`;
  const about = { role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": Math.min(1, value ?? 0), "aria-valuetext": text };
  return element("div", { className: "measure" }, element("div", { className: "row" }, element("span", {}, label), element("b", {}, text)), element("div", { className: "meter", ...about }, fill));
}

function memoryParts({ context, device_name: name, device, host }) {
  const part = (title, parts) => {
    const rows = Object.entries(parts).filter(([, size]) => size > 0).sort((a, b) => b[1] - a[1]);
    const whole = rows.reduce((sum, [, size]) => sum + size, 0);
    const lines = rows.flatMap(([what, size]) => [element("dt", {}, what), element("dd", {}, bytes(size))]);
    return element("details", {}, element("summary", {}, `${title}: `, element("b", {}, bytes(whole))), element("dl", {}, ...lines));
  };
  return [
    element("h3", {}, "Memory"),
    part(`On ${name}`, device),
    part("In host memory", host),
    element("p", { className: "quiet" }, `For texts of up to ${count(context)} tokens.`),
  ];
}
