// The panel of Similarity Probe: each picture beside its nearest one, both measures, and the verdict.

import { addPanel, el, likeness, LINE, linesOf, panelOf, percent, settle, shown, viewURL } from "./graph.js";
import { bestOf } from "./best.js";
import { tell } from "./events.js";
import { inOwnUnit, said, t } from "./words.js";

const NODE = "AMG_SimilarityProbe";
export const PANEL = "amg_probe"; // the widget
const AROUND = 36; // pixels: the padding, and what the host leaves free around a panel
const LARGEST = 180; // pixels of a picture
const BESIDE = 66; // pixels: the next nearest pictures, and gaps
const BARS = 46; // pixels: both, and gaps
const HIGHEST = 460; // pixels; more is scrolled

function image(saved, alt, text, title = text) {
  return el("figure", {}, el("img", { src: viewURL(saved), alt }), el("figcaption", { text, title }));
}

/** A bar from 0 to 1 with a mark at the limit, and a band before it that begins at `near`. */
export function bar(name, value, limit, near, hint) {
  return el(
    "div",
    {
      class: "amg-bar",
      "data-outcome": value > limit ? "copy" : value > near ? "close" : "no_copy",
      role: "meter",
      "aria-label": name,
      "aria-valuemin": "0",
      "aria-valuemax": "1",
      "aria-valuenow": likeness(value).toFixed(2),
      "aria-valuetext": t("<value>, a copy above <limit>", { value: shown(value), limit: shown(limit) }),
      title: hint,
    },
    el("span", { class: "amg-bar-name", text: name }),
    el(
      "span",
      { class: "amg-track" },
      el("span", { class: "amg-band", style: `left:${percent(near)};width:${percent(limit - near)}` }),
      el("span", { class: "amg-fill", style: `width:${percent(value)}` }),
      el("span", { class: "amg-mark", style: `left:${percent(limit)}` }),
    ),
    el("span", { class: "amg-bar-value", text: `${shown(value)} / ${shown(limit)}` }),
  );
}

function outcome(found) {
  if (found.copy) return "copy";
  return found.near || found.outcome === "cannot_tell" ? "close" : "no_copy";
}

function row(found, number, count) {
  const which = count > 1 ? t("Picture <number>", { number: number + 1 }) : t("Picture");
  const near = found.caption || found.source;
  return el(
    "article",
    { class: "amg-pair", "data-outcome": outcome(found), "aria-label": which },
    el(
      "div",
      { class: "amg-both" },
      image(found.picture, which, which),
      image(found.nearest, t("Nearest picture: <name>", { name: near }), near, `${found.source}\n${found.caption}`),
      bestOf(found.best ?? [], found.source),
    ),
    bar(
      t("likeness"),
      found.likeness,
      found.copy_above,
      found.near_above,
      [
        t("First check, by the descriptor of the index: 0 = as alike as pictures that are not in the index, 1 = the same picture."),
        inOwnUnit(found.similarity, found.threshold),
      ].join("\n"),
    ),
    bar(
      t("composition"),
      found.composition,
      found.copy_above,
      found.near_above,
      [
        t("Second check: how well the outlines agree when one picture is laid on the other. 1 = exactly."),
        t("As it was measured: agreement <value>, limit <limit>.", {
          value: shown(found.zncc),
          limit: shown(found.zncc_threshold),
        }),
      ].join("\n"),
    ),
    el("p", { class: "amg-words", text: said(found) }),
  );
}

/** About the pixels that the panel needs. The host asks before the text is laid out. */
function room(node, list) {
  const across = node.size[0] - AROUND;
  const each = Math.min(LARGEST, (across - BESIDE) / 2) + LINE + BARS;
  const texts = [...list.querySelectorAll("p")].map((p) => LINE * linesOf(p.textContent, across - 8) + 4);
  const pairs = list.querySelectorAll("article").length;
  return Math.min(HIGHEST, texts.reduce((sum, high) => sum + high, each * pairs) + AROUND);
}

function make(node) {
  const attributes = { role: "region", tabindex: "0", "aria-label": t("Nearest pictures") };
  const element = el("div", { class: "amg-panel amg-probe", ...attributes });
  return addPanel(node, PANEL, { element }, () => room(node, element));
}

function show(node, { verdicts, left, misses }) {
  const rows = verdicts.map((each, i) => row(each, i, verdicts.length + left));
  const overlooked = misses ? said(misses) : "";
  if (overlooked) rows.push(el("p", { class: "amg-misses", text: overlooked }));
  if (left) rows.push(el("p", { class: "amg-caption", text: t("More pictures in the text output: <count>.", { count: left }) }));
  const { element } = panelOf(node, PANEL) ?? make(node);
  element.replaceChildren(...rows);
  settle(node);
}

/** The panel shows the pictures itself: the host need not show the nearest ones a second time. */
export function prepare(node) {
  if (node.comfyClass !== NODE) return;
  node.hideOutputImages = true;
  node.onDrawBackground = () => {};
}

/** What the node has left in its output. */
export function finished(of, found) {
  tell({ ...of, kind: NODE }, "probe", () => found, show);
}

/** The verdict on the picture that is most like a stored one. */
export function summary({ verdicts }) {
  const [worst] = [...verdicts].sort((one, other) => other.copy - one.copy || other.score - one.score);
  return worst ? { text: said(worst), outcome: outcome(worst) } : null;
}
