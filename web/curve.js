// Similarity by step against the threshold, as SVG. Pure: data in, elements out.

import { el, shown } from "./graph.js";
import { t } from "./words.js";

const WIDTH = 100;
const HEIGHT = 100; // of the viewBox; strokes and dots keep their size however it is stretched

/** Lowest and highest value of what is drawn, with a margin. */
export function range(attempts) {
  const values = attempts.flatMap((attempt) =>
    attempt.steps.flatMap((step) => [...step.similarity, step.threshold]),
  );
  const finite = values.filter((value) => value !== null);
  if (!finite.length) return [0, 1];
  const low = Math.min(...finite);
  const high = Math.max(...finite);
  const margin = 0.05 * (high - low + 0.1);
  return [low - margin, high + margin];
}

/** SVG path through (step, value); a gap where there is no value. */
export function path(values, total, [low, high]) {
  let pen = "M";
  const parts = [];
  values.forEach((value, i) => {
    if (value === null || value === undefined) {
      pen = "M";
      return;
    }
    const x = (WIDTH * i) / Math.max(1, total - 1);
    const y = HEIGHT - (HEIGHT * (value - low)) / (high - low);
    parts.push(`${pen}${x.toFixed(2)} ${y.toFixed(2)}`);
    pen = "L";
  });
  return parts.join("");
}

/** Dots are lines of no length with round ends: they stay round in a stretched picture. */
function dots(steps, sample, total, scale) {
  const values = steps.map((step) => (step.active[sample] ? step.similarity[sample] : null));
  return path(values, total, scale)
    .replace(/L/g, "M")
    .replace(/(M[^M]+)/g, "$1h0");
}

/**
 * The children of the curve's <svg>: earlier attempts pale, the latest in full, the threshold dashed.
 *
 * attempts: [{ total, steps: [{ similarity: [n], threshold, active: [bool] }] }]; `sample`: the one that
 * is drawn strongly, or null for all alike.
 */
export function draw(attempts, sample) {
  const scale = range(attempts);
  const made = [];
  const line = (d, kind) => d && made.push(el("svg:path", { d, class: kind }));
  attempts.forEach((attempt, number) => {
    const latest = number === attempts.length - 1;
    const total = Math.max(attempt.total ?? 0, attempt.steps.length, 2);
    const age = latest ? "" : " amg-earlier";
    const thresholds = attempt.steps.map((step) => step.threshold);
    line(path(thresholds, total, scale), `amg-threshold${age}`);
    const samples = attempt.steps.at(-1)?.similarity.length ?? 0;
    for (let i = 0; i < samples; i++) {
      const pale = sample !== null && sample !== i ? " amg-pale" : "";
      const colour = ` amg-c${i % 5}${age}${pale}`;
      const values = attempt.steps.map((step) => step.similarity[i]);
      line(path(values, total, scale), `amg-line${colour}`);
      line(dots(attempt.steps, i, total, scale), `amg-dots${colour}`);
    }
  });
  return { parts: made, scale };
}

/** The same in words, for those who do not see it. */
export function describe(attempts, sample) {
  const latest = attempts.at(-1);
  const step = latest?.steps.at(-1);
  if (!step) return t("Nothing was looked at yet.");
  const acted = latest.steps.filter((each) => each.active[sample]).length;
  return t(
    "Similarity to the nearest picture of the index by step: <steps> of <total>, picture <number> now " +
      "<similarity>, threshold <threshold>, the guard acted at <acted> of them.",
    {
      steps: latest.steps.length,
      total: latest.total ?? "?",
      number: sample + 1,
      similarity: shown(step.similarity[sample]),
      threshold: shown(step.threshold),
      acted,
    },
  );
}
