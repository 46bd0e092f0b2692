/** Sizes that the tree and the mask share, so that their rows are at one height. In pixels of the drawing. */

export const ROW = 30;
export const HEAD = 62; // above the first row, for headings

/** The baseline of headings. */
export const HEADING = HEAD - 16;

/** The height of a row's middle. */
export function middle(row) {
  return HEAD + row * ROW + ROW / 2;
}
