/** The panel beside the chat. It shows a step, or the explanation of the whole page. */

import { button, byId, element } from "./dom.js";
import { EXAMPLE } from "./example.js";
import { explainStep } from "./explain.js";
import { drawFigure } from "./figure.js";

export class Panel {
  constructor() {
    this.node = byId("panel");
    this.title = byId("panel-title");
    this.stepPart = byId("panel-step");
    this.explanation = byId("explanation");
    this.opener = null; // what gets the focus back
    this.shown = null; // the answer view whose step is shown
    byId("example").append(drawFigure(EXAMPLE));
    byId("panel-close").addEventListener("click", () => this.close());
  }

  get isOpen() {
    return !this.node.hidden;
  }

  /** Show what this page is. */
  explain(opener = null) {
    this.#forgetStep();
    this.title.textContent = "What am I looking at?";
    this.explanation.hidden = false;
    this.stepPart.hidden = true;
    this.opener = opener;
    this.#open();
  }

  /**
   * Show the step of a token.
   * @param {import("./answer-view.js").AnswerView} view
   */
  showStep(view, number, token) {
    if (this.shown !== view) this.#forgetStep();
    const { answer } = view;
    const step = answer.steps[number];
    this.shown = view;
    this.title.textContent = `Step ${number + 1}: ${step.tokens.length} ${step.tokens.length === 1 ? "token" : "tokens"} from one pass`;
    this.explanation.hidden = true;
    this.stepPart.hidden = false;
    this.stepPart.replaceChildren(
      element("p", { class: "sentence" }, explainStep(step, { isFirst: number === 0, isMedusaOn: answer.isMedusaOn })),
      drawFigure(step),
      this.#legend(step),
      this.#neighbours(view, number),
    );
    this.opener = view.select(number, token) ?? this.opener;
    this.#open();
    this.opener?.scrollIntoView({ block: "nearest" });
  }

  /** Close it, and give the focus back. */
  close() {
    if (!this.isOpen) return;
    this.node.hidden = true;
    document.body.classList.remove("with-panel");
    const { opener } = this;
    this.#forgetStep();
    if (opener?.isConnected) opener.focus();
  }

  #open() {
    this.node.hidden = false;
    this.node.scrollTop = 0;
    document.body.classList.add("with-panel");
  }

  #forgetStep() {
    this.shown?.select(null, null);
    this.shown = null;
    this.opener = null;
  }

  #legend(step) {
    if ((step.draft?.nodes.length ?? 0) < 2) return null;
    const item = (kind, text) => element("li", { class: kind }, text);
    return element(
      "ul",
      { class: "figure-legend" },
      item("accepted", "✓ right guess, kept"),
      item("rejected", "wrong guess, thrown away"),
      item("bonus", "the model’s own token"),
      item("odds", "before the pass: how likely this token and all above it were thought to be right"),
    );
  }

  #neighbours(view, number) {
    const last = view.answer.steps.length - 1;
    const go = (to) => () => {
      this.showStep(view, to, 0);
      (
        this.stepPart.querySelector(`[data-go="${to < number ? "back" : "on"}"]:not(:disabled)`) ??
        this.stepPart.querySelector("[data-go]:not(:disabled)")
      )?.focus();
    };
    return element(
      "div",
      { class: "neighbours" },
      button("← Step before", go(number - 1), { "data-go": "back", disabled: number === 0 }),
      button("Next step →", go(number + 1), { "data-go": "on", disabled: number === last }),
    );
  }
}
