// Anti-Memorization Guidance on the page. Everything works without it: nodes then tell in words.

import { api, app, grow, nodeOf, tameText, widgetOf } from "./graph.js";
import * as browser from "./browser.js";
import * as live from "./live.js";
import * as presets from "./presets.js";
import * as probe from "./probe.js";
import * as results from "./results.js";
import * as said from "./said.js";
import * as search from "./search.js";
import * as events from "./events.js";
import { learn, t } from "./words.js";

const PANELS = [live.PANEL, probe.PANEL, said.PANEL]; // on these the result is said

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./amg.css", import.meta.url).href;
  document.head.append(link);
}

function addBrowseButton(node) {
  const open = () => browser.browse(widgetOf(node, "index_name")?.value);
  const button = node.addWidget("button", t("browse pictures"), null, open, { serialize: false });
  button.serialize = false;
  button.tooltip = t("Shows the pictures of the index. You can search them, and exclude (mute) those that may be copied.");
  grow(node);
}

app.registerExtension({
  name: "AMG.Page",
  commands: [
    {
      id: "AMG.BrowseIndex",
      label: "Browse memorization indexes",
      icon: "pi pi-images",
      function: () => browser.browse(""),
    },
  ],
  menuCommands: [{ path: ["Extensions"], commands: ["AMG.BrowseIndex"] }],
  addCustomNodeDefs: search.addWords,
  async setup() {
    addStyle();
    await learn();
    search.teach();
    events.watch();
    live.watch();
    said.watch();
    results.watch();
    // After the host's own listener has put the text on the node.
    api.addEventListener("progress_text", ({ detail }) => {
      setTimeout(() => {
        const node = nodeOf(detail.nodeId);
        if (!node?.comfyClass?.startsWith("AMG_")) return;
        if (![live.PANEL, probe.PANEL].some((name) => widgetOf(node, name))) said.progress(node, detail.text);
        tameText(node, PANELS.some((name) => widgetOf(node, name)));
      });
    });
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("AMG_")) return;
    if (node.comfyClass === "AMG_LoadIndex") addBrowseButton(node);
    probe.prepare(node);
    presets.follow(node);
  },
});
