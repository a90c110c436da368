// Nodes with inputs that grow: copies of them keep their links.

import { app } from "../../../scripts/app.js";

const NODES = ["EasyRefReferences", "EasyRefCombineTokens"];

app.registerExtension({
  name: "EasyRef.Growing",

  init() {
    defineGrownInGroupNodes(window.comfyAPI?.groupNode?.GroupNodeConfig);
  },

  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    keepOrder(node);
    ignoreFreeInputs(node);
    keepGrownWhenRemoved(node);
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

/**
 * Older pages make a group node out of the nodes themselves, once they have taken them off the graph;
 * what is taken off with their links grows together in the next frame.
 */
function keepGrownWhenRemoved(node) {
  const removed = node.onRemoved;
  node.onRemoved = function (...values) {
    const grown = [...this.inputs];
    requestAnimationFrame(() => {
      if (!this.graph || String(this.id).includes(":")) this.inputs = grown;
    });
    return removed?.apply(this, values);
  };
}

/**
 * Older pages work out the inputs of a group node from the definitions of the nodes in it, in which
 * one that grows is a single input. For our nodes they get one that names each input of the node at
 * hand, in its order.
 * @param GroupNodeConfig the page's class, or undefined where it makes no group nodes.
 */
function defineGrownInGroupNodes(GroupNodeConfig) {
  const prototype = GroupNodeConfig?.prototype;
  const getNodeDef = prototype?.getNodeDef;
  if (!getNodeDef) return;
  prototype.getNodeDef = function (node, ...rest) {
    const definition = getNodeDef.call(this, node, ...rest);
    return NODES.includes(node.type) && definition ? withGrown(definition, node) : definition;
  };
}

function withGrown(definition, { inputs = [] }) {
  const all = { ...definition.input.required, ...definition.input.optional };
  const grows = (name) => all[name][1]?.template;
  const sockets = inputs.filter((input) => !input.widget).map(({ name }) => name);
  const specs = {};
  for (const name of sockets) {
    const [group, one] = name.split(".");
    const template = one && all[group] && grows(group);
    const [spec] = Object.values({ ...template?.input.required, ...template?.input.optional });
    if (spec ?? all[name]) specs[name] = spec ?? all[name];
  }
  for (const [name, spec] of Object.entries(all)) if (!grows(name)) specs[name] ??= spec;
  return { ...definition, input: { required: specs } };
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
