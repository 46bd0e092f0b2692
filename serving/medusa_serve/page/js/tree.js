/** A draft's tree in rows: what is drawn in which row, and which node sees which. No drawing here. */

import { bonusOf } from "./explain.js";

/**
 * @typedef {object} Row
 * @property {"root" | "accepted" | "rejected" | "bonus"} kind
 * @property {string} text
 * @property {string} source
 * @property {number} depth
 * @property {number | null} probability null for the root and for the model's own token, which are no guesses
 * @property {number} parent the row of its parent; -1 for the root
 * @property {number | null} node its place in the draft; null for the model's own token
 */

/**
 * One row for each node of a step, from the root down: after each node come its children, the likelier first, and all below
 * them. The token that the model added itself is the last child of the last accepted node.
 * @param {import("./answer.js").Step} step
 * @returns {Row[]}
 */
export function rowsOf(step) {
  const nodes = step.draft?.nodes ?? [];
  const accepted = new Set(step.draft?.accepted ?? []);
  const lastAccepted = step.draft?.accepted.at(-1);
  const children = nodes.map(() => []);
  nodes.forEach((node, at) => children[node.parent]?.push(at));
  for (const list of children) list.sort((a, b) => nodes[b].probability - nodes[a].probability);
  const rows = [];
  const bonus = bonusOf(step);
  const addBonus = (parent, depth) =>
    rows.push({ kind: "bonus", text: bonus.text, source: "model", depth, probability: null, parent, node: null });
  const add = (at, parent) => {
    const { text, source, depth, probability } = nodes[at];
    const kind = at === 0 ? "root" : accepted.has(at) ? "accepted" : "rejected";
    const row = rows.push({ kind, text, source, depth, probability: at === 0 ? null : probability, parent, node: at }) - 1;
    for (const child of children[at]) add(child, row);
    if (at === lastAccepted && bonus) addBonus(row, depth + 1);
  };
  if (nodes.length > 0) add(0, -1);
  else if (bonus) addBonus(-1, 0);
  return rows;
}

/** A row, its parent, and so on up to the root. That is what a node sees of the tree. */
export function lineage(rows, at) {
  const found = [];
  for (let row = at; row >= 0; row = rows[row].parent) found.push(row);
  return found;
}
