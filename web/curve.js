// Likeness by step against the threshold, from 0 to 1, as SVG. Pure: data in, elements out.

import { el, likeness, shown } from "./graph.js";
import { t } from "./words.js";

const WIDTH = 100;
const HEIGHT = 100; // of the viewBox; strokes and dots keep their size however it is stretched
const MARGIN = 4; // of it, so that strokes at 0 and 1 are whole

/** How high a value is drawn, in the viewBox. */
export function height(value) {
  return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * likeness(value);
}

/** SVG path through (step, value in 0 to 1); a gap where there is no value. */
export function path(values, total) {
  let pen = "M";
  const parts = [];
  values.forEach((value, i) => {
    if (value === null || value === undefined) {
      pen = "M";
      return;
    }
    const x = (WIDTH * i) / Math.max(1, total - 1);
    parts.push(`${pen}${x.toFixed(2)} ${height(value).toFixed(2)}`);
    pen = "L";
  });
  return parts.join("");
}

/** Dots are lines of no length with round ends: they stay round in a stretched picture. */
function dots(steps, sample, total) {
  const values = steps.map((step) => (step.active[sample] ? step.score[sample] : null));
  return path(values, total)
    .replace(/L/g, "M")
    .replace(/(M[^M]+)/g, "$1h0");
}

/**
 * The children of the curve's <svg>: earlier attempts pale, the latest in full, the threshold dashed.
 *
 * attempts: [{ total, steps: [{ score: [n], score_threshold, active: [bool] }] }]; `sample`: the one that
 * is drawn strongly, or null for all alike. `limit`: the likeness above which a picture is a copy, or null.
 */
export function draw(attempts, sample, limit = null) {
  const made = [];
  const line = (d, kind) => d && made.push(el("svg:path", { d, class: kind }));
  if (limit !== null) line(path([limit, limit], 2), "amg-limit");
  attempts.forEach((attempt, number) => {
    const latest = number === attempts.length - 1;
    const total = Math.max(attempt.total ?? 0, attempt.steps.length, 2);
    const age = latest ? "" : " amg-earlier";
    const thresholds = attempt.steps.map((step) => step.score_threshold);
    line(path(thresholds, total), `amg-threshold${age}`);
    const samples = attempt.steps.at(-1)?.score.length ?? 0;
    for (let i = 0; i < samples; i++) {
      const pale = sample !== null && sample !== i ? " amg-pale" : "";
      const colour = ` amg-c${i % 5}${age}${pale}`;
      const values = attempt.steps.map((step) => step.score[i]);
      line(path(values, total), `amg-line${colour}`);
      line(dots(attempt.steps, i, total), `amg-dots${colour}`);
    }
  });
  return made;
}

/** The same in words, for those who do not see it. */
export function describe(attempts, sample) {
  const latest = attempts.at(-1);
  const step = latest?.steps.at(-1);
  if (!step) return t("No step has been compared yet.");
  const acted = latest.steps.filter((each) => each.active[sample]).length;
  return t(
    "Likeness to the nearest picture of the index after <steps> of <total> steps: picture <number> has " +
      "<score>, the threshold is <threshold>. The guard acted in <acted> of these steps.",
    {
      steps: latest.steps.length,
      total: latest.total ?? "?",
      number: sample + 1,
      score: shown(likeness(step.score[sample])),
      threshold: shown(step.score_threshold),
      acted,
    },
  );
}
