// One message on the page.
import { chip } from "./documents.js";
import { element } from "./dom.js";
import { copyText, draw } from "./markdown.js";

const ENDS = {
  stopped: "Stopped",
  length: "Ended at the most tokens that it may have",
  lost: "Not complete",
};

/** A message and its parts: {box, update}. `actions`: {name: what to do}. `update` draws what has changed. */
export function messageView(message, actions) {
  const answer = message.role === "assistant";
  const text = element("div", { className: "text" });
  const thinking = element("details", { hidden: true }, element("summary", {}, "Thinking"), element("div", { className: "text" }));
  const end = element("span", { className: "quiet" });
  const row = element("div", { className: "row actions" }, end, ...Object.entries(actions).map(([name, act]) => button(name, act)));
  const copy = navigator.clipboard ? button("Copy", () => copyText(copy, message.content)) : null;
  if (copy) row.append(copy);
  const documents = (message.documents ?? []).map(chip);
  const box = element(
    "article",
    { className: message.role, "aria-label": answer ? "Answer" : "Question" },
    documents.length ? element("p", {}, ...documents) : null,
    thinking,
    text,
    row,
  );
  const update = () => {
    end.textContent = ENDS[message.ended] ?? "";
    if (!answer) {
      text.textContent = message.content;
      return [];
    }
    thinking.hidden = !message.thinking;
    if (message.thinking) thinking.lastChild.textContent = message.thinking;
    return draw(text, message.content);
  };
  return { box, text, update };
}

function button(name, act) {
  return element("button", { type: "button", className: name === "Ask again" ? "again" : "", onclick: act }, name);
}
