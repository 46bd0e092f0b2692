/** The conversation: questions, the answers to them, and running the requests. */

import { Answer } from "./answer.js";
import { AnswerView } from "./answer-view.js";
import { button, element } from "./dom.js";
import { ApiError, describe } from "./errors.js";
import { compare } from "./verdict.js";

const TICK = 200; // milliseconds between two drawings of the clock while nothing comes

/** A question with its answers, and where they are shown. */
class Turn {
  constructor(question) {
    this.question = question;
    /** @type {Answer | null} */
    this.on = null;
    /** @type {Answer | null} */
    this.off = null;
    /** @type {Map<Answer, AnswerView>} */
    this.views = new Map();
    this.answers = element("div", { class: "answers" });
    this.verdict = element("div", { class: "verdict", hidden: true });
    this.node = element(
      "article",
      { class: "turn" },
      element("h2", { class: "question" }, question),
      this.answers,
      this.verdict,
    );
  }
}

export class Chat {
  /**
   * @param {object} page
   * @param {HTMLElement} page.list where the turns go
   * @param {import("./api.js").Api} page.api
   * @param {import("./settings.js").Settings} page.settings
   * @param {import("./panel.js").Panel} page.panel
   * @param {(text: string) => DocumentFragment} page.render Markdown to elements
   * @param {() => Promise<string>} page.modelId
   * @param {() => Promise<boolean>} page.askForKey whether a key was given
   * @param {(text: string) => void} page.announce to screen readers
   * @param {() => void} page.follow keep the end of the chat in sight
   * @param {(isRunning: boolean) => void} page.onRunning
   */
  constructor(page) {
    this.page = page;
    /** @type {Turn[]} */
    this.turns = [];
    /** @type {AbortController | null} */
    this.running = null;
  }

  get isRunning() {
    return this.running !== null;
  }

  /** Send a question, and the same once more without Medusa if the settings say so. */
  async send(question) {
    const turn = new Turn(question);
    this.turns.push(turn);
    this.page.list.append(turn.node);
    const answers = [this.#add(turn, true)];
    if (this.page.settings.compare) answers.push(this.#add(turn, false));
    turn.node.scrollIntoView({ block: "start" });
    this.page.follow();
    await this.#run(turn, answers);
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.page.panel.close();
    this.turns = [];
    this.page.list.replaceChildren();
  }

  /** @param {"text" | "tokens"} view */
  changeView(view) {
    for (const turn of this.turns) for (const shown of turn.views.values()) shown.changeView(view);
  }

  /** Give a turn a new answer, in the place of the one with the same Medusa setting if there was one. */
  #add(turn, isMedusaOn) {
    const { panel, render, settings } = this.page;
    const answer = new Answer(isMedusaOn);
    const view = new AnswerView(answer, { panel, render, view: settings.view });
    const old = turn[isMedusaOn ? "on" : "off"];
    turn[isMedusaOn ? "on" : "off"] = answer;
    if (old) turn.views.get(old).node.replaceWith(view.node);
    else turn.answers.append(view.node);
    turn.views.delete(old);
    turn.views.set(answer, view);
    turn.answers.classList.toggle("two", turn.views.size === 2);
    return answer;
  }

  async #rerun(turn, isMedusaOn) {
    if (this.isRunning) return;
    await this.#run(turn, [this.#add(turn, isMedusaOn)]);
  }

  async #run(turn, answers) {
    const { settings, announce } = this.page;
    const sampling = { temperature: settings.temperature, max_tokens: settings.maxTokens };
    const together = settings.together && answers.length > 1;
    const running = new AbortController();
    this.#setRunning(running);
    announce("Writing the answer.");
    const tasks = answers.map((answer) => () => this.#fill(turn, answer, sampling, running.signal));
    if (together) await Promise.all(tasks.map((task) => task()));
    else for (const task of tasks) await task();
    if (this.running === running) this.#setRunning(null);
    if (turn.off?.hasEnded && turn.on.hasEnded) showVerdict(turn, { together, temperature: sampling.temperature });
    for (const answer of answers) turn.views.get(answer).offer(this.#actions(turn, answer));
    if (this.turns.includes(turn)) announce(spoken(turn));
  }

  #setRunning(running) {
    this.running = running;
    for (const made of this.page.list.querySelectorAll("[data-runs]")) made.disabled = this.isRunning;
    this.page.onRunning(this.isRunning);
  }

  #actions(turn, answer) {
    const actions = [];
    const offer = (label, isMedusaOn) =>
      actions.push(
        button(
          label,
          (event) => {
            event.target.remove();
            this.#rerun(turn, isMedusaOn);
          },
          { "data-runs": true },
        ),
      );
    if (answer.state === "failed" && turn === this.turns.at(-1)) offer("Try again", answer.isMedusaOn);
    if (answer.state === "done" && answer.isMedusaOn && !turn.off) offer("Run this with Medusa off", false);
    return actions;
  }

  /** Run one request to its end, whatever that is. */
  async #fill(turn, answer, sampling, signal) {
    const view = turn.views.get(answer);
    const clock = setInterval(() => view.update(), TICK);
    while (!answer.hasEnded) {
      try {
        signal.throwIfAborted();
        await this.#stream(turn, answer, sampling, signal, view);
        answer.end("done", performance.now());
      } catch (error) {
        if (signal.aborted) answer.end("stopped", performance.now());
        else if (error instanceof ApiError && error.status === 401 && (await this.page.askForKey())) continue;
        else answer.end("failed", performance.now(), describe(error));
      }
    }
    clearInterval(clock);
    view.draw();
  }

  async #stream(turn, answer, sampling, signal, view) {
    const model = await this.page.modelId();
    answer.start(performance.now());
    view.update();
    const body = { model, messages: this.#messages(turn), ...sampling, medusa: { enabled: answer.isMedusaOn, drafts: true } };
    for await (const chunk of this.page.api.chat(body, signal)) {
      answer.take(chunk, performance.now());
      view.update();
    }
  }

  /** What was said so far. Turns without an answer are left out. */
  #messages(turn) {
    const before = this.turns.slice(0, Math.max(this.turns.indexOf(turn), 0)).filter(({ on }) => on.text !== "");
    const system = this.page.settings.system.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.flatMap(({ question, on }) => [
        { role: "user", content: question },
        { role: "assistant", content: on.text },
      ]),
      { role: "user", content: turn.question },
    ];
  }
}

function showVerdict({ on, off, verdict }, run) {
  const { headline, lines } = compare(on, off, run);
  verdict.replaceChildren(element("p", { class: "headline" }, headline), ...lines.map((line) => element("p", {}, line)));
  verdict.hidden = false;
}

/** What a screen reader says when a turn has ended. */
function spoken({ on, off, verdict }) {
  if (on.error) return on.error;
  const length = on.acceptanceLength === null ? "" : `${on.numTokens} tokens, ${on.acceptanceLength.toFixed(1)} tokens a step.`;
  const parts = [
    on.state === "stopped" ? "Stopped." : "The answer is complete.",
    length,
    off?.error ?? "",
    verdict.firstChild?.textContent ?? "",
    on.text,
  ];
  return parts.filter(Boolean).join(" ");
}
