// Choices are shown in words, in the artist's language: "say so" as "say so: keep it, warn me". What is
// saved with a workflow, and sent to the server, stays the choice itself.

import { choices } from "./words.js";

/** Show the choices of a node's widgets in words. */
export function speak(node) {
  for (const widget of node.widgets ?? []) {
    const words = choices(widget.name);
    if (!words) continue;
    if (typeof widget.value === "boolean") Object.assign(widget.options, { on: words.true, off: words.false });
    else widget.options.getOptionLabel = (value) => words[value] ?? String(value ?? "");
  }
}
