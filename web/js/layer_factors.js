// Factors of the MLLM's layers, as in easyref_core/encode/mllm_layers.py.

const MAX_FACTOR = 10;
const MAX_LAYERS = 1000;

/** A list of numbers such as "1, 0.5, 0", [1] for an empty text, null if it cannot be read. */
export function parseFactors(text) {
  if (!text.trim()) return [1];
  const parts = text.split(",").map((part) => part.trim());
  const numbers = parts.map(Number);
  const read = parts.every((part, index) => part && numbers[index] >= 0 && numbers[index] <= MAX_FACTOR);
  return read && parts.length <= MAX_LAYERS ? numbers : null;
}

/** Points spread evenly over `count` places, with straight lines between them. */
export function spread(points, count) {
  return Array.from({ length: count }, (_, place) => {
    const at = (place * (points.length - 1)) / Math.max(1, count - 1);
    const before = Math.floor(at);
    const after = Math.min(before + 1, points.length - 1);
    return points[before] + (at - before) * (points[after] - points[before]);
  });
}
