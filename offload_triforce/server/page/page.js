// Puts the page together.
import { models } from "./api.js";
import { Chat } from "./chat.js";
import { stillReading, takeDocuments, watchFiles } from "./documents.js";
import { announce, byId, notify } from "./dom.js";
import { Live } from "./live.js";
import { startSettings } from "./settings.js";
import { keepDraft, recallDraft } from "./store.js";
import { startTheme } from "./theme.js";

let served = [];
const question = byId("question");
const live = new Live();
const openSettings = startSettings(greet);
const chat = new Chat({ model: () => served[0] ?? "default", onKey: () => openSettings(true), onTurn: turn });

/** Who is there; asks for a key if one is wanted. */
async function greet() {
  try {
    served = await models();
    byId("model").textContent = served[0] ?? "";
    live.ask();
  } catch (error) {
    notify(error.message);
    if (error.status === 401) openSettings(true);
  }
}

function turn(begun) {
  byId("stop").hidden = !begun;
  byId("send").hidden = begun;
  live.turn(begun);
}

async function send() {
  if (chat.busy) return announce("An answer is under way; Escape stops it");
  if (stillReading()) return notify("A document is still being read");
  if (!question.value.trim()) return question.focus();
  const text = question.value.trim();
  question.value = "";
  keepDraft("");
  await chat.ask(text, takeDocuments());
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter is its own.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
question.addEventListener("input", () => keepDraft(question.value));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) chat.stop();
});
byId("stop").addEventListener("click", () => {
  chat.stop();
  question.focus();
});
byId("new-chat").addEventListener("click", () => chat.clear());
byId("show-settings").addEventListener("click", () => openSettings());

question.value = recallDraft();
startTheme(byId("theme"));
watchFiles(() => live.pdf);
greet();
question.focus();
