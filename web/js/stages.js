// The plot and the presets of EasyRef Stages.

import { app } from "../../../scripts/app.js";
import { texts } from "./gallery_texts.js";
import { addPlot, addStyle, chain, isLinked, pageLocale } from "./node_element.js";
import { HEIGHT, StagesPlot } from "./stages_plot.js";

const NODE = "EasyRefStages";
const CUSTOM = "custom";
const VALUES = ["weight", "start", "end"];

app.registerExtension({
  name: "EasyRef.Stages",

  init: () => addStyle("plots"),

  nodeCreated(node) {
    const widgets = Object.fromEntries((node.widgets ?? []).map((w) => [w.name, w]));
    const presets = node.constructor.nodeData?.input?.required?.preset?.[1]?.windows;
    if (node.comfyClass !== NODE || !presets || typeof node.addDOMWidget !== "function") return;
    const plot = new StagesPlot(texts(pageLocale(app)));
    followPresets(widgets, presets);
    addPlot(node, "easyref_stages", plot.element, {
      label: plot.t("stages"),
      height: HEIGHT,
      read: () => windowsOf(node, widgets),
      show: (windows) => plot.show(windows),
      loaded: () => isLinked(node, ["preset"]) || showPreset(widgets, presets),
    });
  },
});

/** A chosen preset shows its boundaries; a boundary that is edited makes it a custom one. */
function followPresets(widgets, presets) {
  chain(widgets.preset, "callback", () => showPreset(widgets, presets));
  for (const name of Object.keys(Object.values(presets)[0])) {
    chain(widgets[name], "callback", () => {
      const preset = presets[widgets.preset.value];
      if (preset && widgets[name].value !== preset[name]) setValue(widgets.preset, CUSTOM);
    });
  }
}

function showPreset(widgets, presets) {
  const boundaries = presets[widgets.preset.value] ?? {};
  for (const [name, value] of Object.entries(boundaries)) {
    if (widgets[name].value !== value) setValue(widgets[name], value);
  }
}

/** Set a widget as the user does: older Vue nodes show only values that are called back. */
function setValue(widget, value) {
  widget.value = value;
  widget.callback?.(value);
}

/** Stage -> its window, null where a link sets part of it. */
function windowsOf(node, widgets) {
  const fade = Number(widgets.cross_fade.value);
  const used = widgets.preset.value === CUSTOM ? VALUES : ["weight"];
  const of = (stage) => {
    const names = used.map((value) => `${stage}_${value}`);
    if (isLinked(node, ["preset", "cross_fade", ...names])) return null;
    const values = VALUES.map((value) => [value, Number(widgets[`${stage}_${value}`].value)]);
    return { ...Object.fromEntries(values), fade };
  };
  return { tokens: of("tokens"), identity: of("identity") };
}
