// A finished run, read from a report: the output of a node, or the metadata of a picture that anybody made.
// Pure: data in, the state of the panel in live.js out. What is damaged is left out.

const MOST = 2000; // entries of a list

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const number = (value) => (Number.isFinite(value) ? value : null);
const text = (value) => (typeof value === "string" ? value : "");
const list = (value, read) => (Array.isArray(value) ? value.slice(0, MOST).map(read) : []);

function step(given) {
  return {
    score: list(given?.score, number),
    similarity: list(given?.similarity, number),
    neighbor: list(given?.neighbor, number),
    active: list(given?.active, Boolean),
    score_threshold: number(given?.score_threshold),
    threshold: number(given?.threshold),
  };
}

function nearest(given, ours) {
  const near = { source: text(given?.source), caption: text(given?.caption) };
  if (ours) Object.assign(near, { index: given.index, id: given.id, sha256: given.sha256, picture: given.picture });
  return near;
}

/**
 * The run that a report tells of.
 *
 * ours: it comes from the server, and may name thumbnails. origin: where it was found, in words.
 */
export function runOf(report, { ours = false, origin = "" } = {}) {
  if (!isObject(report)) throw new TypeError("a report is an object");
  const later = list(report.attempts, (each) => each).slice(1);
  const drawings = [report.steps, ...later.map((each) => each?.steps)].map((steps) => list(steps, step));
  const retries = number(report.retries) ?? drawings.length - 1;
  const attempts = drawings.map((steps) => ({ steps, total: steps.length, retries }));
  const best = (each) => ({ row: number(each?.row), likeness: number(each?.likeness), composition: number(each?.composition) });
  const verdicts = list(report.verdicts, (each) => ({
    outcome: text(each?.outcome),
    words: text(each?.words),
    near: each?.near === true,
    nearest: list(each?.nearest, best),
  }));
  const words = text(report.words) || text(report.not_judged) || verdicts.map((each) => each.words).join(" · ");
  const near = Object.entries(isObject(report.neighbors) ? report.neighbors : {}).slice(0, MOST);
  const messages = Array.isArray(report.story)
    ? [...list(report.before, (each) => each), ...list(report.story, (each) => each)]
    : [{ code: "as_written", words }];
  return {
    attempts: attempts.some(({ steps }) => steps.length) ? attempts.filter(({ steps }) => steps.length) : [],
    neighbors: Object.fromEntries(near.map(([row, given]) => [row, nearest(given, ours)])),
    ended: true,
    said: { messages, words },
    verdicts,
    pinned: null,
    copyAbove: number(report.copy_above),
    misses: ours && isObject(report.misses) ? report.misses : null,
    origin,
  };
}
