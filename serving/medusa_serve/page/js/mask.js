/** The tree attention mask: one row and one column for each node. A filled cell says that the row's token sees the column's. */

import { svg } from "./dom.js";
import { HEAD, HEADING, ROW, middle } from "./geometry.js";
import { label, shortened } from "./sources.js";
import { lineage } from "./tree.js";

const TEXT = 34; // width of the column for the text so far, which every node sees
const GAP = 8;
const WIDEST = 16; // of a column
const NARROWEST = 5;
const WIDTH = 300; // of all columns, at most
const LABELLED = 12; // columns narrower than this have no room for labels

/**
 * Draw the mask of the rows of a tree.
 * @param {import("./tree.js").Row[]} rows
 * @returns {SVGElement}
 */
export function drawMask(rows) {
  const columns = rows.flatMap((row, at) => (row.node === null ? [] : [at])); // the model's own token was not in the pass
  const cell = Math.max(Math.min(WIDEST, WIDTH / columns.length), NARROWEST);
  const width = TEXT + GAP + cell * columns.length + 24;
  const height = HEAD + rows.length * ROW;
  const mask = svg("svg", {
    class: "mask",
    role: "img",
    "aria-label": describe(columns.length),
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
  });
  mask.append(
    svg("text", { class: "heading", x: 0, y: HEADING - 12 }, "text"),
    svg("text", { class: "heading", x: 0, y: HEADING }, "so far"),
  );
  columns.forEach((column, place) => {
    const x = TEXT + GAP + cell * (place + 0.5) + 3;
    const y = HEADING + 5;
    if (cell >= LABELLED)
      mask.append(
        svg(
          "text",
          { class: `column-label ${rows[column].kind}`, transform: `translate(${x} ${y}) rotate(-60)` },
          shortened(label(rows[column].text), 8),
        ),
      );
  });
  for (const at of columns) mask.append(drawRow(rows, at, columns, cell, width));
  return mask;
}

function drawRow(rows, at, columns, cell, width) {
  const y = middle(at);
  const seen = new Set(lineage(rows, at));
  const row = svg("g", { class: `mask-row ${rows[at].kind}`, "data-row": at });
  row.append(
    svg("rect", { class: "band", x: 0, y: y - ROW / 2, width, height: ROW }),
    svg("rect", { class: "cell sees", x: 0, y: y - 5, width: TEXT, height: 10, rx: 3 }),
    svg(
      "text",
      { class: "row-label", x: TEXT + GAP + cell * columns.length + 8, y: y + 4 },
      shortened(label(rows[at].text), 12),
    ),
  );
  columns.forEach((column, place) => {
    const x = TEXT + GAP + cell * (place + 0.5);
    const side = Math.min(cell - 2, 13);
    if (seen.has(column))
      row.append(
        svg("rect", {
          class: `cell sees ${column === at ? "itself" : ""}`,
          x: x - side / 2,
          y: y - 6.5,
          width: side,
          height: 13,
          rx: 3,
        }),
      );
    else row.append(svg("circle", { class: "cell blind", cx: x, cy: y, r: Math.min(1.5, cell / 5) }));
  });
  return row;
}

function describe(numNodes) {
  return `Tree attention mask, ${numNodes} rows and columns: each token of the tree sees the text so far, the tokens above it and itself`;
}
