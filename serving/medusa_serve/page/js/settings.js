/** Settings of the page. They live as long as the browser tab; the API key goes nowhere else. */

const STORED = "medusa-page-settings";
const STORED_KEY = "medusa-page-api-key";
const DEFAULTS = { temperature: 0, maxTokens: 256, system: "", together: false, compare: false, view: "tokens" };

export class Settings {
  constructor() {
    Object.assign(this, DEFAULTS, read());
    this.apiKey = sessionStorage.getItem(STORED_KEY);
  }

  /** Change some of them and remember all. */
  change(changes) {
    Object.assign(this, changes);
    const kept = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, this[name]]));
    sessionStorage.setItem(STORED, JSON.stringify(kept));
  }

  /** @param {string | null} key null to forget it */
  changeKey(key) {
    this.apiKey = key;
    if (key) sessionStorage.setItem(STORED_KEY, key);
    else sessionStorage.removeItem(STORED_KEY);
  }
}

function read() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "{}");
    return Object.fromEntries(Object.entries(stored).filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
  } catch {
    return {}; // not ours, or damaged: the defaults hold
  }
}
