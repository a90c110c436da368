// A tile of the gallery: thumbnail, weight and buttons of one picture.

import { thumbnailUrl } from "./gallery_files.js";
import { baseName, MAX_WEIGHT } from "./gallery_state.js";
import { icon, make } from "./page.js";

const THUMBNAIL_SIDE = 256;

/** Create a tile, filled by `update`. `actions` are weigh(value), crop() and remove(). */
export function makeTile(actions) {
  const parts = {
    image: make("img", { alt: "", draggable: "false", decoding: "async", loading: "lazy" }),
    lost: make("span", { class: "easyref-lost" }),
    place: make("span", { class: "easyref-place", "aria-hidden": "true" }),
    weight: make("input", {
      class: "easyref-weight",
      type: "number",
      min: "0",
      max: String(MAX_WEIGHT),
      step: "0.05",
      onchange: () => actions.weigh(parts.weight.value),
    }),
    crop: make("button", { type: "button", class: "easyref-tool", onclick: actions.crop }),
    remove: make("button", { type: "button", class: "easyref-tool", onclick: actions.remove }),
  };
  parts.crop.append(icon("crop"));
  parts.remove.append(icon("remove"));
  const tile = make(
    "li",
    { class: "easyref-tile", tabindex: "0" },
    parts.image,
    parts.lost,
    make("div", { class: "easyref-tile-top" }, parts.place, parts.remove),
    make("div", { class: "easyref-tile-bottom" }, parts.weight, parts.crop),
  );
  parts.image.addEventListener("error", () => tile.setAttribute("data-lost", "broken"));
  tile.easyref = parts;
  return tile;
}

/**
 * Show a picture in its tile.
 * @param {{picture, place: number, count: number, stamp: string | undefined}} shown stamp: "" where
 * the file is missing, undefined if not known yet.
 */
export function update(tile, { picture, place, count, stamp }, t) {
  const { image, lost, weight, crop, remove, place: number } = tile.easyref;
  const name = baseName(picture.file);
  const missing = stamp === "";

  if (stamp === undefined || missing) {
    image.removeAttribute("src");
  } else {
    const url = thumbnailUrl(picture.file, stamp, THUMBNAIL_SIDE, picture.crop);
    if (image.getAttribute("src") !== url) {
      tile.removeAttribute("data-lost");
      image.src = url;
    }
  }
  if (missing) tile.setAttribute("data-lost", "missing");
  else if (tile.dataset.lost === "missing") tile.removeAttribute("data-lost");
  lost.replaceChildren(
    icon("missing"),
    make("span", { class: "easyref-lost-name" }, name),
    ...(missing ? [make("strong", {}, t("missing"))] : []),
  );

  number.textContent = String(place);
  if (document.activeElement !== weight) weight.value = String(picture.weight);
  weight.setAttribute("aria-label", t("weight", { name }));
  for (const [button, text] of [
    [crop, "crop"],
    [remove, "remove"],
  ]) {
    button.setAttribute("aria-label", t(text, { name }));
    button.title = t(text, { name });
  }
  crop.disabled = missing || stamp === undefined;
  tile.toggleAttribute("data-weighted", picture.weight !== 1);
  tile.toggleAttribute("data-off", picture.weight === 0);
  tile.toggleAttribute("data-cropped", picture.crop !== null);
  tile.title = picture.file;
  tile.setAttribute(
    "aria-label",
    t("tile", {
      place,
      count,
      name,
      weight: picture.weight,
      crop: picture.crop ? t("croppedPart") : "",
      missing: missing ? t("missingPart") : "",
    }),
  );
}
