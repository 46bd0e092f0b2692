/** An answer on the screen: its measures, its text in one of the two views, and what can be done with it. */

import { copyText } from "./copy.js";
import { button, element } from "./dom.js";
import { Meter } from "./meter.js";
import { TokenView } from "./tokens.js";

const PAUSE = 50; // milliseconds between two drawings of an answer

export class AnswerView {
  /**
   * @param {import("./answer.js").Answer} answer
   * @param {{panel: import("./panel.js").Panel, render: (text: string) => DocumentFragment, view: string}} page
   */
  constructor(answer, page) {
    this.answer = answer;
    this.page = page;
    this.view = page.view;
    this.timer = null;
    const name = answer.isMedusaOn ? "With Medusa" : "Medusa off";
    this.meter = new Meter(answer, (step) => this.open(step, 0));
    this.text = element("div", { class: "text" });
    this.note = element("p", { class: "note" });
    this.actions = element("div", { class: "actions" });
    this.node = element(
      "section",
      { class: `answer ${answer.isMedusaOn ? "on" : "off"}`, "aria-label": name },
      element("header", {}, element("h3", {}, name), this.meter.node),
      this.text,
      this.note,
      this.actions,
    );
    this.changeView(page.view);
  }

  /** Draw what came since the last time, soon. Many chunks may share one drawing. */
  update() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.draw();
    }, PAUSE);
  }

  /** @param {"text" | "tokens"} view */
  changeView(view) {
    this.view = view;
    this.tokens = null;
    this.drawn = null;
    this.text.replaceChildren();
    this.draw();
  }

  /** Show a step in the panel. */
  open(step, token) {
    this.page.panel.showStep(this, step, token);
  }

  /** Mark a token, if tokens are shown. */
  select(step, token) {
    return this.tokens?.select(step, token) ?? null;
  }

  draw() {
    const { answer } = this;
    this.node.dataset.state = answer.state;
    this.node.setAttribute("aria-busy", String(!answer.hasEnded));
    this.meter.update(performance.now());
    if (this.view === "tokens" && (answer.steps.length > 0 || answer.text === "")) this.#drawTokens();
    else this.#drawText();
    this.note.textContent = noteOf(answer);
    this.note.classList.toggle("error", answer.error !== null);
  }

  #drawTokens() {
    if (!this.tokens) {
      this.tokens = new TokenView(
        this.answer,
        (step, token) => this.open(step, token),
        () => this.page.panel.shown === this,
      );
      this.text.replaceChildren(this.tokens.node);
    }
    this.tokens.update();
  }

  #drawText() {
    const { text, reasoning } = this.answer;
    if (this.drawn === text + reasoning) return;
    this.drawn = text + reasoning;
    const thinking = reasoning
      ? element("details", { class: "thinking" }, element("summary", {}, "Thinking"), element("p", {}, reasoning))
      : null;
    if (thinking) thinking.open = this.text.querySelector(".thinking")?.open ?? !text;
    this.text.replaceChildren(...[thinking, element("div", { class: "prose" }, this.page.render(text))].filter(Boolean));
  }

  /** Offer what can be done with an answer that has ended. */
  offer(actions) {
    const copy = button("Copy", async () => {
      copy.textContent = (await copyText(this.answer.text)) ? "Copied" : "Copying failed";
    });
    this.actions.replaceChildren(...(this.answer.text ? [copy] : []), ...actions);
  }
}

function noteOf(answer) {
  if (answer.error !== null) return answer.error;
  if (answer.state === "waiting") return answer.startedAt === null ? "Waits for its turn …" : "Reading the prompt …";
  if (answer.state === "stopped") return "Stopped.";
  if (answer.state === "done" && answer.finishReason === "length")
    return `Cut after ${answer.numTokens} tokens, as the settings say.`;
  return "";
}
