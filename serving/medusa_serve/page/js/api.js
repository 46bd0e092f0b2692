/** The server's API, as this page uses it. All addresses are relative to the page, so a path before it does no harm. */

import { ApiError, ConnectionLostError } from "./errors.js";
import { readEvents } from "./stream.js";

export class Api {
  /** @param {{apiKey: string | null}} settings asked for the key at each request */
  constructor(settings) {
    this.settings = settings;
  }

  /** The served model: its id, and what is known of its heads. */
  async model() {
    const response = await this.#request("v1/models", {});
    const [model] = (await response.json()).data;
    return model;
  }

  /**
   * Stream an answer, chunk by chunk.
   * @param {object} body of the request; this adds what streaming needs
   * @param {AbortSignal} signal
   * @throws {ApiError} if the server says no
   * @throws {ConnectionLostError} if there is no connection, or the stream ends early
   */
  async *chat(body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal,
    });
    try {
      for await (const data of readEvents(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(null, chunk.error.message ?? "");
        yield chunk;
      }
    } catch (error) {
      throw lost(error);
    }
    throw new ConnectionLostError();
  }

  async #request(path, options) {
    const headers = new Headers(options.headers);
    if (this.settings.apiKey) headers.set("Authorization", `Bearer ${this.settings.apiKey}`);
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        ...options,
        headers,
        cache: "no-store",
        credentials: "omit",
        referrerPolicy: "no-referrer",
      });
    } catch (error) {
      throw lost(error);
    }
    if (response.ok) return response;
    throw new ApiError(response.status, await messageOf(response), response.headers.get("Retry-After"));
  }
}

/** fetch reports every failure of the network as a TypeError. */
function lost(error) {
  return error instanceof TypeError ? new ConnectionLostError() : error;
}

async function messageOf(response) {
  const text = await response.text().catch(() => "");
  try {
    return String(JSON.parse(text).error.message ?? "");
  } catch {
    return text.length < 300 && !text.trimStart().startsWith("<") ? text : ""; // a proxy's HTML page helps nobody
  }
}
