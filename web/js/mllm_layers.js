// The bars of EasyRef MLLM Layers.

import { app } from "../../../scripts/app.js";
import { texts } from "./gallery_texts.js";
import { HEIGHT, LayerBars } from "./layer_bars.js";
import { parseFactors, spread } from "./layer_factors.js";
import { addPlot, addStyle, isLinked, pageLocale } from "./node_element.js";

const NODE = "EasyRefMllmLayers";

app.registerExtension({
  name: "EasyRef.MllmLayers",

  init: () => addStyle("plots"),

  nodeCreated(node) {
    const presets = node.constructor.nodeData?.input?.required?.preset?.[1]?.bars;
    if (node.comfyClass !== NODE || !presets || typeof node.addDOMWidget !== "function") return;
    const widgets = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget]));
    const view = new LayerBars(texts(pageLocale(app)));
    addPlot(node, "easyref_layers", view.element, {
      label: view.t("layers"),
      height: HEIGHT,
      read: () => ({
        text: barsOf(node, widgets, presets, "text", 0),
        picture: barsOf(node, widgets, presets, "picture", 1),
      }),
      show: (bars) => view.show(bars),
    });
  },
});

/** The factors of text or of picture tokens and the attention paid to them, or a problem. */
function barsOf(node, widgets, presets, name, index) {
  if (isLinked(node, ["preset", `${name}_layers`, `${name}_weight`])) return { problem: "linked" };
  const typed = parseFactors(String(widgets[`${name}_layers`].value));
  const preset = presets[widgets.preset.value];
  if (!typed || !preset) return { problem: "unreadableList" };
  const own = spread(typed, preset[name].length);
  return {
    factors: preset[name].map((factor, place) => factor * own[place]),
    attention: preset.attention[index] * Number(widgets[`${name}_weight`].value),
  };
}
