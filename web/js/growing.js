// Nodes with growing inputs: copies keep their links.

import { app } from "../../../scripts/app.js";
import { texts } from "./gallery_texts.js";

const NODES = ["EasyRefReferences", "EasyRefCombineTokens"];

app.registerExtension({
  name: "EasyRef.Growing",

  // Older pages have group nodes, which silently lose such links, also for ComfyUI's own nodes.
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
 * When a saved node is configured, ComfyUI lists the inputs of a new node first, then the others.
 * Grown inputs then come after the widgets' inputs, while copied links (clipboard, subgraph) refer to
 * inputs by index. So the inputs are grown before the page compares them.
 */
function keepOrder(node) {
  const configure = node.configure;
  node.configure = function (saved, ...rest) {
    grow(this, saved?.inputs ?? []);
    return configure.call(this, saved, ...rest);
  };
}

/**
 * A new node reports each of its inputs, also unlinked ones; pages up to 1.37 treat these as
 * disconnected and move the next linked inputs up.
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
