// How far the prompt has been read, and how long the rest may take.
import { byId } from "./dom.js";
import { about, count } from "./words.js";

/** `progress`: {total, cached, processed, time_ms}, `processed` with what was cached. */
export function showPrefill({ total, cached = 0, processed, time_ms: spent }) {
  const fresh = processed - cached;
  const left = fresh > 0 ? ((total - processed) * spent) / fresh / 1e3 : null;
  const bar = byId("prefill-bar");
  byId("prefill").hidden = processed >= total;
  bar.max = Math.max(1, total);
  bar.value = processed;
  const kept = cached ? `, ${count(cached)} of them known from before` : "";
  byId("prefill-what").textContent = `Reading ${count(total)} tokens${kept}`;
  byId("prefill-left").textContent = left === null ? "" : `${about(left)} left`;
}

/** Before anything is known: `text` says what is waited for. */
export function showWaiting(text) {
  byId("prefill").hidden = false;
  byId("prefill-bar").removeAttribute("value"); // of unknown length
  byId("prefill-what").textContent = text;
  byId("prefill-left").textContent = "";
}

export function hidePrefill() {
  byId("prefill").hidden = true;
}
