// What outlives a reload: the conversation and settings in this browser, the API key in this tab only.

const PREFIX = "offload-triforce.";
const VERSION = 1;

/** Keep a text. False where the browser has no room for it, or forbids it. */
export function keep(name, text) {
  try {
    localStorage.setItem(PREFIX + name, text);
    return true;
  } catch {
    return false;
  }
}

function recall(name) {
  try {
    return localStorage.getItem(PREFIX + name);
  } catch {
    return null;
  }
}

/** What was kept as JSON, if `sound` says that it can be used; else `otherwise`. */
function recallJson(name, sound, otherwise) {
  try {
    const value = JSON.parse(recall(name) ?? "null");
    return sound(value) ? value : otherwise;
  } catch {
    return otherwise;
  }
}

const isText = (value) => typeof value === "string";
const isMessage = (value) =>
  (value?.role === "user" || value?.role === "assistant") &&
  isText(value.content) &&
  Array.isArray(value.documents ?? []) &&
  (value.documents ?? []).every((each) => isText(each?.name) && isText(each?.text));

/** The messages of the conversation: {role, content, documents?, thinking?, ended?}. */
export function recallConversation() {
  const sound = (value) => value?.version === VERSION && Array.isArray(value.messages) && value.messages.every(isMessage);
  return recallJson("conversation", sound, { messages: [] }).messages;
}

/** False where it has not been kept whole. */
export function keepConversation(messages) {
  return keep("conversation", JSON.stringify({ version: VERSION, messages }));
}

/** A question that has been written and not sent. */
export const recallDraft = () => recall("draft") ?? "";
export const keepDraft = (text) => keep("draft", text);

const SETTINGS = ["system", "temperature", "top_p", "seed", "max_tokens"];

/** Settings as the texts of their fields; what is empty is left to the server. */
export function recallSettings() {
  const sound = (value) => typeof value === "object" && value !== null;
  const kept = recallJson("settings", sound, {});
  return Object.fromEntries(SETTINGS.map((name) => [name, isText(kept[name]) ? kept[name] : ""]));
}

export function keepSettings(settings) {
  keep("settings", JSON.stringify(Object.fromEntries(SETTINGS.map((name) => [name, settings[name] ?? ""]))));
}

let key = "";
try {
  key = sessionStorage.getItem(PREFIX + "key") ?? "";
} catch {
  // Kept in memory then.
}

export const apiKey = () => key;

export function keepApiKey(text) {
  key = text.trim();
  try {
    sessionStorage.setItem(PREFIX + "key", key);
  } catch {
    // As above.
  }
}
