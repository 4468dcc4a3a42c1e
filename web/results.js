// Results that nodes have left, put on their panels again: from the node's output when it has run, from the
// host's history where nothing was executed or the page was reloaded, and from a picture that is dropped.

import { api, app, nodeOf } from "./graph.js";
import { isTold, whenLoaded } from "./events.js";
import * as grid from "./grid.js";
import * as live from "./live.js";
import * as probe from "./probe.js";
import * as said from "./said.js";
import { t } from "./words.js";

const REPORT = "amg_report"; // of an output, and of a picture's metadata
const READERS = { [REPORT]: live.finished, amg_said: said.finished, amg_probe: probe.finished, amg_grid: grid.finished };
const RUNS = 32; // of the history, after a reload
const TRIES = 20; // the host writes its history shortly after it says that a run has ended
const PAUSE = 250; // milliseconds
const LONGEST = 4_000_000; // characters of a report

/** Show what a node has left in its output. */
function put(of, output) {
  for (const [key, read] of Object.entries(READERS)) {
    const given = output?.[key]?.[0];
    if (given) read({ ...of, id: given.node ?? of.id, kind: given.class }, given);
  }
}

function putAll(outputs, of) {
  for (const [id, output] of Object.entries(outputs ?? {})) put({ ...of, id }, output);
}

async function ask(path) {
  const answer = await api.fetchApi(path);
  return answer.ok ? await answer.json() : {};
}

// ------------------------------------------------------------ from the host's cache

const reused = new Set(); // prompts of which the host has reused nodes

/** What the host has reused it tells only in its history. */
async function recall(prompt) {
  for (let i = 0; i < TRIES; i++) {
    const found = (await ask(`/history/${prompt}`))[prompt];
    if (found) return putAll(found.outputs, { prompt });
    await new Promise((then) => setTimeout(then, PAUSE));
  }
}

// ------------------------------------------------------------ after a reload

let past = null; // a promise of the runs before this page: [{ workflow, prompt, outputs, error }], oldest first

async function history() {
  const every = Object.entries(await ask(`/history?max_items=${RUNS}`));
  return every.map(([prompt, { prompt: queued, outputs, status }]) => ({
    workflow: queued?.[3]?.extra_pnginfo?.workflow?.id,
    prompt,
    outputs,
    error: status?.messages?.find(([kind]) => kind === "execution_error")?.[1],
  }));
}

async function restore() {
  if (isTold()) return;
  const runs = await past;
  if (isTold()) return;
  const id = app.rootGraph?.id ?? app.graph?.id;
  const mine = runs.filter((run) => run.workflow && run.workflow === id);
  for (const { prompt, outputs } of mine) putAll(outputs, { prompt, here: true });
  if (mine.at(-1)?.error) said.failed(mine.at(-1).error);
}

// ------------------------------------------------------------ from a picture

/** The text that a PNG has under `key`, or "". */
export async function textOfPNG(file, key) {
  const data = new DataView(await file.arrayBuffer());
  const read = (from, length) => new TextDecoder("latin1").decode(new Uint8Array(data.buffer, from, length));
  if (data.byteLength < 8 || read(1, 3) !== "PNG") return "";
  for (let at = 8; at + 12 <= data.byteLength; ) {
    const length = data.getUint32(at);
    const kind = read(at + 4, 4);
    if (kind === "IDAT" || at + 12 + length > data.byteLength) return "";
    if (kind === "tEXt" && read(at + 8, Math.min(length, key.length + 1)) === `${key}\0`) {
      return read(at + 9 + key.length, length - key.length - 1);
    }
    at += 12 + length;
  }
  return "";
}

async function reportsOf(file) {
  if (file?.type !== "image/png") return {};
  try {
    if (!(await textOfPNG(file, "workflow")) && !(await textOfPNG(file, "prompt"))) return {}; // opens no workflow
    const text = await textOfPNG(file, REPORT);
    return text && text.length <= LONGEST ? JSON.parse(text) : {};
  } catch {
    return {};
  }
}

/** The report that node `id` wrote: on that node, or on the Apply AMG before it. */
function putReport(id, report, origin) {
  const node = nodeOf(id);
  const of = { id, kind: node?.comfyClass, here: true };
  if (node?.comfyClass === "AMG_Report") {
    const { said: result } = live.read(report, { origin });
    said.finished(of, { lines: [{ messages: [{ code: "as_written", words: origin }], words: origin }, result] });
    const by = node.getInputNode?.(node.findInputSlot("run"));
    if (by?.comfyClass !== "AMG_Apply") return;
    of.id = [...String(id).split(":").slice(0, -1), by.id].join(":");
    of.kind = by.comfyClass;
  }
  if (live.KINDS.includes(of.kind)) live.finished(of, report, { origin });
}

// ------------------------------------------------------------

export function watch() {
  api.addEventListener("executed", ({ detail }) => {
    put({ id: detail.display_node ?? detail.node, prompt: detail.prompt_id }, detail.output);
  });
  api.addEventListener("execution_cached", ({ detail }) => {
    if (detail.nodes?.length) reused.add(detail.prompt_id);
  });
  api.addEventListener("execution_success", ({ detail }) => {
    if (reused.delete(detail.prompt_id)) recall(detail.prompt_id);
  });
  past = history().catch(() => []);
  whenLoaded(restore);
  restore();
  const handle = app.handleFile;
  app.handleFile = async function (file, ...more) {
    const reports = await reportsOf(file);
    const answer = await handle.call(this, file, ...more);
    const origin = t("From the report in the picture <name>.", { name: file?.name ?? "" });
    for (const [id, report] of Object.entries(reports ?? {})) {
      try {
        putReport(id, report, origin);
      } catch (error) {
        console.warn("AMG: the report in this picture cannot be shown.", error);
      }
    }
    return answer;
  };
}
