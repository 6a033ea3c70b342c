// An answer read out while it comes: block by block, since every token would be too much.
import { byId } from "./dom.js";

let said = 0;

export function startSpeaking() {
  said = 0;
  byId("spoken").replaceChildren();
}

/** Hand on the blocks that are over; `last`: all of them are. */
export function speak(blocks, box, last) {
  for (const ended = last ? blocks.length : blocks.length - 1; said < ended; said++) {
    const line = document.createElement("p");
    line.textContent = box.children[said].textContent;
    byId("spoken").append(line);
  }
}
