// The gallery of one EasyRef References node: a hidden text widget holds the state, the view shows
// it, and every change is one undo step.

import { app } from "../../../scripts/app.js";
import { askForCrop } from "./crop_dialog.js";
import { dragsPictures, dropped } from "./dropped.js";
import { askForFolder } from "./folder_dialog.js";
import * as files from "./gallery_files.js";
import * as state from "./gallery_state.js";
import { GalleryView } from "./gallery_view.js";
import { addElement, chain, MARGIN } from "./node_element.js";

const WIDGET = "gallery";
const VIEW = "easyref_gallery";
const MIN_WIDTH = 330;
const UPLOADS_AT_ONCE = 3;
const CROP_SIDE = 1200;

export class GalleryNode {
  constructor(node, widget, t) {
    this.node = node;
    this.widget = widget;
    this.t = t;
    this.pictures = [];
    this.problem = null;
    this.text = null;
    this.fittedHeight = 0;
    this.stamps = new Map();
    this.view = new GalleryView(t, {
      upload: (chosen) => this.upload(chosen),
      drop: (content) => this.drop(content),
      addFolder: () => this.addFolder(),
      weigh: (id, value) => this.#commit(state.setWeight(this.pictures, id, value)),
      crop: (id) => this.crop(id),
      remove: (id) => this.#remove(id),
      move: (id, place) => this.#move(id, place),
      resized: () => this.#fitNode(),
    });
    this.#attach();
    this.refresh();
  }

  /** Show the widget's state, if it has changed. */
  refresh() {
    const text = this.widget.value ?? "";
    if (text === this.text) return;
    this.text = text;
    ({ pictures: this.pictures, problem: this.problem } = state.parse(text));
    this.view.setEnabled(this.problem !== "newer");
    this.#show();
    this.check();
  }

  /** Ask the server which files exist. */
  async check() {
    const asked = [...new Set(this.pictures.map((p) => p.file))];
    this.#say();
    if (!asked.length) return;
    try {
      const stamps = await files.stamps(asked);
      asked.forEach((file, index) => this.stamps.set(file, stamps[index]));
    } catch (error) {
      this.view.say(this.t("noServer", { reason: error.message }), "problem");
      return;
    }
    this.#show();
    this.#say();
  }

  /** Upload local files to ComfyUI's input folder and add them to the gallery. */
  async upload(chosen) {
    if (this.problem === "newer" || !chosen.length) return;
    const [pictures, complaints] = await this.#readable(chosen);
    const names = new Array(pictures.length).fill(null);
    const failed = [];
    let started = 0;
    let reason = "";
    const work = async () => {
      while (started < pictures.length) {
        const index = started++;
        this.view.progress(this.t("uploading", { done: index + 1, count: pictures.length }));
        try {
          names[index] = await files.upload(pictures[index]);
        } catch (error) {
          failed.push(pictures[index].name);
          reason = error.message;
        }
      }
    };
    await Promise.all(Array.from({ length: UPLOADS_AT_ONCE }, work));
    if (failed.length) {
      complaints.push(this.t("notUploaded", { names: failed.join(", "), reason }));
    }
    this.view.progress("");
    await this.#add(names.filter((name) => name !== null));
    if (complaints.length) this.view.say(complaints.join(" "), "problem");
  }

  /**
   * Add what was dropped: local files, or a picture of the page. One in the input or output folder is
   * named where it lies, as Load Image does; others are copied.
   */
  async drop({ files: chosen, shown, link }) {
    if (this.problem === "newer") return;
    try {
      const picture = shown ? await files.fetchShown(shown) : link && (await files.fetchLink(link));
      if (link && !picture) {
        this.view.say(this.t("otherSite", { link }), "problem");
      } else if (shown && shown.type !== "temp") {
        const [readable, complaints] = await this.#readable([picture]);
        await this.#add(readable.map(() => state.nameOf(shown)));
        if (complaints.length) this.view.say(complaints.join(" "), "problem");
      } else {
        await this.upload(picture ? [picture] : chosen);
      }
    } catch (error) {
      this.view.say(this.t("notAdded", { reason: error.message }), "problem");
    }
  }

