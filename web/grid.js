// The panel of Strength Grid: a row for each drawing, and a button that fills a sampler with its settings.

import { addPanel, app, el, panelOf, settle, shown, widgetOf } from "./graph.js";
import { tell } from "./events.js";
import { t } from "./words.js";

const NODE = "AMG_StrengthGrid";
const SAMPLER = "AMG_Sampler";
export const PANEL = "amg_grid"; // the widget
const LINE = 24; // pixels of a row
const AROUND = 44; // pixels: the status, the padding, and what the host leaves free
const HIGHEST = 300;
const WIDE = 400; // pixels of the node, so that the table is read

/** The nodes of this graph that can have settings: the selected ones, or else all. */
function candidates(node) {
  const every = node.graph._nodes.filter((each) => [SAMPLER, "AMG_Apply"].includes(each.comfyClass));
  const selected = every.filter((each) => app.canvas.selected_nodes?.[each.id]);
  return selected.length ? selected : every;
}

function fill(target, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = widgetOf(target, name);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value, app.canvas, target);
  }
  for (const [name, value] of Object.entries(values)) {
    const widget = widgetOf(target, name); // a preset may have moved the sliders
    if (widget) widget.value = value;
  }
  target.setDirtyCanvas(true, true);
}

/** A new AMG Sampler to the right of all nodes, selected and in view, wired as the grid is. It keeps its seed. */
function sampler(node) {
  const made = LiteGraph.createNode(SAMPLER);
  made.pos = [Math.max(...node.graph._nodes.map(({ pos, size }) => pos[0] + size[0])) + 60, node.pos[1]];
  node.graph.add(made);
  const next = widgetOf(made, "control_after_generate");
  if (next) next.value = "fixed";
  for (const input of node.inputs) {
    const at = made.findInputSlot(input.name);
    const link = node.graph.links.get?.(input.link) ?? node.graph.links[input.link];
    if (at < 0 || input.widget || !link) continue;
    node.graph.getNodeById(link.origin_id)?.connect(link.origin_slot, made, at);
  }
  app.canvas.selectNode?.(made);
  app.canvas.centerOnNode?.(made);
  return made;
}

/** Fill a sampler; returns what was done, in words. */
function use(node, settings) {
  const fits = candidates(node).filter((each) => settings[each.comfyClass]);
  if (fits.length > 1) return t("There are several samplers. Select the one to fill, and press again.");
  if (!fits.length && !settings[SAMPLER]) {
    return t("Only Apply AMG can have another threshold. Add that node, and press again.");
  }
  const [target = sampler(node)] = fits;
  fill(target, settings[target.comfyClass]);
  return t("<node> (#<id>) has these settings now.", { node: target.title, id: target.id });
}

function verdict(cell) {
  if (!cell.judged) return t("not checked");
  if (cell.near) return t("no copy, but close");
  const words = { copy: t("COPY"), blanked: t("COPY"), cannot_tell: t("cannot tell"), no_copy: t("no copy") };
  return words[cell.outcome];
}

function row(node, cell, many, say) {
  const settings = t("strength <strength>, threshold × <scale>", {
    strength: cell.strength,
    scale: cell.threshold_scale,
  });
  const same = cell.same_as === null ? "" : t("same picture as strength <strength>", { strength: cell.same_as });
  const outcome = cell.near ? "close" : (cell.outcome ?? "unknown");
  const label = t("use these settings");
  const button = el("button", {
    type: "button",
    text: t("use"),
    title: label,
    "aria-label": `${label}: ${settings}`,
    disabled: Object.keys(cell.use).length === 0,
    onclick: () => say(use(node, cell.use)),
  });
  const measured = [cell.likeness, cell.composition].map((each) => (cell.judged ? shown(each) : "–"));
  const cells = [`× ${cell.threshold_scale}`, cell.strength, ...measured];
  if (many) cells.unshift(cell.picture);
  return el(
    "tr",
    { "data-outcome": outcome },
    ...cells.map((text) => el("td", { text })),
    el("td", { class: "amg-verdict", title: cell.source }, verdict(cell), same && el("small", { text: same })),
    el("td", {}, button),
  );
}

function make(node) {
  const body = el("div", { class: "amg-rows", tabindex: "0", role: "region", "aria-label": t("Drawings") });
  const status = el("p", { class: "amg-status", role: "status" });
  const element = el("section", { class: "amg-panel amg-table" }, body, status);
  const room = () => Math.min(HIGHEST, LINE * body.querySelectorAll("tr").length + AROUND);
  return addPanel(node, PANEL, { element, body, status }, room);
}

function show(node, cells) {
  const { body, status } = panelOf(node, PANEL) ?? make(node);
  const many = cells.some((cell) => cell.picture > 1);
  const names = [t("threshold"), t("strength"), t("likeness"), t("composition"), t("verdict"), ""];
  if (many) names.unshift(t("picture"));
  const say = (words) => (status.textContent = words);
  const head = el("tr", {}, ...names.map((text) => el("th", { scope: "col", text })));
  body.replaceChildren(
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...cells.map((cell) => row(node, cell, many, say)))),
  );
  say("");
  settle(node, WIDE);
}

/** What the node has left in its output. */
export function finished(of, { cells }) {
  if (Array.isArray(cells)) tell({ ...of, kind: NODE }, "grid", () => cells, show);
}
