// The state of the gallery as saved in the workflow, and its changes, as pure functions without DOM,
// so that Node's test runner can test them. easyref_core/pictures/gallery.py parses the same text.

export const VERSION = 1;
export const MAX_WEIGHT = 5;

const DIGITS = 4;

/**
 * One picture. `id` exists only in the page; it distinguishes two uses of one file.
 * @typedef {{id: number, file: string, weight: number, crop: number[] | null}} Picture
 */

let lastId = 0;

/** A new picture. */
export function picture(file, weight = 1, crop = null) {
  return { id: ++lastId, file, weight, crop };
}

/**
 * Parse the workflow's text.
 * @returns {{pictures: Picture[], problem: string | null}} problem: "newer" or "unreadable" where
 * the text must not be overwritten, as content would be lost.
 */
export function parse(text) {
  if (!text || !text.trim()) return { pictures: [], problem: null };
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    return { pictures: [], problem: "unreadable" };
  }
  if (Number.isInteger(content?.version) && content.version > VERSION) {
    return { pictures: [], problem: "newer" };
  }
  const entries = content?.pictures;
  if (content?.version !== VERSION || !Array.isArray(entries) || !entries.every(isEntry)) {
    return { pictures: [], problem: "unreadable" };
  }
  const pictures = entries.map((e) => picture(e.file, e.weight ?? 1, tidyCrop(e.crop)));
  return { pictures, problem: null };
}

/** The text for the workflow; empty if there is no picture. */
export function toText(pictures) {
  if (!pictures.length) return "";
  const entries = pictures.map(({ file, weight, crop }) =>
    crop ? { file, weight, crop } : { file, weight },
  );
  return JSON.stringify({ version: VERSION, pictures: entries });
}

/** Add files at the end, or before the picture at `index`. */
export function add(pictures, files, index = pictures.length) {
  return pictures.toSpliced(index, 0, ...files.map((file) => picture(file)));
}

export function remove(pictures, id) {
  return pictures.filter((p) => p.id !== id);
}

/** Move a picture to a position, clamped to the ends. */
export function move(pictures, id, place) {
  const from = pictures.findIndex((p) => p.id === id);
  if (from < 0) return pictures;
  const to = Math.min(Math.max(place, 0), pictures.length - 1);
  if (to === from) return pictures;
  return pictures.toSpliced(from, 1).toSpliced(to, 0, pictures[from]);
}

export function setWeight(pictures, id, weight) {
  return changed(pictures, id, { weight: tidyWeight(weight) });
}

/** Set a picture's crop; the whole picture removes it. */
export function setCrop(pictures, id, crop) {
  return changed(pictures, id, { crop: tidyCrop(crop) });
}

/** Parse a typed weight: 0 to 5, rounded; 1 if it is no number. */
export function tidyWeight(weight) {
  const number = typeof weight === "string" ? parseFloat(weight.replace(",", ".")) : weight;
  if (!Number.isFinite(number)) return 1;
  return rounded(Math.min(Math.max(number, 0), MAX_WEIGHT));
}

/** A valid crop; null for the whole picture. */
export function tidyCrop(crop) {
  if (!crop) return null;
  const x = rounded(Math.min(Math.max(crop[0], 0), 1));
  const y = rounded(Math.min(Math.max(crop[1], 0), 1));
  const w = rounded(Math.min(crop[2], 1 - x));
  const h = rounded(Math.min(crop[3], 1 - y));
  return x === 0 && y === 0 && w === 1 && h === 1 ? null : [x, y, w, h];
}

/** The gallery's name of a picture in ComfyUI's input or output folder. */
export function nameOf({ filename, subfolder, type }) {
  const path = [subfolder, filename].filter(Boolean).join("/").replaceAll("\\", "/");
  return type === "input" ? path : `${path} [${type}]`;
}

/** The last part of a file's name. */
export function baseName(file) {
  return file.slice(file.lastIndexOf("/") + 1);
}

/** How many columns of tiles fit, and the gallery's height: three rows at most. */
export function layout(count, width, { tile, gap, bar, empty, rows = 3 }) {
  const columns = Math.max(1, Math.floor((width + gap) / (tile + gap)));
  if (!count) return { columns, height: bar + gap + empty };
  // Tiles fill the row, so they are slightly larger than the minimum.
  const side = (width - gap * (columns - 1)) / columns;
  const shown = Math.min(rows, Math.ceil(count / columns));
  return { columns, height: Math.ceil(bar + gap + shown * side + (shown - 1) * gap) };
}

function changed(pictures, id, values) {
  return pictures.map((p) => (p.id === id ? { ...p, ...values } : p));
}

function rounded(number) {
  return Number(number.toFixed(DIGITS));
}

function isEntry(entry) {
  const { file, weight = 1, crop = null } = entry ?? {};
  return (
    typeof file === "string" &&
    file.trim() !== "" &&
    Number.isFinite(weight) &&
    weight >= 0 &&
    (crop === null || isCrop(crop))
  );
}

function isCrop(crop) {
  if (!Array.isArray(crop) || crop.length !== 4 || !crop.every(Number.isFinite)) return false;
  const [x, y, w, h] = crop;
  const slack = 1e-6;
  return (
    w > 0 && h > 0 && Math.min(x, y) >= -slack && Math.max(x + w, y + h) <= 1 + slack
  );
}
