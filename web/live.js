// The panel of AMG Sampler, Apply AMG and Guard: a curve that grows while pictures are drawn.

import { addPanel, api, el, grow, likeness, LINE, linesOf, shown, tameText } from "./graph.js";
import { addressOf, bestOf, nameOf } from "./best.js";
import { describe, draw, height } from "./curve.js";
import { tell, tellAll } from "./events.js";
import { runOf } from "./report.js";
import { inOwnUnit, said, t } from "./words.js";

export const EVENT = "amg.step";
const MOST_CHIPS = 12;
const HEIGHT = 232;
const THUMBNAILS = 72; // pixels more, for the nearest pictures of a finished one
const FEW = 2; // lines of words for which there is room anyway
const WORDS_ONLY = 60; // pixels, where nothing was compared
export const PANEL = "amg_live"; // the widget
export const KINDS = ["AMG_Sampler", "AMG_Apply", "AMG_Guard"]; // the nodes
const PART = "live";

const panels = new WeakMap(); // node -> its panel

const NOTHING = { messages: [], words: "" };
const NOT_ENDED = {
  messages: [{ code: "not_judged" }, { code: "not_ended" }],
  words: "not checked · the run did not end",
};
const newRun = () => ({
  attempts: [],
  neighbors: {},
  ended: false,
  said: NOTHING,
  verdicts: [],
  pinned: null,
  copyAbove: null, // the likeness
  misses: null,
  origin: "", // where the run was found, if it was not seen
});
const unseen = { score: [], score_threshold: null, active: [], neighbor: [] }; // before the page listened

/** A run with one more event in it: the same one, or a new one where the event begins it. */
export function enter(run, event) {
  if (event.kind === "begin") return Object.assign(newRun(), { said: event });
  if (event.kind === "end") {
    if (run.ended) run = newRun(); // of a run in which nothing was looked at
    Object.assign(run.neighbors, event.neighbors);
    const { verdicts, misses = null } = event;
    return Object.assign(run, { ended: true, said: event, verdicts, misses });
  }
  const { attempt: number, step, total, retries } = event;
  const again = number === 0 && (run.attempts.length > 1 || step < run.attempts[0]?.steps.length);
  if (run.ended || again) run = newRun();
  run.said = NOTHING;
  while (run.attempts.length <= number) run.attempts.push({ steps: [], total, retries });
  const { steps } = run.attempts[number];
  while (steps.length < step) steps.push(unseen);
  steps[step - 1] = event;
  Object.assign(run.neighbors, event.neighbors);
  run.copyAbove = event.copy_above ?? null;
  return run;
}

/** The sample to tell about: the one the artist chose, else the one that is closest now. */
export function chosen(run) {
  const score = run.attempts.at(-1)?.steps.at(-1)?.score ?? [];
  if (run.pinned !== null && run.pinned < score.length) return run.pinned;
  return score.reduce((best, value, i) => (value > (score[best] ?? -Infinity) ? i : best), 0);
}

class Panel {
  constructor(node) {
    this.svg = el("svg:svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
    this.high = el("span", { class: "amg-high", "aria-hidden": "true" });
    this.low = el("span", { class: "amg-low", "aria-hidden": "true" });
    this.limit = el("span", { class: "amg-at", "aria-hidden": "true" });
    this.best = el("div", { class: "amg-more" });
    this.chips = el("div", { class: "amg-chips", role: "group", "aria-label": t("Picture of the batch") });
    this.picture = el("img", { class: "amg-thumb" });
    this.picture.addEventListener("error", () => (this.picture.hidden = true));
    this.name = el("div", { class: "amg-name" });
    this.caption = el("div", { class: "amg-caption" });
    this.numbers = el("div", { class: "amg-numbers" });
    this.words = el("div", { class: "amg-words", role: "status" });
    this.origin = el("div", { class: "amg-origin" });
    this.element = el(
      "section",
      { class: "amg-panel", "aria-label": t("What the guard sees") },
      el("div", { class: "amg-plot" }, this.svg, this.high, this.low, this.limit),
      this.chips,
      el("div", { class: "amg-near" }, this.picture, el("div", {}, this.name, this.caption, this.numbers)),
      this.words,
      this.best,
      this.origin,
    );
    const lines = (text) => linesOf(text, node.size[0] - 44);
    const room = () => {
      const list = this.best.querySelector("ol") ? THUMBNAILS : 0;
      const misses = lines(this.best.querySelector("p")?.textContent ?? "");
      return HEIGHT + list + LINE * (misses + Math.max(0, lines(this.words.textContent) - FEW));
    };
    addPanel(node, PANEL, this.element, () => (this.element.dataset.empty ? WORDS_ONLY : room()));
  }

  show(run) {
    const attempt = run.attempts.at(-1);
    const step = attempt?.steps.at(-1);
    this.words.textContent = said(run.said);
    this.origin.textContent = run.origin;
    this.element.dataset.outcome = outcome(run);
    this.element.dataset.empty = step ? "" : "yes";
    this.#showBest(run);
    if (!step) return this.#clear();
    const sample = chosen(run);
    this.svg.replaceChildren(...draw(run.attempts, run.pinned === null ? null : sample, run.copyAbove));
    this.svg.setAttribute("aria-label", describe(run.attempts, sample));
    [this.low.textContent, this.high.textContent] = [0, 1].map(shown);
    this.limit.textContent = run.copyAbove === null ? "" : shown(run.copyAbove);
    this.limit.title = t("A copy above this likeness.");
    if (run.copyAbove !== null) this.limit.style.top = `calc(${height(run.copyAbove)}% - 8px)`;
    this.#showChips(run, step.score.length);
    this.#showNearest(run, attempt, step, sample);
  }

  #clear() {
    for (const each of [this.svg, this.chips]) each.replaceChildren();
    this.svg.setAttribute("aria-label", describe([], 0));
    this.#clearNearest();
    for (const each of [this.high, this.low, this.numbers]) each.textContent = "";
  }

