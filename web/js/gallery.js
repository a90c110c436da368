// Registers the gallery of EasyRef References with ComfyUI's page.

import { app } from "../../../scripts/app.js";
import { GalleryNode } from "./gallery_node.js";
import { texts } from "./gallery_texts.js";
import { addStyle, pageLocale } from "./node_element.js";

const NODE = "EasyRefReferences";

/** Gallery of each node; weak, so that removed nodes are freed. */
const galleries = new WeakMap();

app.registerExtension({
  name: "EasyRef.Gallery",

  init() {
    addStyle("gallery");
    // Before ComfyUI's own listener, which would create a Load Image node from a pasted picture.
    document.addEventListener("paste", onPaste, true);
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const widget = node.widgets?.find((w) => w.name === "gallery");
    if (!widget || typeof node.addDOMWidget !== "function") return;
    galleries.set(node, new GalleryNode(node, widget, texts(pageLocale(app))));
  },

  /** Refresh ("R"): check the files again. */
  refreshComboInNodes() {
    for (const node of app.canvas?.graph?.nodes ?? []) galleries.get(node)?.check();
  },
});

/** Add pasted pictures to the focused gallery, or to the only selected node. */
function onPaste(event) {
  const pasted = [...(event.clipboardData?.files ?? [])];
  if (!pasted.length) return;
  const gallery = galleryFor(event.target);
  if (!gallery) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  gallery.upload(pasted);
}

function galleryFor(target) {
  const selected = Object.values(app.canvas?.selected_nodes ?? {});
  const inside = target instanceof Element ? target.closest(".easyref-gallery") : null;
  if (inside) {
    const nodes = app.canvas?.graph?.nodes ?? [];
    return nodes.map((node) => galleries.get(node)).find((g) => g?.view.element === inside);
  }
  const writes = target instanceof Element && target.closest("input, textarea, dialog");
  if (writes || selected.length !== 1) return undefined;
  return galleries.get(selected[0]);
}
