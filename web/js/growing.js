// Nodes with growing inputs: copies keep their links.

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

/**
 * Older pages build a group node from nodes already removed from the graph; removing their links has
 * by then removed grown inputs. So a removed node gets them back in the next frame.
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
 * Older pages take the inputs of a group node from the definitions of its nodes, in which growing
 * inputs are a single entry. For our nodes, return a definition with each actual input, in order.
 * @param GroupNodeConfig the page's class, or undefined if it has no group nodes.
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
