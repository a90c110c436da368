// Geometry of the crop box: [left, top, width, height] as fractions of the picture. No DOM here.

export const WHOLE = [0, 0, 1, 1];
export const SMALLEST = 0.02;

/** Move a box by fractions of the picture, clamped to the picture. */
export function moved([x, y, w, h], dx, dy) {
  return [clamp(x + dx, 0, 1 - w), clamp(y + dy, 0, 1 - h), w, h];
}

/**
 * Drag a side or a corner.
 * @param box at the start of the drag.
 * @param handle which sides move: some of the letters n, s, w, e.
 * @param dx, dy distance as fractions of the picture.
 * @param ratio the picture's width / height, to keep the crop square; 0 for any shape.
 */
export function resized([x, y, w, h], handle, dx, dy, ratio = 0) {
  let left = x;
  let top = y;
  let right = x + w;
  let bottom = y + h;
  if (handle.includes("w")) left = clamp(left + dx, 0, right - SMALLEST);
  if (handle.includes("e")) right = clamp(right + dx, left + SMALLEST, 1);
  if (handle.includes("n")) top = clamp(top + dy, 0, bottom - SMALLEST);
  if (handle.includes("s")) bottom = clamp(bottom + dy, top + SMALLEST, 1);
  if (!ratio) return [left, top, right - left, bottom - top];

  // The fixed point: the opposite corner, or the middle of the opposite side.
  const holdsRight = handle.includes("w");
  const holdsBottom = handle.includes("n");
  const roomX = holdsRight ? right : 1 - left;
  const roomY = holdsBottom ? bottom : 1 - top;
  // A dragged side sets the size; at a corner the larger of both does.
  const wide = right - left;
  const high = (bottom - top) / ratio;
  let width = handle === "n" || handle === "s" ? high : Math.max(wide, high);
  if (handle === "w" || handle === "e") width = wide;
  width = Math.min(width, roomX, roomY / ratio);
  const height = width * ratio;
  return [
    holdsRight ? right - width : left,
    holdsBottom ? bottom - height : top,
    width,
    height,
  ];
}

/** The largest square around a box's middle that lies inside the box. */
export function squared([x, y, w, h], ratio) {
  const width = Math.min(w, h / ratio);
  const height = width * ratio;
  return [x + (w - width) / 2, y + (h - height) / 2, width, height];
}

/** Percent of left, top, width and height, for screen readers. */
export function percents(box) {
  return box.map((value) => Math.round(value * 100));
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
