// The gallery's DOM: toolbar, message line and tiles. It has no state of its own; user actions call
// `actions`.

import { dragsPictures, dropped } from "./dropped.js";
import { layout } from "./gallery_state.js";
import { makeTile, update } from "./gallery_tile.js";
import { icon, make } from "./page.js";
import { makeSortable } from "./tile_drag.js";

// As in web/css/gallery.css.
const SIZES = { tile: 92, gap: 6, bar: 26, empty: 56 };
const NOTE_HEIGHT = 34;

/**
 * @param t the gallery's texts.
 * @param actions upload(files), drop(content), addFolder(), weigh(id, value), crop(id), remove(id),
 * move(id, place), resized().
 */
export class GalleryView {
  constructor(t, actions) {
    this.t = t;
    this.actions = actions;
    this.pictures = [];
    this.height = 0;
    this.tiles = new Map();
    this.chooser = make("input", {
      type: "file",
      accept: "image/*",
      multiple: true,
      hidden: true,
      onchange: () => {
        actions.upload([...this.chooser.files]);
        this.chooser.value = "";
      },
    });
    const choose = () => this.chooser.click();
    const button = (name, action) =>
      make(
        "button",
        { type: "button", class: "easyref-button", title: t(`${name}Title`), onclick: action },
        icon(name),
        t(name),
      );
    this.buttons = [button("add", choose), button("folder", () => actions.addFolder())];
    this.count = make("span", { class: "easyref-count" });
    this.note = make("p", { class: "easyref-note", role: "status", hidden: true });
    this.live = make("p", { class: "easyref-live", "aria-live": "polite" });
    this.empty = make(
      "button",
      { type: "button", class: "easyref-empty", tabindex: "-1", onclick: choose },
      icon("picture"),
      t("help"),
    );
    this.grid = make("ul", {
      class: "easyref-grid",
      "aria-label": t("gallery"),
      "aria-description": t("tileHelp"),
      "data-capture-wheel": "true",
    });
    this.element = make(
      "div",
      { class: "easyref-gallery", role: "group", "aria-label": t("gallery") },
      make("div", { class: "easyref-bar" }, ...this.buttons, this.count, this.chooser),
      this.note,
      this.empty,
      this.grid,
      make("div", { class: "easyref-veil", "aria-hidden": "true" }, t("drop")),
      this.live,
    );
    makeSortable(this.grid, (tile, place) => actions.move(this.#idOf(tile), place));
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
    acceptDrops(this.element, actions.drop);
    new ResizeObserver(() => this.fit()).observe(this.element);
    this.fit();
  }

  /** Show pictures; `stamps` is a map from file to stamp. */
  show(pictures, stamps) {
    const { t } = this;
    const focused = document.activeElement;
    const tileInFocus = focused?.closest?.(".easyref-tile");
    this.pictures = pictures;
    const left = new Set(this.tiles.keys());
    pictures.forEach((picture, index) => {
      const { id } = picture;
      left.delete(id);
      let tile = this.tiles.get(id);
      if (!tile) {
        tile = makeTile({
          weigh: (value) => this.actions.weigh(id, value),
          crop: () => this.actions.crop(id),
          remove: () => this.#remove(id),
        });
        this.tiles.set(id, tile);
      }
      const stamp = stamps.get(picture.file);
      update(tile, { picture, place: index + 1, count: pictures.length, stamp }, t);
      if (this.grid.children[index] !== tile) {
        this.grid.insertBefore(tile, this.grid.children[index] ?? null);
      }
    });
    for (const id of left) {
      this.tiles.get(id).remove();
      this.tiles.delete(id);
    }
    // Moving an element in the DOM removes its focus.
    if (tileInFocus?.isConnected && focused !== document.activeElement) focused.focus();
    this.empty.hidden = pictures.length > 0;
    this.grid.hidden = pictures.length === 0;
    this.progress("");
    this.fit();
  }

  /** Show progress instead of the number of pictures; "" when done. */
  progress(text) {
    const count = this.pictures.length;
    const counted = count === 1 ? this.t("one") : count ? this.t("count", { count }) : "";
    this.count.textContent = text || counted;
  }

  /** Show a message line; "" hides it. */
  say(text, kind = "news") {
    this.note.textContent = text;
    this.note.title = text;
    this.note.hidden = !text;
    this.note.dataset.kind = kind;
    this.fit();
  }

  /** Announce a sentence to screen readers. */
  announce(text) {
    this.live.textContent = text;
  }

  setEnabled(enabled) {
    for (const button of [...this.buttons, this.empty]) button.disabled = !enabled;
  }

  /** The gallery's preferred height at a width. */
  heightAt(width) {
    const { height } = layout(this.pictures.length, width, SIZES);
    return height + (this.note.hidden ? 0 : NOTE_HEIGHT);
  }

  /** Request layout if the preferred height has changed. */
  fit() {
    const width = this.element.clientWidth;
    const height = width ? this.heightAt(width) : 0;
    if (!height || height === this.height) return;
    this.height = height;
    // Vue nodes use CSS layout, the classic canvas uses getMinHeight.
    this.element.style.setProperty("--easyref-height", `${height}px`);
    this.actions.resized();
  }

  focusPicture(id) {
    (this.tiles.get(id) ?? this.buttons[0]).focus();
  }

  #idOf(tile) {
    for (const [id, known] of this.tiles) if (known === tile) return id;
    return -1;
  }

  #remove(id) {
    const place = this.pictures.findIndex((p) => p.id === id);
    const next = this.pictures[place + 1] ?? this.pictures[place - 1];
    this.actions.remove(id);
    this.focusPicture(next?.id);
  }

