/** The view "tokens": the answer's text with each token tinted by its source, and the tokens of one step joined. */

import { element } from "./dom.js";
import { markOf, quoted, styleOf, visible, wordsOf } from "./sources.js";

export class TokenView {
  /**
   * @param {import("./answer.js").Answer} answer
   * @param {(step: number, token: number) => void} onSelect called if a reader selects a token
   * @param {() => boolean} isFollowing whether moving the focus shall select, too: if the panel shows this answer
   */
  constructor(answer, onSelect, isFollowing) {
    this.answer = answer;
    this.onSelect = onSelect;
    this.isFollowing = isFollowing;
    this.numShown = 0; // steps
    this.node = element("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": "Tokens of the answer",
      "aria-orientation": "horizontal",
    });
    this.node.addEventListener("click", (event) => this.#clicked(event));
    this.node.addEventListener("keydown", (event) => this.#pressed(event));
  }

  /** Add the steps that came since the last call. */
  update() {
    const { steps } = this.answer;
    for (; this.numShown < steps.length; this.numShown += 1) this.node.append(...drawStep(steps[this.numShown], this.numShown));
    const tokens = this.#tokens();
    if (tokens.length > 0 && !tokens.some((token) => token.tabIndex === 0)) tokens[0].tabIndex = 0;
  }

  /** Mark a token as selected; null for none. */
  select(step, token) {
    for (const selected of this.node.querySelectorAll("[aria-selected=true]")) selected.setAttribute("aria-selected", "false");
    for (const shown of this.node.querySelectorAll(".step.shown")) shown.classList.remove("shown");
    const found = step === null ? null : this.node.querySelector(`[data-step="${step}"][data-token="${token}"]`);
    found?.setAttribute("aria-selected", "true");
    found?.closest(".step").classList.add("shown");
    if (found) this.#moveTabStop(found);
    return found;
  }

  #tokens() {
    return [...this.node.querySelectorAll("[role=option]")];
  }

  #clicked(event) {
    const token = event.target.closest("[role=option]");
    if (!token) return;
    token.focus();
    this.#choose(token);
  }

  #pressed(event) {
    const token = event.target.closest("[role=option]");
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") this.#choose(token);
    else {
      const next = this.#neighbour(token, event.key);
      if (next === undefined) return;
      this.#moveTabStop(next);
      next.focus();
      if (this.isFollowing()) this.#choose(next);
    }
    event.preventDefault();
  }

  /** The token to which a key leads: arrows left and right by one token, up and down by one step. */
  #neighbour(token, key) {
    const tokens = this.#tokens();
    const at = tokens.indexOf(token);
    const step = Number(token.dataset.step);
    const first = (number) => tokens.find((other) => Number(other.dataset.step) === number) ?? token;
    const moves = {
      ArrowRight: () => tokens[at + 1] ?? token,
      ArrowLeft: () => tokens[at - 1] ?? token,
      ArrowDown: () => first(step + 1),
      ArrowUp: () => first(step - 1),
      Home: () => tokens[0],
      End: () => tokens.at(-1),
    };
    return moves[key]?.();
  }

  #moveTabStop(token) {
    for (const other of this.node.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    token.tabIndex = 0;
  }

  #choose(token) {
    this.onSelect(Number(token.dataset.step), Number(token.dataset.token));
  }
}

/** The nodes of a step: the space before it, and the step itself. */
function drawStep(step, number) {
  const size = step.tokens.length;
  const group = element("span", {
    class: "step",
    role: "group",
    "aria-label": `Step ${number + 1}, ${size} ${size === 1 ? "token" : "tokens"}`,
  });
  let before = "";
  step.tokens.forEach((token, place) => {
    const { lead, core, rest } = split(token.text);
    if (place === 0) before = lead;
    else group.append(lead);
    group.append(drawToken(token, core, number, place), rest);
  });
  return [before, group];
}

function drawToken(token, core, step, place) {
  const words = wordsOf(token);
  return element(
    "span",
    {
      class: `token ${styleOf(token)}${core.length < markOf(token).length ? " narrow" : ""}`,
      role: "option",
      tabindex: -1,
      "aria-selected": "false",
      "aria-label": `${quoted(token.text)}, ${words}`,
      title: `${quoted(token.text)}: ${words}`,
      "data-step": step,
      "data-token": place,
      "data-mark": markOf(token),
    },
    core,
  );
}

/**
 * A token's text in three parts. `core` is what is tinted. A space before it stays outside, so that a line can break there; a
 * line break is shown by a mark and then happens.
 */
function split(text) {
  if (text.trim() === "") return { lead: "", core: visible(text), rest: text.includes("\n") ? text : "" };
  const [, lead, body, tail] = /^(\s*)([^]*?)(\s*)$/.exec(text);
  const isBroken = lead.includes("\n");
  return {
    lead: isBroken ? "" : lead,
    core: (isBroken ? visible(lead) : "") + body + (tail.includes("\n") ? visible(tail) : ""),
    rest: tail,
  };
}
