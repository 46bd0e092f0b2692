/** What the tints mean, in one line above the answers. */

import { element } from "./dom.js";
import { markOf, styleOf } from "./sources.js";

/**
 * @param {HTMLElement} list
 * @param {number} numHeads
 */
export function drawLegend(list, numHeads) {
  const depths = Array.from({ length: numHeads }, (_, at) => at + 1);
  list.replaceChildren(
    item("model itself", [{ source: "model", depth: 0 }]),
    item(
      numHeads === 1 ? "its head" : `heads 1 to ${numHeads}`,
      depths.map((depth) => ({ source: "head", depth })),
    ),
    item(
      "heads with n-grams",
      [
        { source: "ngrams", depth: 1 },
        { source: "ngrams", depth: Math.min(2, numHeads) },
      ].slice(0, numHeads),
    ),
    item("copied from before", [{ source: "lookup", depth: 1 }]),
  );
}

function item(words, samples) {
  const chips = samples.map((sample) =>
    element("span", { class: `token sample ${styleOf(sample)}`, "data-mark": markOf(sample), "aria-hidden": "true" }, "ab"),
  );
  return element("li", {}, ...chips, element("span", {}, words));
}