  #onKey(event) {
    const { key, target, altKey } = event;
    if (target.matches(".easyref-weight")) {
      if (key === "Enter" || key === "Escape") {
        take(event);
        if (key === "Enter") target.dispatchEvent(new Event("change"));
        else target.value = String(this.#pictureOf(target).weight);
        target.closest(".easyref-tile").focus();
      }
      return;
    }
    // Otherwise these keys would delete the node.
    if (key === "Delete" || key === "Backspace") take(event);
    if (!target.matches(".easyref-tile") || event.ctrlKey || event.metaKey) return;

    const id = this.#idOf(target);
    const place = this.pictures.findIndex((p) => p.id === id);
    const columns = getComputedStyle(this.grid).gridTemplateColumns.split(" ").length;
    const last = this.pictures.length - 1;
    const to = {
      ArrowLeft: place - 1,
      ArrowRight: place + 1,
      ArrowUp: place - columns,
      ArrowDown: place + columns,
      Home: 0,
      End: last,
    }[key];
    if (to !== undefined) {
      take(event);
      const there = Math.min(Math.max(to, 0), last);
      if (altKey) this.actions.move(id, there);
      else if (to === there) this.focusPicture(this.pictures[there].id);
    } else if (key === "Delete" || key === "Backspace") {
      this.#remove(id);
    }
  }

  #pictureOf(element) {
    const id = this.#idOf(element.closest(".easyref-tile"));
    return this.pictures.find((p) => p.id === id);
  }
}

function acceptDrops(element, onDrop) {
  const show = (on) => element.toggleAttribute("data-over", on);
  for (const name of ["dragenter", "dragover"]) {
    element.addEventListener(name, (event) => {
      if (!dragsPictures(event)) return;
      take(event);
      event.dataTransfer.dropEffect = "copy";
      show(true);
    });
  }
  element.addEventListener("dragleave", (event) => {
    if (!element.contains(event.relatedTarget)) show(false);
  });
  element.addEventListener("drop", (event) => {
    if (!dragsPictures(event)) return;
    take(event);
    show(false);
    onDrop(dropped(event));
  });
}

function take(event) {
  event.preventDefault();
  event.stopPropagation();
}
