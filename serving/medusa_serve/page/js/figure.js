/** The picture of a step: its tree, and beside it the attention mask, whose rows are those of the tree. */

import { element, svg } from "./dom.js";
import { label, markOf, quoted, shortened, styleOf, wordsOf } from "./sources.js";
import { lineage, rowsOf } from "./tree.js";
import { HEAD, HEADING, ROW, middle } from "./geometry.js";
import { drawMask } from "./mask.js";

const INDENT = 44;
const PILL = 22;
const LETTER = 7.3; // width of a letter of the monospaced font
const LONGEST = 13; // letters of a token that are drawn
const BAR = 40;
const PERCENT = 36; // width of the column of numbers

/**
 * Draw a step.
 * @param {import("./answer.js").Step} step
 * @returns {HTMLElement}
 */
export function drawFigure(step) {
  const rows = rowsOf(step);
  const caption = element(
    "figcaption",
    { "aria-live": "polite" },
    "Point at a token, or move with the arrow keys ↑ and ↓, to see what it sees.",
  );
  const tree = drawTree(rows);
  const hasMask = rows.filter((row) => row.node !== null).length > 1;
  const mask = hasMask ? drawMask(rows) : null;
  const figure = element("figure", { class: "figure" }, element("div", { class: "drawings" }, tree, mask), caption);
  followPointerAndKeys(figure, rows, caption);
  return figure;
}

function drawTree(rows) {
  const widths = rows.map((row) => shown(row).length * LETTER + 16);
  const right = Math.max(...rows.map((row, at) => row.depth * INDENT + widths[at])) + 30;
  const width = right + BAR + PERCENT + 4;
  const height = HEAD + rows.length * ROW;
  const deepest = Math.max(...rows.map((row) => row.depth));
  const tree = svg("svg", {
    class: "tree",
    role: "tree",
    "aria-label": "Tree of guesses",
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
  });
  for (let depth = 0; depth <= deepest; depth += 1) tree.append(...heading(rows, depth, height));
  tree.append(svg("text", { class: "heading", x: width - 4, y: HEADING, "text-anchor": "end" }, "probability"));
  const links = rows.map((row, at) => (row.parent < 0 ? null : link(rows, at)));
  tree.append(
    ...links.filter((_, at) => links[at] && rows[at].kind === "rejected"),
    ...links.filter((_, at) => links[at] && rows[at].kind !== "rejected"),
  );
  rows.forEach((row, at) => tree.append(drawNode(row, at, widths[at], right)));
  return tree;
}

function heading(rows, depth, height) {
  const x = depth * INDENT + 12;
  const isGuessed = rows.some((row) => row.depth === depth && row.kind !== "bonus" && row.kind !== "root");
  const text = depth === 0 ? "root" : isGuessed ? `head ${depth}` : "";
  return [
    svg("line", { class: "guide", x1: x, y1: HEAD - 8, x2: x, y2: height }),
    svg("text", { class: "heading", x: x - 12, y: HEADING }, text),
  ];
}

/** From below the parent down and then right to the child. */
function link(rows, at) {
  const { depth, parent, kind } = rows[at];
  const x = rows[parent].depth * INDENT + 12;
  const from = middle(parent) + PILL / 2;
  const to = middle(at);
  return svg("path", { class: `link ${kind}`, d: `M${x} ${from}V${to - 8}q0 8 8 8H${depth * INDENT}` });
}

