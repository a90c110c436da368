// EasyRef Save Tokens: placeholders in the file name, filled in as in ComfyUI's own nodes that save.

import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "EasyRef.Saving",

  nodeCreated(node) {
    if (node.comfyClass !== "EasyRefSaveTokens") return;
    const prefix = node.widgets.find(({ name }) => name === "filename_prefix");
    prefix.serializeValue = () => filledIn(prefix.value);
  },
});

/** Dates and values of nodes; what stays is for the server, which fills it in or refuses it. */
function filledIn(value) {
  const fill = window.comfyAPI?.utils?.applyTextReplacements;
  return fill && typeof value === "string" ? fill(app.graph, value) : value;
}
