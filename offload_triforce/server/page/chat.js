// The conversation: asking, the answer as it comes, stopping, going back.
import { ApiError, complete } from "./api.js";
import { putDocuments } from "./documents.js";
import { announce, byId, notify } from "./dom.js";
import { messageView } from "./message.js";
import { hidePrefill, showPrefill, showWaiting } from "./prefill.js";
import { speak, startSpeaking } from "./speech.js";
import { keepConversation, recallConversation, recallSettings } from "./store.js";
import { count } from "./words.js";

const KEEP_EVERY = 3000; // ms, while an answer comes

/** What the model is given: documents first, so that what was read of them serves the next question too. */
function forModel({ role, content, documents = [] }) {
  const texts = documents.map(({ name, text }) => `<document name=${JSON.stringify(name)}>\n${text}\n</document>\n\n`);
  return { role, content: texts.join("") + content };
}

/** The body of a request: what is left empty in the settings is left to the server. */
export function makeRequest(messages, settings, model) {
  const request = { model, messages: messages.map(forModel) };
  if (settings.system.trim()) request.messages.unshift({ role: "system", content: settings.system });
  for (const name of ["temperature", "top_p", "seed", "max_tokens"]) {
    if (settings[name].trim() !== "") request[name] = Number(settings[name]);
  }
  return request;
}

export class Chat {
  /** `model`: its name, when it is known. `onKey`: the server wants a key. `onTurn`: an answer begins or has ended. */
  constructor({ model, onKey, onTurn }) {
    this.model = model;
    this.onKey = onKey;
    this.onTurn = onTurn;
    this.box = byId("messages");
    this.messages = recallConversation();
    this.stopping = null; // while an answer comes
    this.warned = false;
    addEventListener("pagehide", () => this.busy && this.#keep("lost"));
    this.#drawAll();
  }

  get busy() {
    return this.stopping !== null;
  }

  /** Ask, and show the answer as it comes. */
  async ask(question, documents) {
    this.messages.push({ role: "user", content: question, documents });
    this.#keep();
    this.#append(this.messages.at(-1), this.messages.length - 1);
    await this.#answer();
  }

  /** Ask the last question again. */
  async again() {
    if (this.busy) return;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    this.#drawAll();
    await this.#answer();
  }

  /** Give a question back to be written anew; what followed it goes. */
  edit(index) {
    if (this.busy) return;
    const { content, documents = [] } = this.messages[index];
    this.messages.length = index;
    byId("question").value = content;
    putDocuments(documents);
    this.#keep();
    this.#drawAll();
    byId("question").focus();
  }

  stop() {
    this.stopping?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.#keep();
    this.#drawAll();
    byId("question").focus();
  }

  async #answer() {
    const { messages } = this; // those of this conversation, should another one be begun meanwhile
    const request = makeRequest(messages, recallSettings(), this.model());
    const message = { role: "assistant", content: "" };
    messages.push(message);
    const stopping = (this.stopping = new AbortController());
    const view = this.#append(message, messages.length - 1);
    this.#begin(view);
    let told = "Answer complete";
    try {
      await this.#read(request, message, view, stopping.signal);
    } catch (error) {
      message.ended = error.name === "AbortError" ? "stopped" : "lost";
      told = error.name === "AbortError" ? "Stopped" : "The answer could not be completed";
      if (error.name !== "AbortError") this.#complain(error);
    }
    this.stopping = null;
    if (!message.content && !message.thinking) {
      messages.splice(messages.indexOf(message), 1);
      view.box.remove();
    }
    this.#finish(messages, view, told);
  }

  #begin(view) {
    byId("welcome").hidden = true;
    this.box.classList.add("busy");
    view.box.setAttribute("aria-busy", "true");
    showWaiting("Waiting for the first token");
    startSpeaking();
    announce("The answer is under way");
    this.#scroll(true);
    this.onTurn(true);
  }

  async #read(request, message, view, signal) {
    let drawing = 0;
    let kept = performance.now();
    const frame = () => {
      drawing = 0;
      const follow = this.#atEnd();
      speak(view.update(), view.text, false);
      this.#scroll(follow);
    };
    try {
      for await (const part of complete(request, signal)) {
        if (part.progress) showPrefill(part.progress);
        if (part.text || part.thinking) hidePrefill();
        if (part.text) message.content += part.text;
        if (part.thinking) message.thinking = (message.thinking ?? "") + part.thinking;
        if (part.ended === "length") message.ended = "length";
        drawing ||= requestAnimationFrame(frame);
        if (performance.now() - kept > KEEP_EVERY) {
          this.#keep("lost");
          kept = performance.now();
        }
      }
    } finally {
      cancelAnimationFrame(drawing);
    }
  }

  #finish(messages, view, told) {
    hidePrefill();
    this.box.classList.remove("busy");
    view.box.removeAttribute("aria-busy");
    if (messages === this.messages) {
      const follow = this.#atEnd();
      speak(view.update(), view.text, true);
      this.#keep();
      this.#scroll(follow);
    }
    announce(told);
    this.onTurn(false);
  }

  #complain(error) {
    notify(error instanceof ApiError ? error.message : `The page failed: ${error.message}`);
    if (error.status === 401) this.onKey();
  }

  /** `ended`: what the newest answer is to say of itself, should it never be completed. */
  #keep(ended) {
    const coming = ended && this.messages.at(-1)?.role === "assistant";
    const messages = coming ? [...this.messages.slice(0, -1), { ...this.messages.at(-1), ended }] : this.messages;
    const whole = keepConversation(messages);
    if (!whole && !this.warned) {
      const size = JSON.stringify(messages).length;
      notify(`This conversation of ${count(size)} characters is more than the browser keeps: a reload would lose it`);
    }
    this.warned = !whole;
  }

  #drawAll() {
    this.box.querySelectorAll("article").forEach((each) => each.remove());
    byId("welcome").hidden = this.messages.length > 0;
    this.messages.forEach((message, index) => this.#append(message, index));
  }

  #append(message, index) {
    const again = { "Ask again": () => this.again() }; // the style sheet shows it in the last message alone
    const view = messageView(message, message.role === "user" ? { Edit: () => this.edit(index), ...again } : again);
    view.update();
    this.box.append(view.box);
    return view;
  }

  #atEnd() {
    return this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 80;
  }

  #scroll(follow) {
    if (follow) this.box.scrollTop = this.box.scrollHeight;
  }
}
