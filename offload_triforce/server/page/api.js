// The server, as the page sees it: OpenAI's API, and what the page asks beside it.
import { events } from "./sse.js";
import { apiKey } from "./store.js";

/** What the server refuses, in its own words. `status`: 0 where it was not reached. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  return apiKey() ? { ...more, Authorization: `Bearer ${apiKey()}` } : more;
}

/** A response that is fine. Throws an ApiError otherwise; an AbortError where it was given up. */
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached; is it still running?", 0);
  }
  if (response.ok) return response;
  throw new ApiError(await reason(response), response.status);
}

async function reason(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? body.detail ?? "";
  } catch {
    // Not JSON: the status has to do.
  }
  if (typeof said !== "string" || !said) said = `The server answered ${response.status} ${response.statusText}`;
  const wait = Number(response.headers.get("Retry-After"));
  return response.status === 429 && wait > 0 ? `${said} Try again in ${wait} s.` : said;
}

/** Names of the models that are served. */
export async function models() {
  const found = await (await ask("v1/models")).json();
  return found.data.map((model) => model.id);
}

/** What the runtime is doing; `timeline`: with the spans of the last pass. */
export async function live(timeline) {
  return (await ask(`page/live?timeline=${timeline ? 1 : 0}`)).json();
}

/** The text of a PDF: {text, pages}. */
export async function readPdf(file) {
  const sent = { method: "POST", body: file, headers: { "Content-Type": "application/pdf" } };
  return (await ask("page/pdf", sent)).json();
}

/**
 * An answer as it comes: yields {text}, {thinking}, {progress}, {usage} and {ended}.
 * `request`: of /v1/chat/completions. `signal`: gives it up, and the server with it.
 */
export async function* complete(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true }, return_progress: true };
  const sent = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const response = await ask("v1/chat/completions", sent);
  let whole = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        whole = true;
        return;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server gave up", response.status);
      yield* parts(chunk);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection was lost in the middle of the answer", 0);
  }
  if (!whole) throw new ApiError("The connection was closed in the middle of the answer", 0);
}

function* parts(chunk) {
  if (chunk.prompt_progress) yield { progress: chunk.prompt_progress };
  const choice = chunk.choices?.[0];
  if (choice?.delta?.reasoning_content) yield { thinking: choice.delta.reasoning_content };
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { ended: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}
