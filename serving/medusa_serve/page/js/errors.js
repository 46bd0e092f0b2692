/** What can go wrong with a request, and one readable line for each. */

/** The server answered with an error, before the stream or in it. */
export class ApiError extends Error {
  /**
   * @param {number | null} status the HTTP status; null for an error that came within a stream
   * @param {string} message the server's own message
   * @param {string | null} retryAfter seconds, from the header of that name
   */
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The connection ended before the answer did. */
export class ConnectionLostError extends Error {}

const LEADS = {
  400: "The server refused the request.",
  401: "The server asks for an API key.",
  403: "The server refused the request.",
  404: "The server does not know this model or address.",
  413: "The request is too large.",
  422: "The server refused the request.",
  429: "The server is busy.",
  500: "The server failed.",
  503: "The server is not ready.",
};

/**
 * One line for a reader.
 * @param {unknown} error
 * @returns {string}
 */
export function describe(error) {
  if (error instanceof ApiError) {
    const lead =
      error.status === null
        ? "The server ended the answer with an error."
        : (LEADS[error.status] ?? `The server answered with status ${error.status}.`);
    const wait = error.retryAfter && /^\d+$/.test(error.retryAfter) ? `Try again in ${error.retryAfter} s.` : null;
    return [lead, ended(error.message), wait].filter(Boolean).join(" ");
  }
  if (error instanceof ConnectionLostError)
    return "The connection was lost before the answer was complete. Is the server still running?";
  return `The page failed: ${error instanceof Error ? error.message : error}`;
}

function ended(text) {
  const line = text.replace(/\s+/g, " ").trim();
  if (!line) return null;
  const sentence = line[0].toUpperCase() + line.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}
