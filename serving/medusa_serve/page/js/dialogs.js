/** The two dialogs: settings, and the API key, which is asked for only if the server wants one. */

import { byId } from "./dom.js";

/** @param {import("./settings.js").Settings} settings */
export function bindSettings(settings) {
  const dialog = byId("settings");
  const fields = {
    temperature: byId("temperature"),
    maxTokens: byId("max-tokens"),
    system: byId("system"),
    together: byId("together"),
  };
  const forget = byId("forget-key");
  byId("open-settings").addEventListener("click", () => {
    fields.temperature.value = settings.temperature;
    fields.maxTokens.value = settings.maxTokens;
    fields.system.value = settings.system;
    fields.together.checked = settings.together;
    forget.hidden = !settings.apiKey;
    dialog.showModal();
  });
  forget.addEventListener("click", () => {
    settings.changeKey(null);
    forget.hidden = true;
  });
  byId("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    settings.change({
      temperature: fields.temperature.valueAsNumber,
      maxTokens: fields.maxTokens.valueAsNumber,
      system: fields.system.value,
      together: fields.together.checked,
    });
    dialog.close();
  });
  byId("settings-cancel").addEventListener("click", () => dialog.close());
}

/**
 * Make a function that asks for the key. Calls that come while the dialog is open share its answer.
 * @param {import("./settings.js").Settings} settings
 * @returns {() => Promise<boolean>} whether a key was given
 */
export function makeKeyDialog(settings) {
  const dialog = byId("key");
  const field = byId("key-field");
  let asked = null;
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    settings.changeKey(field.value.trim());
    dialog.close("given");
  });
  byId("key-cancel").addEventListener("click", () => dialog.close());
  return () => {
    asked ??= new Promise((resolve) => {
      byId("key-refused").hidden = !settings.apiKey;
      field.value = "";
      dialog.returnValue = "";
      dialog.addEventListener(
        "close",
        () => {
          asked = null;
          resolve(dialog.returnValue === "given");
        },
        { once: true },
      );
      dialog.showModal();
    });
    return asked;
  };
}
