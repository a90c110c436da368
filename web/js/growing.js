// Nodes with inputs that grow: copies of them keep their links.

import { app } from "../../../scripts/app.js";
import { texts } from "./gallery_texts.js";

const NODES = ["EasyRefReferences", "EasyRefCombineTokens"];

app.registerExtension({
  name: "EasyRef.Growing",

  // Older pages still make group nodes, which lose such links without a word, ComfyUI's own too.
  beforeRegisterNodeDef(_, { category = "", description = "" }) {
    if (!category.startsWith("group nodes")) return;
    if (!NODES.some((name) => description.includes(name))) return;
    const detail = texts(app.extensionManager.setting.get("Comfy.Locale"))("groupNode");
    app.extensionManager.toast.add({ severity: "warn", summary: "EasyRef", detail, life: 15000 });
  },

  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    keepOrder(node);
    ignoreFreeInputs(node);
  },
});

/**
 * ComfyUI puts the inputs of a saved node that a new one has first, then the others. Those that grew
 * thereby come behind the widgets' inputs, while links that are copied (to the clipboard, into a
 * subgraph) name an input by its place. So the inputs grow before the page compares.
 */
function keepOrder(node) {
  const configure = node.configure;
  node.configure = function (saved, ...rest) {
    grow(this, saved?.inputs ?? []);
    return configure.call(this, saved, ...rest);
  };
}

/**
 * A node that is made anew announces each of its inputs, those without a link too; the page up to its
 * release 1.37 then takes those for taken off, and moves up what is linked right after.
 */
function ignoreFreeInputs(node) {
  const changed = node.onConnectionsChange;
  node.onConnectionsChange = function (side, slot, connected, link, ...rest) {
    const name = side === LiteGraph.INPUT ? (this.inputs[slot]?.name ?? "") : "";
    if (connected && !link && groupOf(this, name)) return undefined;
    return changed?.call(this, side, slot, connected, link, ...rest);
  };
}

function groups(node) {
  return Object.keys(node.comfyDynamic?.autogrow ?? {});
}

function groupOf(node, name) {
  return groups(node).find((group) => name.startsWith(`${group}.`));
}

function grow(node, saved) {
  for (const group of groups(node)) {
    const isOne = ({ name }) => name.startsWith(`${group}.`);
    for (const { name, type, label, shape } of saved.filter(isOne)) {
      if (node.inputs.some((input) => input.name === name)) continue;
      node.addInput(name, type, { label, shape });
      const [added] = node.inputs.splice(node.inputs.length - 1, 1);
      node.inputs.splice(node.inputs.findLastIndex(isOne) + 1, 0, added);
    }
  }
}
