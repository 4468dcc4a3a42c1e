// The pictures of an index that are most like a finished one, ranked by both checks.

import { el, shown, thumbnailURL, viewURL } from "./graph.js";
import { t } from "./words.js";

/** Where the picture of a row is, or "" in a report that names none. */
export function addressOf(near) {
  if (near.picture) return viewURL(near.picture);
  return near.sha256 ? thumbnailURL(near) : "";
}

/** What is called the nearest picture of a row. */
export function nameOf(near) {
  return near.picture ? t("the stored picture, drawn from another seed") : near.source;
}

/** A list of thumbnails. best: [{ likeness, composition, and what the server says of the row }]. */
export function bestOf(best) {
  const items = best.map((near, i) => {
    const url = addressOf(near);
    if (!url) return null;
    const name = near.caption || nameOf(near);
    const values = { number: i + 1, name, likeness: shown(near.likeness), composition: shown(near.composition) };
    const words = t("<number>. <name>: likeness <likeness>, composition <composition>", values);
    const picture = el("img", { src: url, alt: words, title: words });
    picture.addEventListener("error", () => (picture.hidden = true));
    const figure = shown(Math.max(near.likeness ?? 0, near.composition ?? 0));
    return el("li", {}, picture, el("span", { text: `${i + 1} · ${figure}` }));
  });
  const made = items.filter(Boolean);
  if (!made.length) return null;
  return el("ol", { class: "amg-best", "aria-label": t("Nearest pictures, by the better of both checks") }, ...made);
}
