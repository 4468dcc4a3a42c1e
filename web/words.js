// The page's own words in the artist's language: locales/<language>/main.json, its texts under "amg" by
// the English text, what the server tells under "amg_messages" by a code.

import { api, app, shown } from "./graph.js";

const BETWEEN = " · ";
const PLACE = /<(\w+)(?::(\d))?>/g; // what stands for a value, and how many decimals that has

let texts = {}; // language -> main.json

let asked = null; // a promise of them

/** Ask the host once; without an answer the page speaks English. */
export function learn() {
  asked ??= api
    .fetchApi("/i18n")
    .then((answer) => answer.json())
    .then((found) => (texts = found))
    .catch(() => {});
  return asked;
}

function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** The words, of all languages, by which people may search for the nodes of that part of the category. */
export function searched(part) {
  const every = Object.values(texts).map((each) => each.amg_search?.[part] ?? "");
  return [...new Set(every.join(", ").split(", "))].filter(Boolean);
}

/** The words for the choices of the widgets of that name: { choice: words }; undefined where they need none. */
export function choices(widget) {
  return texts[language()]?.amg_choices?.[widget] ?? texts.en?.amg_choices?.[widget];
}

/** `text` in the host's language, with what stands for <name> put in. */
export function t(text, values = {}) {
  const found = texts[language()]?.amg?.[text] ?? text;
  return found.replace(PLACE, (whole, name) => values[name] ?? whole);
}

/** The papers' figures, for a tooltip: what is shown is on one scale for all descriptors. */
export function inOwnUnit(similarity, threshold) {
  const values = { value: shown(similarity), limit: shown(threshold) };
  return t("In the units of the index's descriptor: similarity <value>, threshold <limit>.", values);
}

/** What the server told, { messages, words }, in the host's language; `words` where that cannot be read. */
export function said({ messages, words }) {
  const known = { ...texts.en?.amg_messages, ...texts[language()]?.amg_messages };
  try {
    return messages.map((each) => sentence(each, known)).join(BETWEEN);
  } catch {
    return words; // a code that is unknown here, or a damaged report
  }
}

/** As `words` of amg_core/messages.py does it. */
function sentence(message, known) {
  if (!Object.hasOwn(known, message.code)) throw new RangeError(`no sentence for ${message.code}`);
  return known[message.code].replace(PLACE, (_, name, decimals) => value(message[name], decimals, known));
}

function value(given, decimals, known) {
  if (Array.isArray(given)) return given.map((each) => value(each, decimals, known)).join(", ");
  if (typeof given === "object") return sentence(given, known);
  if (typeof given === "string") return given;
  return (decimals ? given.toFixed(decimals) : String(given)).replace("-", "−");
}