function drawNode(row, at, width, right) {
  const x = row.depth * INDENT;
  const y = middle(at);
  const node = svg("g", {
    class: `node ${row.kind} ${styleOf(row)}`,
    role: "treeitem",
    tabindex: at === 0 ? 0 : -1,
    "aria-level": row.depth + 1,
    "aria-selected": "false",
    "aria-label": describe(row),
    "data-row": at,
  });
  node.append(
    svg("rect", { class: "band", x: 0, y: y - ROW / 2, width: right + BAR + PERCENT + 4, height: ROW }),
    svg("rect", { class: "pill", x, y: y - PILL / 2, width, height: PILL, rx: 6 }),
    svg("text", { class: "word", x: x + 8, y: y + 4.5 }, shown(row)),
  );
  if (row.kind === "rejected") node.append(svg("line", { class: "strike", x1: x + 4, y1: y, x2: x + width - 4, y2: y }));
  const note = { root: "", accepted: "✓", rejected: "", bonus: "" }[row.kind];
  node.append(svg("text", { class: "mark", x: x + width + 6, y: y + 4.5 }, [note, markOf(row)].filter(Boolean).join(" ")));
  node.append(...(row.probability === null ? [] : bar(row.probability, right, y)));
  if (row.kind === "bonus")
    node.append(svg("text", { class: "own", x: right + BAR + PERCENT, y: y + 4, "text-anchor": "end" }, "model’s own"));
  return node;
}

function bar(probability, x, y) {
  return [
    svg("rect", { class: "bar-space", x, y: y - 2.5, width: BAR, height: 5, rx: 2.5 }),
    svg("rect", { class: "bar", x, y: y - 2.5, width: Math.max(BAR * probability, 1.5), height: 5, rx: 2.5 }),
    svg("text", { class: "percent", x: x + BAR + PERCENT, y: y + 4, "text-anchor": "end" }, percent(probability)),
  ];
}

/** Highlight what a node sees while it is pointed at or focused; move between nodes by keys. */
function followPointerAndKeys(figure, rows, caption) {
  const resting = caption.textContent;
  const show = (at) => {
    const seen = new Set(at === null ? [] : lineage(rows, at));
    for (const part of figure.querySelectorAll("[data-row]")) {
      part.classList.toggle("pointed", Number(part.dataset.row) === at);
      part.classList.toggle("seen", seen.has(Number(part.dataset.row)));
    }
    caption.textContent = at === null ? resting : `${describe(rows[at])}. ${sight(rows, at)}`;
  };
  figure.addEventListener("pointerover", (event) => show(rowAt(event)));
  figure.addEventListener("pointerleave", () => show(null));
  figure.addEventListener("focusin", (event) => show(rowAt(event))); // on the tree itself, it would make the tree a tab stop
  figure.addEventListener("focusout", () => show(null));
  figure.addEventListener("keydown", (event) => moveFocus(event, [...figure.querySelectorAll("[role=treeitem]")]));
}

function moveFocus(event, nodes) {
  const at = nodes.findIndex((node) => node.contains(event.target));
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
  if (at < 0 || next === undefined) return;
  event.preventDefault();
  if (!nodes[next]) return;
  nodes[at].setAttribute("tabindex", "-1");
  nodes[next].setAttribute("tabindex", "0");
  nodes[next].focus();
}

function rowAt(event) {
  const part = event.target.closest("[data-row]");
  return part ? Number(part.dataset.row) : null;
}

function sight(rows, at) {
  if (rows[at].kind === "bonus") return "It was not in the tree: it is what the model itself chose after the accepted path.";
  const above = lineage(rows, at)
    .slice(1)
    .reverse()
    .map((row) => quoted(rows[row].text));
  return above.length === 0
    ? "It sees the text so far and itself."
    : `It sees the text so far, ${above.join(", ")} and itself, but none of its rivals.`;
}

function describe(row) {
  if (row.kind === "root") return `${quoted(row.text)}, decided before this pass`;
  if (row.kind === "bonus") return `${quoted(row.text)}, the model’s own token`;
  return `${quoted(row.text)}, ${wordsOf(row)}, ${row.kind}, probability ${percent(row.probability)}`;
}

function percent(probability) {
  const value = probability * 100;
  return value > 0 && value < 1 ? "< 1 %" : `${Math.round(value)} %`;
}

function shown(row) {
  return shortened(label(row.text), LONGEST);
}
