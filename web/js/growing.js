// Nodes with inputs that grow: copies of them keep their links.

import { app } from "../../../scripts/app.js";

const NODES = ["EasyRefReferences", "EasyRefCombineTokens"];

app.registerExtension({
  name: "EasyRef.Growing",

  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) keepOrder(node);
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

function grow(node, saved) {
  for (const group of Object.keys(node.comfyDynamic?.autogrow ?? {})) {
    const isOne = ({ name }) => name.startsWith(`${group}.`);
    for (const { name, type, label, shape } of saved.filter(isOne)) {
      if (node.inputs.some((input) => input.name === name)) continue;
      node.addInput(name, type, { label, shape });
      const [added] = node.inputs.splice(node.inputs.length - 1, 1);
      node.inputs.splice(node.inputs.findLastIndex(isOne) + 1, 0, added);
    }
  }
}
