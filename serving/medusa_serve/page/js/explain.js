/** One sentence or two about a step, for somebody who has never heard of Medusa. */

import { quoted } from "./sources.js";

/**
 * The model's own token at the end of a step; null if the answer ended before it.
 * @param {import("./answer.js").Step} step
 */
export function bonusOf(step) {
  const last = step.tokens.at(-1);
  const numAccepted = step.draft ? step.draft.accepted.length - 1 : 0;
  return step.tokens.length > numAccepted && last?.source === "model" ? last : null;
}

/**
 * What is seen in a step.
 * @param {import("./answer.js").Step} step
 * @param {{isFirst: boolean, isMedusaOn: boolean}} facts
 */
export function explainStep(step, { isFirst, isMedusaOn }) {
  const numGuesses = (step.draft?.nodes.length ?? 1) - 1;
  const own = bonusOf(step);
  if (numGuesses === 0) return withoutGuesses(own ?? step.tokens[0], isFirst, isMedusaOn);
  const right = step.draft.accepted.slice(1).map((at) => step.draft.nodes[at]);
  if (right.length === 0) return noneRight(numGuesses, own);
  const agreed = agreement(right.length, numGuesses);
  const added = own ? ` and added ${quoted(own.text)} itself` : "";
  const ended = own ? "" : " The answer ended here.";
  return `${capital(guesses(right))}. ${agreed}${added}, so this pass gave out ${count(step.tokens.length, "token")}${step.tokens.length > 1 ? " instead of one" : ""}.${ended}`;
}

function withoutGuesses(token, isFirst, isMedusaOn) {
  const text = quoted(token?.text ?? "");
  if (isFirst)
    return `This is the first pass: the model reads the prompt and chooses ${text} itself. Nothing has been guessed yet.`;
  if (!isMedusaOn) return `Medusa is off, so nothing was guessed. One pass of the whole model gave out one token: ${text}.`;
  return `No guess was likely enough to be worth checking, so this pass gave out one token, ${text}, as it would without Medusa.`;
}

function noneRight(numGuesses, own) {
  const lead =
    numGuesses === 1
      ? "There was one guess, and the model did not agree with it."
      : `There were ${numGuesses} guesses, and the model agreed with none of them.`;
  return own
    ? `${lead} Its own token ${quoted(own.text)} took their place: one token from one pass, as without Medusa. The text is not harmed.`
    : lead;
}

function agreement(numRight, numGuesses) {
  if (numGuesses === 1) return "It was the only guess; the model agreed with it";
  if (numRight === numGuesses) return `The model agreed with all ${numGuesses} guesses`;
  return `The model agreed with ${numRight} of the ${numGuesses} guesses`;
}

/** "head 1 guessed “ make”, head 2 “ a”", with what prompt lookup copied joined. */
function guesses(nodes) {
  const parts = [];
  for (const { source, depth, text } of nodes) {
    const last = parts.at(-1);
    if (source === "lookup" && last?.source === "lookup") last.text += text;
    else parts.push({ source, depth, text });
  }
  let verb = "";
  const said = parts.map(({ source, depth, text }) => {
    const who = whoGuessed(source, depth);
    const isRepeated = who.verb === verb;
    verb = who.verb;
    return `${who.name}${isRepeated ? "" : ` ${who.verb}`} ${quoted(text)}`;
  });
  return said.length < 2 ? said[0] : `${said.slice(0, -1).join(", ")} and ${said.at(-1)}`;
}

function whoGuessed(source, depth) {
  if (source === "lookup") return { name: "prompt lookup", verb: "copied" };
  if (source === "guide") return { name: "the asked-for format", verb: "allowed only" };
  return { name: `head ${depth}`, verb: "guessed" };
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
