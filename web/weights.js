// Checks the file of SSCD's weights that the artist has fetched. Nothing is downloaded.

import { api, el } from "./graph.js";
import { t } from "./words.js";

async function words() {
  const answer = await api.fetchApi("/amg/weights");
  const found = await answer.json().catch(() => ({}));
  return found.words ?? found.error ?? `The server answered ${answer.status}.`;
}

/** A window that says whether the file is there and right, and else where to get it and where to put it. */
export async function check() {
  const title = t("Copy-detection weights (SSCD)");
  const text = el("p", { class: "amg-status", role: "status", text: t("Searching…") });
  const close = el("button", { type: "button", text: t("Close"), onclick: () => dialog.close() });
  const dialog = el("dialog", { class: "amg-browser amg-weights", "aria-label": title }, el("header", {}, el("h2", { text: title }), close), text);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // not for the graph
  document.body.append(dialog);
  dialog.showModal();
  text.textContent = await words();
}
