// Elements on nodes: shown below the widgets, on the classic canvas and in Nodes 2.0.

import { make } from "./page.js";

/** Around an element, in pixels. */
export const MARGIN = 10;
const PLOT_WIDTH = 270;

/** Key of the element -> node id -> the latest element. */
const latest = new Map();

/**
 * Add an element to a node, below its widgets.
 *
 * @param name of the widget.
 * @param label in the side panel.
 * @param height() of the element in pixels; other options are those of `addDOMWidget`.
 */
export function addElement(node, name, element, { label, height, ...options }) {
  const shown = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height() + 2 * MARGIN,
    getValue: () => "",
    setValue: () => {},
    ...options,
  });
  shown.serialize = false;
  shown.label = label;
  // Newer pages apply the side panel's width to the widget on the node, too.
  Object.defineProperty(shown, "width", { get: () => undefined, set: () => {} });
  chain(node, "onAdded", () => replaceForerunner(node, name, element));
  return shown;
}

/**
 * Add a plot of a node's values, drawn again when they change.
 *
 * @param read() gives what is shown, as plain values; show(values) draws it.
 * @param loaded() is called before a loaded node is drawn.
 */
export function addPlot(node, name, element, { label, height, read, show, loaded = () => {} }) {
  let shown = "";
  const refresh = () => {
    const values = read();
    const text = JSON.stringify(values);
    if (text === shown) return;
    shown = text;
    show(values);
  };
  for (const widget of node.widgets) chain(widget, "callback", refresh);
  addElement(node, name, element, {
    label,
    height: () => height,
    getMaxHeight: () => height + 2 * MARGIN,
    onDraw: refresh,
  });
  chain(node, "onConnectionsChange", refresh);
  chain(node, "onConfigure", () => {
    loaded();
    refresh();
  });
  refresh();
  node.setSize([Math.max(node.size[0], PLOT_WIDTH), node.computeSize()[1]]);
}

/** Whether one of a node's inputs is set by a link. */
export function isLinked(node, names) {
  return (node.inputs ?? []).some(({ link, name }) => link != null && names.includes(name));
}

/** Undo and loading create new nodes with old ids; Vue nodes then still show the old element. */
function replaceForerunner(node, name, own) {
  const key = `${name} ${node.id}`;
  const old = latest.get(key);
  latest.set(key, own);
  if (!old || old === own) return;
  afterFrames(2, () => {
    if (LiteGraph.vueNodesMode && old.isConnected && !own.isConnected) old.replaceWith(own);
  });
}

function afterFrames(count, then) {
  if (count) requestAnimationFrame(() => afterFrames(count - 1, then));
  else then();
}

/** Call `then` after a method of an object, with the same arguments. */
export function chain(object, name, then) {
  const before = object[name];
  object[name] = function (...values) {
    const result = before?.apply(this, values);
    then(...values);
    return result;
  };
}

/** The page's language, such as "en". */
export function pageLocale(app) {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language;
}

/** Load a style sheet of this pack, from web/css, once. */
export function addStyle(name) {
  const { href } = new URL(`../css/${name}.css`, import.meta.url);
  if (document.querySelector(`link[href="${href}"]`)) return;
  document.head.append(make("link", { rel: "stylesheet", href }));
}
