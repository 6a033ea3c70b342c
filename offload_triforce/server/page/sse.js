// Server-sent events out of the body of a response. EventSource cannot send a POST, nor a key.

/**
 * The `data` of each event of a stream of bytes. Comments, which keep a connection awake, are left out.
 * Lines may end with CR, LF or both, and may be cut anywhere, within a character too.
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of done ? [...lines, rest] : lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        }
      }
      if (done) {
        if (data.length) yield data.join("\n");
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // left early: the connection is closed
  }
}
