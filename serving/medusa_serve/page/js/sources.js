/** Where a token can come from: its mark, its style and its words. Each kind has a mark and a line of its own, not only a colour. */

const MOST_TINTS = 6; // the style sheet has this many tints of a kind; deeper heads share the last one

const SOURCES = {
  model: { style: "from-model", mark: () => "", words: () => "chosen by the model itself" },
  head: { style: "from-head", mark: (depth) => String(depth), words: (depth) => `guessed by head ${depth}` },
  ngrams: {
    style: "from-ngrams",
    mark: (depth) => `${depth}+`,
    words: (depth) => `guessed by head ${depth} with the help of n-grams`,
  },
  lookup: { style: "from-lookup", mark: () => "↩", words: () => "copied from earlier text by prompt lookup" },
  guide: { style: "from-guide", mark: () => "=", words: () => "the only token that the asked-for format allows" },
};

/** The classes that tint a token or node. */
export function styleOf({ source, depth }) {
  return `${known(source).style} depth-${Math.min(Math.max(depth, 0), MOST_TINTS)}`;
}

/** A short mark that tells the source without colour, such as "2" for head 2; "" for the model itself. */
export function markOf({ source, depth }) {
  return known(source).mark(depth);
}

/** A few words, such as "guessed by head 2". */
export function wordsOf({ source, depth }) {
  return known(source).words(depth);
}

/** A token's text for use in a sentence: quoted, without the space before it, with names for what cannot be seen. */
export function quoted(text) {
  if (text === "") return "a token without text";
  if (/^ +$/.test(text)) return text.length === 1 ? "a space" : `${text.length} spaces`;
  if (/^\s+$/.test(text)) return text.includes("\n") ? "a new line" : "white space";
  return `“${text.trim()}”`;
}

/** A token's text with visible marks for white space. */
export function visible(text) {
  return text === "" ? "∅" : text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
}

/** A token's text for a drawing: without the white space around it, if there is anything else. */
export function label(text) {
  const core = text.trim();
  return core === "" ? visible(text) : core.replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/** A text of so many letters at most. */
export function shortened(text, longest) {
  const letters = [...text];
  return letters.length > longest ? `${letters.slice(0, longest - 1).join("")}…` : text;
}

function known(source) {
  return SOURCES[source] ?? { style: "from-other", mark: () => "?", words: () => `source: ${source}` };
}
