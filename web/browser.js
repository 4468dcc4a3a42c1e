// A window onto an index: what is in it, search by text, mute and guard again.

import { ask, el, thumbnailURL } from "./graph.js";
import { t } from "./words.js";

const PAGE = 24;

/** Open the window on the index called `name`. */
export function browse(name) {
  new Browser(name).open();
}

const why = (reason) => (reason ? t("excluded (muted): <reason>", { reason }) : t("excluded (muted)"));

class Browser {
  constructor(name) {
    this.name = name;
    this.starts = [0]; // first ids of the pages up to this one
    this.asked = 0;
    const close = () => this.dialog.close();
    const again = () => this.#from([0]);
    this.choice = el("select", { "aria-label": t("Index"), onchange: () => this.#choose(this.choice.value) });
    this.about = el("p", { class: "amg-about" });
    this.text = el("input", { type: "search", placeholder: t("Search captions and names"), maxlength: "200" });
    this.text.setAttribute("aria-label", t("Search captions and names"));
    this.muted = el("input", { type: "checkbox", onchange: again });
    this.reason = el("input", { type: "text", placeholder: t("why it may be copied"), maxlength: "500" });
    this.grid = el("ul", { class: "amg-grid" });
    this.status = el("p", { class: "amg-status", role: "status" });
    this.back = el("button", { type: "button", text: t("Previous"), onclick: () => this.#from(this.starts.slice(0, -1)) });
    this.next = el("button", { type: "button", text: t("Next") });
    const find = el("form", { class: "amg-find", role: "search" }, this.text, el("button", { text: t("Search") }));
    find.addEventListener("submit", (event) => {
      event.preventDefault();
      again();
    });
    this.dialog = el(
      "dialog",
      { class: "amg-browser", "aria-label": t("Memorization index") },
      el("header", {}, this.choice, this.about, el("button", { type: "button", text: t("Close"), onclick: close })),
      el(
        "div",
        { class: "amg-tools" },
        find,
        el("label", {}, this.muted, t("only excluded (muted)")),
        el("label", {}, t("reason for muting"), this.reason),
      ),
      this.grid,
      el("footer", {}, this.back, this.status, this.next),
    );
    this.dialog.addEventListener("close", () => this.dialog.remove());
    this.dialog.addEventListener("keydown", (event) => event.stopPropagation()); // not for the graph
  }

  async open() {
    document.body.append(this.dialog);
    this.dialog.showModal();
    await this.#try(async () => {
      const { indexes } = await ask("");
      this.choice.replaceChildren(...indexes.map((each) => el("option", { value: each, text: each })));
      if (!indexes.length) throw new Error(t("There is no index yet. Run a Build Memorization Index node to make one."));
      await this.#choose(indexes.includes(this.name) ? this.name : indexes[0]);
    });
  }

  async #choose(name) {
    this.name = name;
    this.choice.value = name;
    await this.#tell();
    await this.#from([0]);
  }

  async #tell() {
    await this.#try(async () => {
      const found = await ask(`/${encodeURIComponent(this.name)}`);
      const day = found.created.slice(0, 10);
      this.count = found.count;
      const about = { count: found.count, muted: found.muted, descriptor: found.descriptor, day };
      this.about.textContent = t("<count> pictures · <muted> excluded (muted) · <descriptor> · <day>", about);
    });
  }

  /** Show the page that begins at the last of `starts`. */
  async #from(starts) {
    const asked = ++this.asked;
    const query = new URLSearchParams({ start: starts.at(-1), limit: PAGE, text: this.text.value.trim() });
    query.set("muted", this.muted.checked ? "1" : "0");
    this.status.textContent = t("Searching…");
    await this.#try(async () => {
      const { entries, next, done } = await ask(`/${encodeURIComponent(this.name)}/entries?${query}`);
      if (asked !== this.asked) return; // another page was asked for since
      this.starts = starts;
      this.grid.replaceChildren(...entries.map((entry) => this.#card(entry)));
      this.back.disabled = starts.length < 2;
      this.next.disabled = next === null;
      this.next.onclick = () => this.#from([...starts, next]);
      this.status.textContent = this.#found(entries, next, done);
    });
  }

  #found(entries, next, done) {
    if (!done) {
      const far = { count: entries.length, seen: next };
      return t("<count> found in the first <seen> pictures. Press Next to search further.", far);
    }
    if (!entries.length) return t("Nothing found.");
    const some = this.text.value.trim() || this.muted.checked;
    const [first, last] = [entries[0].id + 1, entries.at(-1).id + 1];
    if (some) return t("<count> on this page", { count: entries.length });
    return t("<first> to <last> of <count>", { first, last, count: this.count });
  }

  #card(entry) {
    const name = entry.caption || entry.source;
    const picture = el("img", { alt: name, loading: "lazy", src: thumbnailURL({ index: this.name, ...entry }) });
    picture.addEventListener("error", () => picture.replaceWith(el("div", { class: "amg-blank", text: t("no picture") })));
    const muted = entry.muted !== null;
    const act = muted ? t("Guard again") : t("Mute");
    const button = el("button", { type: "button", text: act, "aria-label": `${act}: ${name}` });
    button.onclick = () => this.#mute(entry, button);
    return el(
      "li",
      { class: muted ? "amg-card amg-muted" : "amg-card" },
      picture,
      el("div", { class: "amg-caption", text: entry.caption, title: entry.caption }),
      el("div", { class: "amg-name", text: entry.source, title: entry.source }),
      muted ? el("div", { class: "amg-why", text: why(entry.muted) }) : null,
      button,
    );
  }

  async #mute(entry, button) {
    button.disabled = true;
    await this.#try(async () => {
      const muted = entry.muted === null;
      const reason = this.reason.value.trim();
      const body = muted ? { sha256: [entry.sha256], reason } : { sha256: [entry.sha256] };
      await ask(`/${encodeURIComponent(this.name)}/${muted ? "mute" : "unmute"}`, body);
      const card = this.#card({ ...entry, muted: muted ? reason : null });
      button.closest("li").replaceWith(card);
      card.querySelector("button").focus();
      await this.#tell();
      this.status.textContent = muted
        ? t("Excluded (muted) from the next run on.")
        : t("Guarded again from the next run on.");
    });
    button.disabled = false;
  }

  async #try(task) {
    try {
      await task();
    } catch (error) {
      this.status.textContent = error.message;
    }
  }
}
