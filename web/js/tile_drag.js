// Reordering tiles by dragging; the order changes during the drag.

const THRESHOLD = 5; // pixels; less is a click

/**
 * Let the children of `grid` be dragged.
 * @param onDrop (tile, place) called when a tile is dropped at another position.
 */
export function makeSortable(grid, onDrop) {
  grid.addEventListener("pointerdown", (down) => {
    const tile = tileAt(grid, down.target);
    if (!tile || down.button !== 0 || down.target.closest("button, input")) return;
    down.stopPropagation(); // else Nodes 2.0 would drag the node
    const first = placeOf(tile);
    let dragging = false;

    const onMove = (move) => {
      const far = Math.hypot(move.clientX - down.clientX, move.clientY - down.clientY);
      if (!dragging && far < THRESHOLD) return;
      if (!dragging) {
        dragging = true;
        tile.classList.add("easyref-dragged");
        grid.setPointerCapture(down.pointerId);
      }
      scrollAtEdge(grid, move.clientY);
      const under = tileAt(grid, document.elementFromPoint(move.clientX, move.clientY));
      if (!under || under === tile) return;
      if (placeOf(under) > placeOf(tile)) under.after(tile);
      else under.before(tile);
    };
    const finish = (keep) => {
      grid.removeEventListener("pointermove", onMove);
      grid.removeEventListener("pointerup", onUp);
      grid.removeEventListener("pointercancel", onCancel);
      document.removeEventListener("keydown", onKey, true);
      if (!dragging) return;
      tile.classList.remove("easyref-dragged");
      const place = placeOf(tile);
      if (!keep) grid.insertBefore(tile, grid.children[first + (place < first ? 1 : 0)] ?? null);
      else if (place !== first) onDrop(tile, place);
    };
    const onUp = () => finish(true);
    const onCancel = () => finish(false);
    const onKey = (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      event.stopImmediatePropagation();
      finish(false);
    };

    grid.addEventListener("pointermove", onMove);
    grid.addEventListener("pointerup", onUp);
    grid.addEventListener("pointercancel", onCancel);
    document.addEventListener("keydown", onKey, true);
  });
}

function tileAt(grid, element) {
  const tile = element?.closest?.(".easyref-tile");
  return tile?.parentElement === grid ? tile : null;
}

function placeOf(tile) {
  return [...tile.parentElement.children].indexOf(tile);
}

function scrollAtEdge(grid, y) {
  const { top, bottom, height } = grid.getBoundingClientRect();
  const edge = Math.min(24, height / 4);
  if (y < top + edge) grid.scrollTop -= 8;
  else if (y > bottom - edge) grid.scrollTop += 8;
}
