/** Copying text, also on pages without HTTPS, which browsers keep from the clipboard's API. */

import { element } from "./dom.js";

/** @returns {Promise<boolean>} whether it worked */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text);
  }
}

function copySelected(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "off-screen", readonly: true, "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const hasWorked = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return hasWorked;
}
