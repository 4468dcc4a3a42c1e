// The panel of Similarity Probe: each picture beside its nearest one, both measures, and the verdict.

import { addPanel, el, grow, shown, tameText, viewURL } from "./graph.js";
import { bestOf } from "./best.js";
import { tell } from "./events.js";
import { inOwnUnit, said, t } from "./words.js";

const NODE = "AMG_SimilarityProbe";
export const PANEL = "amg_probe"; // the widget
const panels = new WeakMap(); // node -> element of its panel

function image(saved, alt, title) {
  return el("figure", {}, el("img", { src: viewURL(saved), alt }), el("figcaption", { text: title }));
}

/** A bar from 0 to 1 with a mark at the limit, and a band before it that begins at `near`. */
export function bar(name, value, limit, near, hint) {
  const share = (number) => `${(100 * Math.min(1, Math.max(0, number))).toFixed(1)}%`;
  return el(
    "div",
    {
      class: value > limit ? "amg-bar amg-over" : value > near ? "amg-bar amg-close" : "amg-bar",
      role: "meter",
      "aria-label": name,
      "aria-valuemin": "0",
      "aria-valuemax": "1",
      "aria-valuenow": Math.min(1, Math.max(0, value)).toFixed(2),
      "aria-valuetext": t("<value>, a copy above <limit>", { value: shown(value), limit: shown(limit) }),
      title: hint,
    },
    el("span", { class: "amg-bar-name", text: name }),
    el(
      "span",
      { class: "amg-track" },
      el("span", { class: "amg-band", style: `left:${share(near)};width:${share(limit - near)}` }),
      el("span", { class: "amg-fill", style: `width:${share(value)}` }),
      el("span", { class: "amg-mark", style: `left:${share(limit)}` }),
    ),
    el("span", { class: "amg-bar-value", text: `${shown(value)} / ${shown(limit)}` }),
  );
}

function kind(found) {
  if (found.copy) return "amg-pair amg-is-copy";
  return found.near || found.outcome === "cannot_tell" ? "amg-pair amg-is-close" : "amg-pair";
}

function row(found, number, count) {
  const which = count > 1 ? t("Picture <number>", { number: number + 1 }) : t("Picture");
  const near = found.caption || found.source;
  return el(
    "article",
    { class: kind(found), "aria-label": which },
    el(
      "div",
      { class: "amg-both" },
      image(found.picture, which, which),
      image(found.nearest, t("Nearest picture: <name>", { name: near }), found.source),
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
    found.caption ? el("p", { class: "amg-caption", text: found.caption, title: found.caption }) : null,
    bestOf(found.best ?? []),
  );
}

function show(node, { verdicts, left, misses }) {
  const rows = verdicts.map((each, i) => row(each, i, verdicts.length + left));
  const overlooked = misses ? said(misses) : "";
  if (overlooked) rows.push(el("p", { class: "amg-misses", text: overlooked }));
  if (left) rows.push(el("p", { class: "amg-caption", text: t("More pictures in the text output: <count>.", { count: left }) }));
  let list = panels.get(node);
  if (!list) {
    const attributes = { role: "region", tabindex: "0", "aria-label": t("Nearest pictures") };
    list = el("div", { class: "amg-panel amg-probe", ...attributes });
    panels.set(node, list);
    addPanel(node, PANEL, list, () => (verdicts.length > 1 ? 440 : 360));
  }
  list.replaceChildren(...rows);
  tameText(node, true);
  grow(node);
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
  return worst ? { text: said(worst), outcome: worst.copy ? "copy" : "no_copy" } : null;
}
