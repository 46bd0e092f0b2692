/** Reading Server-Sent Events from the body of a response. (EventSource cannot send a POST, so we read them ourselves.) */

/**
 * Give out the data of each event, as the HTML standard defines events: lines end with LF, CRLF or CR, an empty line ends an
 * event, several lines of data are joined, comments and other fields are passed over.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* readEvents(body) {
  let data = [];
  for await (const line of readLines(body)) {
    if (line === "") {
      if (data.length > 0) yield data.join("\n");
      data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      data.push(line.slice(5).replace(/^ /, ""));
    }
  }
}

async function* readLines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // keeps the bytes of a character whose rest comes with the next part
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      text += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let end;
      while ((end = /\r\n|\n|\r(?=[^])/.exec(text))) {
        // a CR at the end may be half of a CRLF
        yield text.slice(0, end.index);
        text = text.slice(end.index + end[0].length);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the reader may have stopped early: then the server should know
  }
}
