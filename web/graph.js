// What the modules share: finding nodes, panels on nodes, elements.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

export { app, api };

const NARROWEST = 260; // pixels of a node with a panel
const TITLE_LETTER = 7.5; // pixels, on average
const TITLE_ROOM = 60; // pixels beside it
const LETTER = 6; // pixels, on average, in a panel
export const LINE = 15; // pixels, in a panel
const LIVE_TEXT = "$$node-text-preview"; // the host's widget for text that the server sends

/** The node with an execution id: "7", or "12:3" for node 3 of the subgraph that node 12 is. */
export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

export function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** Call `then` after whatever `target[name]` is now. */
export function after(target, name, then) {
  const before = target[name];
  target[name] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

/**
 * Show `element` on a node. It is saved neither with the workflow (widget.serialize) nor with the prompt
 * (options.serialize), so no widget's value ever moves to another.
 */
export function addPanel(node, name, element, height) {
  const widget = node.addDOMWidget(name, "amg", element, {
    serialize: false,
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: height,
  });
  widget.serialize = false;
  grow(node, NARROWEST);
  return widget;
}

/** Make a new node so wide that its title is read whole. */
export function fitTitle(node) {
  node.setSize([Math.max(node.size[0], node.title.length * TITLE_LETTER + TITLE_ROOM), node.size[1]]);
}

/** Make room for what was added; never shrinks a node. */
export function grow(node, narrowest = 0) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, narrowest), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

/** About the lines that a text fills; Chinese, Japanese and Korean letters are twice as wide. */
export function linesOf(text, across) {
  const width = [...text].reduce((sum, letter) => sum + (letter > "\u2e7f" ? 2 : 1) * LETTER, 0);
  return Math.ceil(width / Math.max(1, across));
}

/**
 * Keep the host's live text out of the saved workflow: some versions save it behind the widgets.
 * `hide`: a panel says the same.
 */
export function tameText(node, hide = false) {
  const widget = widgetOf(node, LIVE_TEXT);
  if (!widget) return;
  widget.serialize = false;
  if (!hide) return;
  widget.hidden = true;
  widget.options.getMinHeight = widget.options.getMaxHeight = () => 0; // some versions lay out what is hidden
}

/** An element; what is given as text is never read as HTML. */
export function el(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A number as it is read: two decimals, a real minus. */
export function shown(value) {
  return value === null || value === undefined ? "–" : value.toFixed(2).replace("-", "−");
}

/** What is drawn of a likeness: the part from 0 to 1 (`metrics.likeness` in amg_core says what it means). */
export function likeness(value) {
  return value === null || value === undefined ? value : Math.min(1, Math.max(0, value));
}

/** Where a picture is that the host saved. */
export function viewURL({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

export function thumbnailURL(entry) {
  const name = encodeURIComponent(entry.index);
  return api.apiURL(`/amg/indexes/${name}/thumbnails/${entry.id}?sha256=${entry.sha256}`);
}

/** JSON from a route of this pack. Error with its sentence where it refuses. */
export async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const answer = await api.fetchApi(`/amg/indexes${path}`, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `The server answered ${answer.status}.`);
  return found;
}
