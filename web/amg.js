// Anti-Memorization Guidance on the page. Everything works without it: nodes then tell in words.

import { addButton, api, app, fitTitle, grow, nodeOf, tameText, widgetOf } from "./graph.js";
import * as browser from "./browser.js";
import * as choices from "./choices.js";
import * as live from "./live.js";
import * as outside from "./outside.js";
import * as presets from "./presets.js";
import * as probe from "./probe.js";
import * as results from "./results.js";
import * as said from "./said.js";
import * as search from "./search.js";
import * as templates from "./templates.js";
import * as weights from "./weights.js";
import * as events from "./events.js";
import { learn, t } from "./words.js";

const NO_INDEX = "(no index"; // how nodes/paths.py begins the only choice, where there is none
const BUILDERS = ["AMG_BuildIndex", "AMG_IndexFromImages"]; // nodes that make an index
const PANELS = [live.PANEL, probe.PANEL, said.PANEL]; // on these the result is said

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./amg.css", import.meta.url).href;
  document.head.append(link);
}

function addBrowseButton(node) {
  const hint = t("Shows the pictures of the index. You can search them, and exclude (mute) those that may be copied.");
  addButton(node, t("browse pictures"), hint, () => browser.browse(widgetOf(node, "index_name")?.value));
  grow(node);
}

/** Where there is no index yet: how to get one, and a node for it in place of this one. */
function offerIndex(node) {
  const choices = widgetOf(node, "index_name")?.options?.values;
  if (!Array.isArray(choices) || !choices.every((choice) => choice.startsWith(NO_INDEX))) return;
  const hint = t("Adds a Build Memorization Index node in place of this one.");
  addButton(node, t("make an index"), hint, () => replaceByBuild(node));
  const advice = t(
    "There is no index yet. Make one of the pictures to stay away from: put their folder into a " +
      "Build Memorization Index node and run it.",
  );
  said.write(node, [advice], "said");
}

const listed = new Set(); // indexes of which the lists of choices have been told

/** Put an index that was just built into the lists of every Load Memorization Index. */
function listIndex({ output }) {
  const result = output?.amg_said?.[0];
  const name = BUILDERS.includes(result?.class) && result.lines?.[0]?.messages?.[0]?.name;
  if (!name || listed.has(name)) return;
  listed.add(name);
  app.refreshComboInNodes?.();
}

function replaceByBuild(node) {
  const { graph, pos } = node;
  const made = LiteGraph.createNode("AMG_BuildIndex");
  made.pos = [...pos];
  graph.add(made);
  for (const id of [...(node.outputs[0].links ?? [])]) {
    const link = graph.links.get?.(id) ?? graph.links[id];
    made.connect(0, graph.getNodeById(link.target_id), link.target_slot);
  }
  graph.remove(node);
  app.canvas.selectNode?.(made);
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
    {
      id: "AMG.CheckWeights",
      label: "Check the SSCD weights",
      icon: "pi pi-verified",
      function: weights.check,
    },
  ],
  menuCommands: [{ path: ["Extensions"], commands: ["AMG.BrowseIndex", "AMG.CheckWeights"] }],
  addCustomNodeDefs: search.addWords,
  init: templates.watch,
  async setup() {
    addStyle();
    await learn();
    search.teach();
    events.watch();
    live.watch();
    said.watch();
    outside.watch();
    results.watch();
    api.addEventListener("executed", ({ detail }) => listIndex(detail));
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
    fitTitle(node);
    if (node.comfyClass === "AMG_LoadIndex") {
      addBrowseButton(node);
      offerIndex(node);
    }
    probe.prepare(node);
    presets.follow(node);
    choices.speak(node);
  },
});
