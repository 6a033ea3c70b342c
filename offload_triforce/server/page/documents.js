// Documents that go along with the next question: dropped, picked or pasted. Text and code are read here; the server reads PDF.
import { readPdf } from "./api.js";
import { byId, element, notify } from "./dom.js";
import { count } from "./words.js";

const MOST_BYTES = 32e6; // of a file; a million tokens of text are about 4 MB

let waiting = [];
let reading = 0;

/** The documents that are there, which are taken away. */
export function takeDocuments() {
  const taken = waiting;
  waiting = [];
  show();
  return taken;
}

/** Whether a file is still being read: a question should wait for it. */
export const stillReading = () => reading > 0;

/** Put documents back, as when their question is edited. */
export function putDocuments(documents) {
  waiting = [...documents];
  show();
}

/** Read files and keep their texts. `pdf`: whether the server reads PDF. */
export async function addFiles(files, pdf) {
  for (const file of files) {
    reading += 1;
    show();
    try {
      waiting.push({ name: file.name, text: await textOf(file, pdf()) });
    } catch (error) {
      notify(`${file.name}: ${error.message}`);
    }
    reading -= 1;
    show();
  }
}

async function textOf(file, pdf) {
  if (file.size > MOST_BYTES) throw new Error(`${count(file.size / 1e6)} MB, more than the ${MOST_BYTES / 1e6} MB that are read`);
  if (file.type === "application/pdf" || /\.pdf$/i.test(file.name)) {
    if (!pdf) throw new Error("the server cannot read PDF; install pypdf there, or take the text of it");
    return (await readPdf(file)).text;
  }
  const text = decode(new Uint8Array(await file.arrayBuffer()));
  if (text.trim() === "") throw new Error("there is no text in it");
  return text;
}

/** UTF-8, or UTF-16 that says so by its first bytes. */
function decode(data) {
  const mark = data[0] === 0xff && data[1] === 0xfe ? "utf-16le" : data[0] === 0xfe && data[1] === 0xff ? "utf-16be" : "utf-8";
  try {
    const text = new TextDecoder(mark, { fatal: true }).decode(data);
    if (!text.includes("\0")) return text;
  } catch {
    // Said below.
  }
  throw new Error("it is not text; text and code in UTF-8 can be read, and PDF");
}

function show() {
  const rows = waiting.map((each, index) => {
    const remove = () => {
      waiting.splice(index, 1);
      show();
      byId("question").focus();
    };
    const label = `Leave out ${each.name}`;
    return element("li", {}, chip(each), element("button", { type: "button", onclick: remove, "aria-label": label, title: label }, "×"));
  });
  if (reading) rows.push(element("li", { className: "quiet" }, "Reading…"));
  byId("documents").replaceChildren(...rows);
}

/** How a document is shown. */
export function chip({ name, text }) {
  return element("span", { className: "chip" }, element("b", {}, name), ` ${count(text.length)} characters`);
}

/** Whatever is dropped anywhere on the page, pasted into the question, or picked. */
export function watchFiles(pdf) {
  const cover = byId("drop-here");
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const take = (files) => addFiles([...files], pdf);
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault(); // else the browser would open the file instead of this page
    cover.hidden = false;
  });
  document.addEventListener("dragleave", (event) => (cover.hidden = event.relatedTarget === null || cover.hidden));
  document.addEventListener("drop", (event) => {
    cover.hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });
  byId("question").addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files);
  });
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    take(byId("file").files);
    byId("file").value = ""; // so that the same file can be picked again
  });
}
