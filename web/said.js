// The panel of nodes whose result is text, and of errors on all nodes of this pack.

import { addPanel, api, el, grow, LINE, linesOf, tameText } from "./graph.js";
import { tell, tellAll } from "./events.js";
import { said, t } from "./words.js";

export const PANEL = "amg_said"; // the widget
const PART = "said";
const HIGHEST = 220; // pixels; longer text is scrolled
const AROUND = 36; // pixels: the padding, and what the host leaves free around a panel

const OURS = "amg."; // errors with a sentence that says all
const NOTHING = { lines: [], error: "" };
const panels = new WeakMap(); // node -> { element, inner }

function make(node) {
  const inner = el("div");
  const attributes = { tabindex: "0", role: "region", "aria-label": t("Result"), "aria-live": "polite" };
  const element = el("section", { class: "amg-panel amg-said", ...attributes }, inner);
  addPanel(node, PANEL, element, () => height(node, inner));
  return { element, inner };
}

/** About the pixels that the panel needs. The host asks before the text is laid out. */
function height(node, inner) {
  if (!inner.children.length) return 0;
  const lines = [...inner.children].map(({ textContent }) => linesOf(textContent, node.size[0] - 44));
  return Math.min(HIGHEST, lines.reduce((sum, count) => sum + LINE * count + 2, 0) + AROUND);
}

function write(node, texts, outcome) {
  if (!panels.has(node)) {
    if (!texts.length) return;
    panels.set(node, make(node));
  }
  const { element, inner } = panels.get(node);
  inner.replaceChildren(...texts.map((text) => el("p", { text })));
  element.dataset.outcome = outcome;
  element.hidden = !texts.length;
  tameText(node, true);
  grow(node);
}

function show(node, { lines, error }) {
  if (error) return write(node, [t("Error: <words>", { words: error })], "error");
  write(node, lines.map(said).filter(Boolean), "said");
}

/** The first line of a node's result, or its error. */
export function summary({ lines, error }) {
  if (error) return { text: t("Error: <words>", { words: error }), outcome: "error" };
  return lines.length ? { text: said(lines[0]), outcome: "said" } : null;
}

/** Lines from elsewhere on a node that has no result of its own; none hides them. */
export function repeat(node, texts, outcome) {
  write(node, texts, outcome);
}

/** Advice on a node that has not run. */
export function hint(node, text) {
  write(node, [text], "said");
}

/** Text of a run that goes on, in place of the result of the run before. */
export function progress(node, text) {
  if (panels.has(node)) write(node, text.split("\n"), "running");
}

/** The result of a node: { lines: [{ messages, words }] }. */
export function finished(of, { lines }) {
  if (Array.isArray(lines)) tell(of, PART, () => ({ lines, error: "" }), show);
}

/** The host's event of an error: said on the node, in the error's own words. */
export function failed({ node_id: id, node_type: kind, prompt_id: prompt, exception_type, exception_message }) {
  if (!kind?.startsWith("AMG_")) return;
  const words = exception_message.trim();
  const error = exception_type.startsWith(OURS) ? words : `${exception_type}: ${words}`;
  tell({ id, kind, prompt }, PART, () => ({ lines: [], error }), show);
}

export function watch() {
  api.addEventListener("execution_error", ({ detail }) => failed(detail));
  api.addEventListener("execution_start", ({ detail }) => {
    tellAll(detail.prompt_id, PART, (state) => (state.error ? NOTHING : state));
  });
}
