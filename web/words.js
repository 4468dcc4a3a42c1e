// The page's own words in the artist's language: locales/<language>/main.json, under "amg".

import { api, app } from "./graph.js";

// What the server says of a finished picture, sentence by sentence; <name> stands for what differs.
const SENTENCES = [
  "A copy of <source>: both checks agree.",
  "A copy of <source>, by the first check alone.",
  "A copy of <source>, by the second check alone: look at both.",
  "Not a copy of anything in this index (nearest: <source>).",
  "measured <number> of <count>",
  "by the VAE",
  "through <decoder>",
  "STILL A COPY: picture <number>",
  "STILL A COPY: pictures <numbers>",
  "replaced by a blank",
  "no copy",
  "cannot tell of picture <number>: <reason>",
  "picture <number> drawn again: closeness <before> → <after>",
  "closeness <value>, copy above <limit>",
  "Cannot tell: <reason>.",
  "not judged",
  "nothing here decodes these latents: connect the vae",
  "sampling was not finished: noise is left for another sampler",
  "the run did not end",
  "steps not seen by the guard: <count>",
  "denoised_output was a copy and is blank now: <numbers>",
];
const BETWEEN = " · ";

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

/** A text of the server's, in the host's language as far as its sentences are known here. */
export function said(text) {
  return text.split(BETWEEN).map(sentence).join(BETWEEN);
}

function sentence(text) {
  for (const known of SENTENCES) {
    const parts = known.split(/<\w+>/).map((part) => part.replace(/[.()]/g, "\\$&"));
    const ended = new RegExp(`^${parts.join("(.+?)").replace(/\\\.$/, "\\.?")}$`, "s");
    const found = text.match(ended);
    if (!found) continue;
    const names = [...known.matchAll(/<(\w+)>/g)].map(([, name]) => name);
    const words = t(known, Object.fromEntries(names.map((name, i) => [name, found[i + 1]])));
    return known.endsWith(".") && !text.endsWith(".") ? words.replace(/[.。]$/, "") : words;
  }
  return text;
}
