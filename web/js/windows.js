// Windows of the sampling {start, end, weight, fade}, as in easyref_core/adapter/stages.py.

/** The weight of a window at a place of the sampling, 0 (start) to 1 (end). */
export function weightAt({ start, end, weight, fade }, place) {
  if (!(start < end) || !weight) return 0;
  if (!fade) return start <= place && place <= end ? weight : 0;
  const begun = start > 0 ? ramp(place, start, fade) : 1;
  const ended = end < 1 ? ramp(place, end, fade) : 0;
  return weight * (begun - ended);
}

/** The corners [place, weight] of a window drawn over the sampling, from left to right. */
export function outline(window) {
  const { start, end, fade } = window;
  if (!fade) {
    const inside = weightAt(window, start);
    return inside ? [[start, 0], [start, inside], [end, inside], [end, 0]] : [];
  }
  const bends = [start, end].flatMap((place) => [place - fade / 2, place + fade / 2]);
  const places = [0, ...bends.filter((place) => 0 < place && place < 1), 1];
  return places.sort((a, b) => a - b).map((place) => [place, weightAt(window, place)]);
}

function ramp(place, middle, length) {
  const [first, last] = [middle - length / 2, middle + length / 2];
  if (place <= first) return 0;
  return place >= last ? 1 : (place - first) / (last - first);
}
