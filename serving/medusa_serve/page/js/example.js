/** A step for the explanation: SmolLM2-135M begins to explain how to make a cup of tea. The probabilities are real. */

const NODES = [
  // text, parent, depth, probability
  ["To", -1, 0, 1],
  [" make", 0, 1, 0.51],
  [" prepare", 0, 1, 0.09],
  [" start", 0, 1, 0.1],
  [" use", 0, 1, 0.07],
  [" the", 1, 2, 0.22],
  [" a", 1, 2, 0.21],
];

/** @type {import("./answer.js").Step} */
export const EXAMPLE = {
  tokens: [
    { id: 1, text: " make", source: "head", depth: 1 },
    { id: 6, text: " a", source: "head", depth: 2 },
    { id: 7, text: " cup", source: "model", depth: 0 },
  ],
  draft: {
    nodes: NODES.map(([text, parent, depth, probability], id) => ({
      id,
      text,
      parent,
      depth,
      probability,
      source: depth === 0 ? "model" : "head",
    })),
    accepted: [0, 1, 6],
  },
};
