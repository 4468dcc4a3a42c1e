// What the server tells of nodes, put where it belongs: on the nodes of the workflow that was run.
//
// Many workflows are open at a time, and their nodes bear the same ids. So it is noted from where each
// prompt was queued, and what is told of it is shown only there: at once, or when that workflow is loaded
// again. Undo, too, makes new node objects of the same workflow.

import { api, app, nodeOf } from "./graph.js";

const MOST = 500; // prompts remembered; the host's own queue is shorter
const origins = new Map(); // prompt id -> workflow it was queued from
const known = new Map(); // workflow -> Map(execution id -> { kind, prompt, state, show })
let loading = 0; // while the host loads, the nodes are already those of a workflow that is not yet `here`

/** The open workflow: an object of the front end's that stays the same while it is open. */
function here() {
  return app.extensionManager?.workflow?.activeWorkflow ?? app.rootGraph?.id ?? app.graph?.id;
}

function bounded(map, key, value) {
  map.delete(key);
  map.set(key, value);
  if (map.size > MOST) map.delete(map.keys().next().value);
}

/**
 * Something was told of the node with execution id `id`, of class `kind`, in a prompt.
 *
 * change(state): the new state of that node; state is null at first. show(node, state): called now if its
 * workflow is open, and whenever it is loaded. A prompt that this page did not queue (it was before a
 * reload) is taken for one of the open workflow, and shown on a node of that class only.
 */
export function tell({ id, kind, prompt }, change, show) {
  const place = origins.get(prompt) ?? here();
  if (prompt && !origins.has(prompt)) bounded(origins, prompt, place); // it stays where it was first shown
  if (!known.has(place)) bounded(known, place, new Map());
  const nodes = known.get(place);
  const before = nodes.get(id);
  const state = change(before?.kind === kind ? before.state : null);
  nodes.set(id, { kind, prompt, state, show });
  if (place === here()) showOn(id, nodes.get(id));
}

/** Change what was told of each node in a prompt, as `tell` does. */
export function tellAll(prompt, change) {
  const place = origins.get(prompt) ?? here();
  for (const [id, entry] of known.get(place) ?? []) {
    if (entry.prompt !== prompt) continue;
    entry.state = change(entry.kind, entry.state);
    if (place === here()) showOn(id, entry);
  }
}

function showOn(id, { kind, state, show }) {
  if (loading) return; // shown when it has loaded
  const node = nodeOf(id);
  if (node?.comfyClass === kind) show(node, state);
}

export function watch() {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...args) {
    const place = here();
    const answer = await queue.apply(this, args);
    if (answer?.prompt_id) bounded(origins, answer.prompt_id, place);
    return answer;
  };
  const load = app.loadGraphData;
  app.loadGraphData = async function (...args) {
    loading += 1;
    try {
      return await load.apply(this, args);
    } finally {
      loading -= 1;
      for (const [id, entry] of known.get(here()) ?? []) showOn(id, entry);
    }
  };
}
