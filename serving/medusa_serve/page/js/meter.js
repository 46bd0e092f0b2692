/** What was measured of an answer, in numbers and as a strip with a column for each step. */

import { element, svg } from "./dom.js";
import { styleOf } from "./sources.js";

const FEWEST = 60; // columns that the strip has room for at first
const TALLEST = 6; // tokens of a step that fit into the strip's height

export class Meter {
  /** @param {import("./answer.js").Answer} answer */
  constructor(answer, onSelectStep) {
    this.answer = answer;
    this.numShown = 0;
    this.values = {};
    const list = element("dl", { class: "meter" });
    for (const [name, words] of [
      ["length", "tokens a step"],
      ["speed", "tokens a second"],
      ["tokens", "tokens"],
      ["time", "seconds"],
    ]) {
      this.values[name] = element("dd", { "data-value": name }, "–");
      list.append(element("div", {}, this.values[name], element("dt", {}, words)));
    }
    this.strip = svg("svg", { class: "strip", "aria-hidden": "true", preserveAspectRatio: "none" });
    this.strip.addEventListener("click", (event) => {
      const column = event.target.closest("g");
      if (column) onSelectStep(Number(column.dataset.column));
    });
    this.node = element("div", { class: "measured" }, list, this.strip);
  }

  update(now) {
    const { answer } = this;
    this.values.length.textContent = number(answer.acceptanceLength, 2);
    this.values.speed.textContent = number(answer.tokensPerSecond, 1);
    this.values.tokens.textContent = String(answer.numTokens);
    this.values.time.textContent = number(answer.elapsed(now), 1);
    for (; this.numShown < answer.steps.length; this.numShown += 1)
      this.strip.append(column(answer.steps[this.numShown], this.numShown));
    this.strip.setAttribute("viewBox", `0 0 ${Math.max(answer.steps.length, FEWEST)} ${TALLEST}`);
  }
}

/** A number with so many digits after the point, fewer if it is large; a dash if there is none yet. */
export function number(value, digits) {
  return value === null || !Number.isFinite(value) ? "–" : value.toFixed(value < 1000 ? digits : 0);
}

function column(step, at) {
  const size = Math.min(1, TALLEST / step.tokens.length);
  const blocks = step.tokens.map((token, place) =>
    svg("rect", { class: styleOf(token), x: at + 0.1, width: 0.8, y: TALLEST - (place + 1) * size, height: size * 0.86 }),
  );
  return svg("g", { "data-column": at }, svg("rect", { class: "catch", x: at, y: 0, width: 1, height: TALLEST }), ...blocks);
}
