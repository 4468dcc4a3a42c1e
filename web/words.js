// The page's own words in the artist's language: locales/<language>/main.json, under "amg".

import { api, app } from "./graph.js";

let told = {}; // language -> English -> translation

/** Ask the host once; without an answer the page speaks English. */
export async function learn() {
  try {
    const all = await (await api.fetchApi("/i18n")).json();
    told = Object.fromEntries(Object.entries(all).map(([code, each]) => [code, each.amg ?? {}]));
  } catch {
    told = {};
  }
}

/** `text` in the host's language, with what stands for <name> put in. */
export function t(text, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const found = told[language]?.[text] ?? text;
  return found.replace(/<(\w+)>/g, (whole, name) => values[name] ?? whole);
}
