// A preset fills the sliders. They multiply its strengths, so a preset as it is has them all at 1.

import { after, widgetOf } from "./graph.js";

const STRENGTHS = ["strength", "despecification", "deduplication", "dissimilarity"];
const AS_PRESET = 1;

/** Some front ends save a node's live text behind its widgets, and give it to one that was appended since. */
function mend(widget) {
  if (widget && typeof widget.value !== "number") widget.value = AS_PRESET;
}

/** Choosing another preset by hand puts the sliders at 1; loading a workflow never touches them. */
export function follow(node) {
  const preset = widgetOf(node, "preset");
  if (!preset) return;
  let last = preset.value;
  after(node, "onConfigure", () => {
    last = preset.value;
    mend(widgetOf(node, "strength"));
  });
  after(preset, "callback", () => {
    if (preset.value === last) return; // hosts call this for other reasons, too
    last = preset.value;
    for (const name of STRENGTHS) {
      const widget = widgetOf(node, name);
      if (widget) widget.value = AS_PRESET;
    }
    node.setDirtyCanvas(true, true);
  });
}
