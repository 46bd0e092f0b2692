/** What comparing an answer with the same answer without Medusa has shown, said honestly. */

import { number } from "./meter.js";

/**
 * Compare two answers to one prompt that have both ended.
 * @param {import("./answer.js").Answer} on with Medusa
 * @param {import("./answer.js").Answer} off without
 * @param {{together: boolean, temperature: number}} run
 * @returns {{headline: string, lines: string[]}}
 */
export function compare(on, off, { together, temperature }) {
  const lines = [
    together
      ? "Both answers ran at once and shared one machine, so each was slower than it would be alone."
      : "Both answers ran on one machine, one after the other.",
  ];
  if (on.state !== "done" || off.state !== "done")
    return { headline: "No comparison: one of the two answers did not run to its end.", lines };
  lines.unshift(sameness(on.tokenIds, off.tokenIds, temperature));
  if (on.tokensPerSecond === null || off.tokensPerSecond === null)
    return { headline: "No comparison: the answers are too short.", lines };
  const ratio = on.tokensPerSecond / off.tokensPerSecond;
  lines.push(
    `Speeds count from the first token on, because Medusa does not speed up the reading of the prompt. The first token came after ${number(on.firstTokenSeconds, 2)} s with Medusa and after ${number(off.firstTokenSeconds, 2)} s without${isReused(off) ? "; the second answer found the prompt in the server’s cache" : ""}.`,
  );
  return { headline: headline(ratio, on, off), lines };
}

function headline(ratio, on, off) {
  const times = `${number(on.elapsed(0), 1)} s with Medusa, ${number(off.elapsed(0), 1)} s without.`;
  if (Math.abs(ratio - 1) < 0.03) return `As fast as without Medusa: ${times}`;
  return ratio > 1 ? `${number(ratio, 2)} times as fast: ${times}` : `Slower: ${number(ratio, 2)} times the speed. ${times}`;
}

function sameness(on, off, temperature) {
  const shorter = Math.min(on.length, off.length);
  const differs = on.findIndex((id, at) => at < shorter && id !== off[at]);
  if (differs < 0 && on.length === off.length) return `Both texts are the same, token for token (${on.length} tokens).`;
  if (temperature > 0)
    return `The texts differ: at temperature ${temperature}, each answer draws its own random numbers. Set it to 0 to compare texts.`;
  return `The texts differ from token ${(differs < 0 ? shorter : differs) + 1} on.`;
}

function isReused(answer) {
  return (answer.usage?.prompt_tokens_details?.cached_tokens ?? 0) > 0;
}
