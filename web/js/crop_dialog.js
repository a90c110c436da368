// Dialog to crop a picture.

import { moved, percents, resized, squared, WHOLE } from "./crop_box.js";
import { make, openDialog } from "./page.js";

const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const SPOKEN = { nw: "cropNorthWest", se: "cropSouthEast" };
const STEP = 0.01;
const LARGE_STEP = 0.05;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Ask for a crop.
 * @param t the gallery's texts.
 * @param name of the picture.
 * @param url of the whole picture.
 * @param crop the current crop, or null.
 * @returns {Promise<{crop: number[]} | null>} null if cancelled.
 */
export function askForCrop(t, name, url, crop) {
  return openDialog(t("cropHead", { name }), "easyref-crop", (close) => {
    let box = crop ?? WHOLE;
    const image = make("img", { src: url, alt: "", draggable: "false" });
    const frame = make("div", {
      class: "easyref-crop-box",
      tabindex: "0",
      role: "group",
      "aria-label": t("cropBox"),
      "aria-description": t("cropBoxHelp"),
    });
    const shade = make("div", { class: "easyref-crop-shade" });
    const picture = make("div", { class: "easyref-crop-picture" }, image, shade);
    const stage = make("div", { class: "easyref-crop-stage" }, picture, frame);
    const size = make("output", { class: "easyref-crop-size", "aria-live": "polite" });
    const square = make("input", { type: "checkbox" });

    const ratio = () => (image.naturalHeight ? image.naturalWidth / image.naturalHeight : 1);
    const show = (next) => {
      box = next;
      const [left, top, width, height] = box.map((share) => `${share * 100}%`);
      for (const part of [frame, shade]) Object.assign(part.style, { left, top, width, height });
      const [px, py, pw, ph] = percents(box);
      size.textContent = t("cropSize", { x: px, y: py, w: pw, h: ph });
    };
    const changed = (start, handle, dx, dy) =>
      handle ? resized(start, handle, dx, dy, square.checked ? ratio() : 0) : moved(start, dx, dy);

    for (const handle of HANDLES) {
      const label = SPOKEN[handle] && t(SPOKEN[handle]);
      const attributes = label
        ? { tabindex: "0", role: "button", "aria-label": label }
        : { "aria-hidden": "true" };
      frame.append(
        make("span", { class: "easyref-crop-handle", "data-handle": handle, ...attributes }),
      );
    }

    frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      const { handle } = event.target.dataset;
      (handle ? event.target : frame).focus();
      frame.setPointerCapture(event.pointerId);
      const start = box;
      const { width, height } = stage.getBoundingClientRect();
      const onMove = (to) => {
        const dx = (to.clientX - event.clientX) / width;
        const dy = (to.clientY - event.clientY) / height;
        show(changed(start, handle, dx, dy));
      };
      frame.addEventListener("pointermove", onMove);
      frame.addEventListener(
        "lostpointercapture",
        () => frame.removeEventListener("pointermove", onMove),
        { once: true },
      );
    });
    frame.addEventListener("keydown", (event) => {
      const direction = KEYS[event.key];
      if (!direction) return;
      event.preventDefault();
      const step = event.shiftKey ? LARGE_STEP : STEP;
      const { handle } = event.target.dataset;
      show(changed(box, handle, direction[0] * step, direction[1] * step));
    });
    square.addEventListener("change", () => square.checked && show(squared(box, ratio())));
    show(box);

    return [
      make("div", { class: "easyref-crop-area" }, stage),
      make(
        "div",
        { class: "easyref-row" },
        make("label", {}, square, t("square")),
        make("button", { type: "button", onclick: () => show(WHOLE) }, t("reset")),
        size,
      ),
      make(
        "div",
        { class: "easyref-row easyref-end" },
        make("button", { type: "button", onclick: () => close() }, t("cancel")),
        make(
          "button",
          { type: "button", class: "easyref-main", onclick: () => close({ crop: box }) },
          t("apply"),
        ),
      ),
    ];
  });
}
