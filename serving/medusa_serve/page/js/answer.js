/** One answer while it comes in: its text, its steps, and what was measured in this browser. */

/**
 * @typedef {{id: number, text: string, source: string, depth: number}} Token
 * @typedef {{id: number, text: string, parent: number, depth: number, probability: number, source: string}} DraftNode
 * @typedef {{nodes: DraftNode[], accepted: number[]}} Draft
 * @typedef {{tokens: Token[], draft: Draft | null}} Step one forward pass of the model
 */

export class Answer {
  /** @param {boolean} isMedusaOn */
  constructor(isMedusaOn) {
    this.isMedusaOn = isMedusaOn;
    /** @type {"waiting" | "streaming" | "done" | "stopped" | "failed"} */
    this.state = "waiting";
    /** @type {Step[]} */
    this.steps = [];
    this.text = "";
    this.reasoning = "";
    this.numTokens = 0;
    this.finishReason = null;
    this.usage = null;
    this.metrics = null;
    this.error = null;
    this.startedAt = null; // milliseconds, as of performance.now()
    this.firstAt = null; // when the first token came
    this.lastAt = null;
    this.endedAt = null;
  }

  start(now) {
    this.startedAt = now;
  }

  /** Take a chunk of the stream. */
  take(chunk, now) {
    this.usage = chunk.usage ?? this.usage;
    this.metrics = chunk.metrics ?? this.metrics;
    const [choice] = chunk.choices ?? [];
    this.text += choice?.delta?.content ?? "";
    this.reasoning += choice?.delta?.reasoning_content ?? "";
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    const tokens = chunk.medusa?.tokens ?? [];
    if (tokens.length === 0) return;
    this.state = "streaming";
    this.steps.push({ tokens, draft: chunk.medusa.draft ?? null });
    this.numTokens += tokens.length;
    this.firstAt ??= now;
    this.lastAt = now;
  }

  /** @param {"done" | "stopped" | "failed"} state */
  end(state, now, error = null) {
    this.state = state;
    this.endedAt = now;
    this.error = error;
  }

  get hasEnded() {
    return this.endedAt !== null;
  }

  /** Seconds since the request was sent; until its end, once it has ended. */
  elapsed(now) {
    return this.startedAt === null ? 0 : ((this.endedAt ?? now) - this.startedAt) / 1000;
  }

  /** Seconds until the first token; null before it. */
  get firstTokenSeconds() {
    return this.firstAt === null ? null : (this.firstAt - this.startedAt) / 1000;
  }

  /**
   * Tokens a decoding step, the acceptance length. The first token is not counted: it comes from reading the prompt.
   * @returns {number | null} null before the first decoding step
   */
  get acceptanceLength() {
    return this.steps.length < 2 ? null : this.#decodedTokens / (this.steps.length - 1);
  }

  /** Tokens a second after the first token; null before the second step. */
  get tokensPerSecond() {
    return this.steps.length < 2 || this.lastAt === this.firstAt
      ? null
      : this.#decodedTokens / ((this.lastAt - this.firstAt) / 1000);
  }

  get #decodedTokens() {
    return this.numTokens - this.steps[0].tokens.length;
  }

  /** All token ids in order. */
  get tokenIds() {
    return this.steps.flatMap((step) => step.tokens.map((token) => token.id));
  }
}
