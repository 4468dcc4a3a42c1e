// The panel of nodes whose result is text, and of errors on all nodes of this pack.

import { addPanel, api, el, LINE, linesOf, panelOf, settle } from "./graph.js";
import { tell, tellAll } from "./events.js";
import { said, t } from "./words.js";

export const PANEL = "amg_said"; // the widget
const PART = "said";
const HIGHEST = 220; // pixels; longer text is scrolled
const AROUND = 36; // pixels: the padding, and what the host leaves free around a panel

const OURS = "amg."; // errors with a sentence that says all
const NOTHING = { lines: [], error: "" };

function make(node) {
  const inner = el("div");
  const attributes = { tabindex: "0", role: "region", "aria-label": t("Result"), "aria-live": "polite" };
  const element = el("section", { class: "amg-panel amg-said", ...attributes }, inner);
  return addPanel(node, PANEL, { element, inner }, () => height(node, inner));
}

/** About the pixels that the panel needs. The host asks before the text is laid out. */
function height(node, inner) {
  if (!inner.children.length) return 0;
  const lines = [...inner.children].map(({ textContent }) => linesOf(textContent, node.size[0] - 44));
  return Math.min(HIGHEST, lines.reduce((sum, count) => sum + LINE * count + 2, 0) + AROUND);
}

/** Show these texts on a node; none hides the panel. */
export function write(node, texts, outcome) {
  if (!texts.length && !panelOf(node, PANEL)) return;
  const { element, inner } = panelOf(node, PANEL) ?? make(node);
  inner.replaceChildren(...texts.map((text) => el("p", { text })));
  element.dataset.outcome = outcome;
  element.hidden = !texts.length;
  settle(node);
}

/** What is read of a result: [the error], or its lines. */
function read({ lines, error }) {
  return error ? [t("Error: <words>", { words: error })] : lines.map(said).filter(Boolean);
}

const outcome = ({ error }) => (error ? "error" : "said");
const show = (node, state) => write(node, read(state), outcome(state));

/** The first line of a node's result, or its error. */
export function summary(state) {
  const [text] = read(state);
  return text ? { text, outcome: outcome(state) } : null;
}

/** Text of a run that goes on, in place of the result of the run before. */
export function progress(node, text) {
  if (panelOf(node, PANEL)) write(node, text.split("\n"), "running");
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