  /** Those of the files that the server can read, and a sentence for each kind of the others. */
  async #readable(chosen) {
    let formats;
    try {
      formats = await files.formats(chosen);
    } catch (error) {
      return [[], [this.t("noServer", { reason: error.message })]];
    }
    const others = new Map();
    chosen.forEach(({ name }, index) => {
      const format = formats[index];
      if (format?.readable) return;
      const kind = format?.name ?? "";
      others.set(kind, [...(others.get(kind) ?? []), name]);
    });
    const complaints = [...others].map(([format, named]) => {
      const names = named.join(", ");
      return format ? this.t("notRead", { format, names }) : this.t("notPictures", { names });
    });
    return [chosen.filter((_, index) => formats[index]?.readable), complaints];
  }

  /** Ask for a folder of the input folder and add all its pictures. */
  async addFolder() {
    try {
      const folder = await askForFolder(this.t, await files.folders());
      if (folder === null) return;
      const { pictures, found } = await files.picturesIn(folder);
      await this.#add(pictures);
      if (found > pictures.length) {
        this.view.say(this.t("addedSome", { count: pictures.length, found }));
      }
    } catch (error) {
      this.view.say(error.message, "problem");
    }
  }

  /** Ask for the crop of a picture. */
  async crop(id) {
    const { file, crop } = this.pictures.find((p) => p.id === id);
    const name = state.baseName(file);
    const url = files.thumbnailUrl(file, this.stamps.get(file), CROP_SIDE);
    const answer = await askForCrop(this.t, name, url, crop);
    if (!answer) return;
    const pictures = state.setCrop(this.pictures, id, answer.crop);
    const cropped = pictures.find((p) => p.id === id)?.crop;
    this.#commit(pictures, this.t(cropped ? "cropped" : "uncropped", { name }));
  }

  async #add(names) {
    if (!names.length) {
      this.#say();
      return;
    }
    const [first] = names;
    const sentence =
      names.length === 1
        ? this.t("addedOne", { name: state.baseName(first) })
        : this.t("added", { count: names.length });
    // A new upload may replace a missing file of the same name.
    for (const name of names) this.stamps.delete(name);
    this.#commit(state.add(this.pictures, names), sentence);
    await this.check();
  }

  #remove(id) {
    const { file } = this.pictures.find((p) => p.id === id);
    const sentence = this.t("removed", { name: state.baseName(file) });
    this.#commit(state.remove(this.pictures, id), sentence);
    this.#say();
  }

  #move(id, to) {
    const pictures = state.move(this.pictures, id, to);
    const index = pictures.findIndex((p) => p.id === id);
    const name = state.baseName(pictures[index].file);
    const values = { name, place: index + 1, count: pictures.length };
    this.#commit(pictures, this.t("moved", values));
    this.view.tiles.get(id)?.scrollIntoView({ block: "nearest" });
  }

  /** Write a new state to the widget, as one undo step. */
  #commit(pictures, sentence = "") {
    this.pictures = pictures;
    this.problem = null;
    this.text = state.toText(pictures);
    app.canvas?.emitBeforeChange?.();
    this.widget.value = this.text;
    this.widget.callback?.(this.text);
    // Resize the node within this undo step: a later change would be a step of its own, and after an
    // undo it would clear the redo steps.
    const height = this.#drawnHeight();
    this.#show();
    this.node.size[1] += this.#drawnHeight() - height;
    app.canvas?.emitAfterChange?.();
    if (sentence) this.view.announce(sentence);
  }

  #show() {
    this.view.show(this.pictures, this.stamps);
    this.#fitNode();
  }

  /**
   * Grow the node on the classic canvas, which would do so one picture too late; shrink it again
   * unless the user has enlarged it.
   */
  #fitNode() {
    const { node } = this;
    if (!LiteGraph.vueNodesMode) {
      const height = node.computeSize()[1];
      const snug = Math.abs(node.size[1] - this.fittedHeight) < 1;
      if (node.size[1] < height || snug) node.setSize([node.size[0], height]);
      this.fittedHeight = height;
    }
    node.graph?.setDirtyCanvas(true, true);
  }

  /** Height of the node's element in Nodes 2.0; the graph gets it some frames later. */
  #drawnHeight() {
    if (!LiteGraph.vueNodesMode) return 0;
    return this.view.element.closest("[data-node-id]")?.offsetHeight ?? 0;
  }

  /** Show the current problem of the gallery, if any. */
  #say() {
    if (this.problem) {
      this.view.say(this.t(this.problem), "problem");
      return;
    }
    const gone = this.pictures.filter((p) => this.stamps.get(p.file) === "").map((p) => p.file);
    const names = [...new Set(gone)].join(", ");
    this.view.say(names ? this.t("missingCount", { names }) : "", "problem");
  }

  /** Add the view to the node and hide the text widget. */
  #attach() {
    const { node, view, widget } = this;
    widget.hidden = true;
    widget.options ??= {};
    widget.options.hidden = true;
    widget.computeSize = () => [0, -4]; // a hidden widget still takes a line on the classic canvas
    // The page may still give the text a socket, whose link would be invisible.
    const socket = node.findInputSlot(WIDGET);
    if (socket >= 0) node.removeInput(socket);
    addElement(node, VIEW, view.element, {
      label: this.t("gallery"),
      height: () => view.heightAt(node.size[0] - 2 * MARGIN),
      onDraw: () => this.refresh(),
    });
    chain(node, "onConfigure", () => this.refresh());
    acceptDropsOnTitle(node, (content) => this.drop(content));
    leaveCanvasItsGestures(view);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0], MIN_WIDTH), Math.max(height, node.size[1])]);
  }
}

/** Also accept what is dropped on the node outside the gallery. */
function acceptDropsOnTitle(node, onDrop) {
  node.onDragOver = dragsPictures;
  node.onDragDrop = (event) => {
    if (!dragsPictures(event)) return false;
    onDrop(dropped(event));
    return true;
  };
}

/** Forward wheel zoom and middle-button panning over the gallery to the canvas. */
function leaveCanvasItsGestures({ element, grid }) {
  element.addEventListener(
    "wheel",
    (event) => {
      const scrolls = grid.contains(event.target) && grid.scrollHeight > grid.clientHeight;
      if (scrolls && !event.ctrlKey && !event.metaKey) event.stopPropagation();
      else if (!LiteGraph.vueNodesMode) app.canvas?.processMouseWheel(event);
    },
    { passive: false },
  );
  const forward = (name, wanted, method) =>
    element.addEventListener(name, (event) => {
      if (wanted(event) && !LiteGraph.vueNodesMode) app.canvas?.[method](event);
    });
  forward("pointerdown", (event) => event.button === 1, "processMouseDown");
  forward("pointermove", (event) => (event.buttons & 4) === 4, "processMouseMove");
  forward("pointerup", (event) => event.button === 1, "processMouseUp");
}
