// What the server tells of nodes, put where it belongs: on the nodes of the workflow that was run.
//
// Many workflows are open at a time, and their nodes bear the same ids. So it is noted from where each
// prompt was queued, and what is told of it is shown only there: at once, or when that workflow is loaded
// again. Undo, too, makes new node objects of the same workflow.

import { api, app, nodeOf } from "./graph.js";

const MOST = 500; // prompts remembered; the host's own queue is shorter
const origins = new Map(); // prompt id -> workflow it was queued from
const known = new Map(); // workflow -> Map("part id" -> { id, kind, prompt, part, state, show })
const shown = []; // functions to call when something was shown on a node
const loaded = []; // functions to call when a workflow was loaded
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
 * part: what it is about; a node has a state for each. change(state, same): the new state of that part; state
 * is null at first, `same` says whether it is of this prompt. show(node, state): called now if the workflow is
 * open, and whenever it is loaded. A prompt that this page did not queue (it was before a reload) is taken for
 * one of the open workflow, and shown on a node of that class only. So is what comes from elsewhere (`here`).
 */
export function tell({ id, kind, prompt, here: anyway }, part, change, show) {
  const place = anyway ? here() : (origins.get(prompt) ?? here());
  if (prompt && !origins.has(prompt)) bounded(origins, prompt, place); // it stays where it was first shown
  if (!known.has(place)) bounded(known, place, new Map());
  const entries = known.get(place);
  const key = `${part} ${id}`;
  const before = entries.get(key);
  const state = change(before?.kind === kind ? before.state : null, before?.prompt === prompt);
  entries.set(key, { id, kind, prompt, part, state, show });
  if (place === here()) showOn(entries.get(key));
}

/** Change the state of that part of each node in the workflow of a prompt, as `tell` does. */
export function tellAll(prompt, part, change) {
  const place = origins.get(prompt) ?? here();
  for (const entry of known.get(place)?.values() ?? []) {
    if (entry.part !== part) continue;
    entry.state = change(entry.state, entry.prompt === prompt);
    if (place === here()) showOn(entry);
  }
}

/** Whether anything was told of the open workflow. */
export function isTold() {
  return known.has(here());
}

/** Call `then` whenever a workflow was loaded, after what is known of it was shown. */
export function whenLoaded(then) {
  loaded.push(then);
}

/** What is known of nodes inside the subgraph node with that execution id, of the open workflow. */
export function inside(outer) {
  return [...(known.get(here())?.values() ?? [])].filter(({ id }) => String(id).startsWith(`${outer}:`));
}

/** Call `then` with what `tell` was given, whenever it was shown on its node. */
export function whenShown(then) {
  shown.push(then);
}

function showOn(entry) {
  if (loading) return; // shown when it has loaded
  const node = nodeOf(entry.id);
  if (node?.comfyClass !== entry.kind) return;
  entry.show(node, entry.state);
  for (const then of shown) then(entry);
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
      for (const entry of known.get(here())?.values() ?? []) showOn(entry);
      if (!loading) for (const then of loaded) then();
    }
  };
}
