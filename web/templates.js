// The templates of this pack in the order in which one meets them; the server lists them as its disk does.

import { api } from "./graph.js";

const FIRST = ["amg_first_look", "amg_off_on", "amg_probe_picture"];
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.match(/\/extensions\/([^/]+)\//)?.[1] ?? "");

/** Names of templates: those to begin with, then the others by name. */
export function ordered(names) {
  const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...names].sort((one, other) => place(one) - place(other) || (one < other ? -1 : 1));
}

export function watch() {
  const ask = api.getWorkflowTemplates;
  if (!ask) return;
  api.getWorkflowTemplates = async function (...args) {
    const found = await ask.apply(this, args);
    if (!Array.isArray(found?.[FOLDER])) return found;
    return { ...found, [FOLDER]: ordered(found[FOLDER]) };
  };
}
