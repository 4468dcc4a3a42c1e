// What nodes inside a subgraph have found is said on the subgraph's node, too: no copy is hidden in a box.

import { nodeOf } from "./graph.js";
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

export function watch() {
  whenShown(({ id }) => around(id).forEach(tellOutside));
}
