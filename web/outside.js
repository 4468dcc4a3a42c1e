// What nodes inside a subgraph have found is said on the subgraph's node, too, and in App mode in a message:
// no copy is hidden in a box.

import { app, nodeOf } from "./graph.js";
import { inside, whenShown } from "./events.js";
import * as live from "./live.js";
import * as probe from "./probe.js";
import * as said from "./said.js";

const SUMMARY = { live: live.summary, probe: probe.summary, said: said.summary };
const WORST = ["error", "copy", "unknown", "said", "no_copy"]; // first

/** The execution ids of the subgraph nodes around a node: "12" and "12:3" of "12:3:4". */
function around(id) {
  const parts = String(id).split(":");
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join(":"));
}

function tellOutside(outer) {
  const box = nodeOf(outer);
  if (!box?.subgraph) return;
  const found = [];
  for (const { id, kind, part, state } of inside(outer)) {
    const node = nodeOf(id);
    const each = node?.comfyClass === kind && SUMMARY[part]?.(state);
    if (each?.text) found.push({ ...each, text: `${node.title}: ${each.text}` });
  }
  const place = ({ outcome }) => WORST.indexOf(outcome);
  found.sort((one, other) => place(one) - place(other));
  const texts = found.map(({ text }) => text);
  said.repeat(box, texts, found[0]?.outcome ?? "said");
}

const VERDICTS = ["live", "probe"]; // parts
const BRIEF = 10_000; // milliseconds
const told = new WeakSet(); // results that were told

/** Where the graph is not seen, as in App mode: a verdict in a message. That of a copy stays until it is closed. */
function tellAnyway({ part, id, state }) {
  const found = VERDICTS.includes(part) && SUMMARY[part](state);
  if (!found?.text || told.has(state)) return;
  told.add(state);
  if (app.canvas?.canvas?.checkVisibility?.() ?? true) return;
  const severity = found.outcome === "copy" ? "warn" : "info";
  const life = found.outcome === "copy" ? undefined : BRIEF;
  app.extensionManager?.toast?.add({ severity, summary: nodeOf(id).title, detail: found.text, life });
}

export function watch() {
  whenShown(({ id }) => around(id).forEach(tellOutside));
  whenShown(tellAnyway);
}