  /** Of a finished picture: its nearest ones, and what the descriptor overlooks. */
  #showBest(run) {
    const verdict = run.ended && run.verdicts[run.attempts.length ? chosen(run) : 0];
    const rows = (verdict?.nearest ?? []).filter((each) => run.neighbors[each.row]);
    const list = bestOf(rows.map((each) => ({ ...each, ...run.neighbors[each.row] })));
    const words = verdict && run.misses ? said(run.misses) : "";
    const misses = words ? el("p", { class: "amg-misses", text: words }) : null;
    this.best.replaceChildren(...[list, misses].filter(Boolean));
  }

  #clearNearest() {
    this.picture.hidden = true;
    this.picture.removeAttribute("src");
    for (const each of [this.name, this.caption]) each.textContent = "";
  }

  #showChips(run, count) {
    const chips = [];
    for (let i = 0; count > 1 && i < Math.min(count, MOST_CHIPS); i++) {
      const pressed = run.pinned === i;
      const choose = () => {
        run.pinned = pressed ? null : i;
        this.show(run);
        this.chips.children[i]?.focus();
      };
      const label = t("Picture <number> of <count>", { number: i + 1, count });
      const attributes = { type: "button", class: `amg-chip amg-c${i % 5}`, "aria-pressed": String(pressed) };
      chips.push(el("button", { ...attributes, "aria-label": label, text: String(i + 1), onclick: choose }));
    }
    this.chips.replaceChildren(...chips);
  }

  #showNearest(run, attempt, step, sample) {
    const near = run.neighbors[step.neighbor[sample]];
    if (!near) {
      this.#clearNearest();
    } else {
      const url = addressOf(near);
      this.picture.hidden = !url;
      if (url && this.picture.getAttribute("src") !== url) this.picture.src = url;
      const name = nameOf(near);
      this.picture.alt = t("Nearest picture: <name>", { name: near.caption || name });
      this.name.textContent = name;
      this.caption.textContent = near.caption;
      this.name.title = name;
      this.caption.title = near.caption;
    }
    const acted = attempt.steps.filter((each) => each.active[sample]).length;
    const again = run.attempts.length - 1;
    const parts = [
      again ? t("retry <number>/<count>", { number: again, count: attempt.retries }) : null,
      step.score.length > 1 ? t("picture <number>", { number: sample + 1 }) : null,
      t("likeness <value>", { value: shown(likeness(step.score[sample])) }),
      t("threshold <value>", { value: shown(step.score_threshold) }),
      t("guarded steps: <count>", { count: acted }),
    ];
    this.numbers.textContent = parts.filter(Boolean).join(" · ");
    this.numbers.title = inOwnUnit(step.similarity[sample], step.threshold);
  }
}

function outcome(run) {
  if (!run.ended) return "running";
  const all = run.verdicts.map((verdict) => verdict.outcome);
  if (all.some((each) => each === "copy" || each === "blanked")) return "copy";
  if (run.verdicts.some((verdict) => verdict.near || verdict.outcome === "cannot_tell")) return "close";
  return all.length ? "no_copy" : "unknown";
}

/** The result of a run that has ended. */
export function summary(run) {
  return run.ended ? { text: said(run.said), outcome: outcome(run) } : null;
}

function show(node, run) {
  if (!panels.has(node)) panels.set(node, new Panel(node));
  tameText(node, true);
  panels.get(node).show(run);
  grow(node);
}

/** The run that a report tells of. origin: where it was found, in words, if it is not the server's own. */
export function read(report, { origin = "" } = {}) {
  return runOf(report, { ours: !origin, origin });
}

/** A run that has ended: as it was seen, or else as its report tells it. */
export function finished(of, report, { origin = "" } = {}) {
  const seen = (run, same) => same && !origin && run?.ended && run.attempts.length;
  tell(of, PART, (run, same) => (seen(run, same) ? run : read(report, { origin })), show);
}

/** The server says which node it is: its execution id, its class and the prompt. */
function receive({ detail }) {
  const of = { id: detail.node, kind: detail.class, prompt: detail.prompt };
  tell(of, PART, (run) => enter(run ?? newRun(), detail), show);
}

/** What was seen of a run that ended otherwise stays, and the panel says so. */
function stopped({ detail }) {
  tellAll(detail.prompt_id, PART, (run, same) => {
    if (!same || run.ended) return run;
    return enter(run, { kind: "end", ...NOT_ENDED, verdicts: [] });
  });
}

export function watch() {
  api.addEventListener(EVENT, receive);
  api.addEventListener("execution_interrupted", stopped);
  api.addEventListener("execution_error", stopped);
}
