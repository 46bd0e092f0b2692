/** A model's Markdown as elements. The text is not trusted: DOMPurify decides what may become an element. */

import { Marked } from "../vendor/marked.esm.js";
import createPurifier from "../vendor/purify.es.mjs";

const SAFE_LINK = /^(?:https?|mailto):/i;
const ALLOWED_TAGS = [
  "a",
  "blockquote",
  "br",
  "code",
  "del",
  "em",
  "h1",
  "h2",
  "h3",
  "h4",
  "h5",
  "h6",
  "hr",
  "li",
  "ol",
  "p",
  "pre",
  "strong",
  "table",
  "tbody",
  "td",
  "th",
  "thead",
  "tr",
  "ul",
];

/**
 * Make a function that renders Markdown.
 * @returns {(text: string) => DocumentFragment}
 */
export function makeRenderer() {
  const marked = new Marked({ gfm: true, breaks: false, async: false });
  marked.use({
    renderer: {
      html: ({ text }) => escaped(text), // HTML in an answer is shown as it was written
      image: ({ text, href }) => escaped(`[image: ${text || href}]`), // no image is loaded
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    },
  });
  const purifier = createPurifier(window);
  purifier.addHook("afterSanitizeAttributes", secureLink);
  const options = {
    ALLOWED_TAGS,
    ALLOWED_ATTR: ["href", "start", "align"],
    ALLOWED_URI_REGEXP: SAFE_LINK,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  };
  return (text) => purifier.sanitize(marked.parse(text), options);
}

function secureLink(node) {
  if (node.tagName !== "A") return;
  if (!SAFE_LINK.test(node.getAttribute("href") ?? "")) {
    // also drops relative links: an answer has no business on this server
    node.removeAttribute("href");
    return;
  }
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
}

function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}
