"""Where the page has drawn nodes and group titles, and which of them overlap."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

from comfy_page import ComfyPage

SLACK = 1.0  # tolerance for rounding, in graph units

# Boxes in graph units. A Vue node is measured with all its visible content: the line below a node
# with an error extends past its edge.
_MEASURE = """() => {
    const {scale, offset} = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const vue = !!LiteGraph.vueNodesMode;
    const measured = (element) => {
        const boxes = [element, ...element.querySelectorAll("*")]
            .filter((e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
                && !e.closest(".easyref-live, .easyref-grid *, .markdown, .comfy-markdown"))
            .map((e) => e.getBoundingClientRect()).filter((box) => box.width && box.height);
        const outer = element.getBoundingClientRect();
        const top = Math.min(...boxes.map((box) => box.top));
        const bottom = Math.max(...boxes.map((box) => box.bottom));
        const x = (at) => (at - canvas.left) / scale - offset[0];
        const y = (at) => (at - canvas.top) / scale - offset[1];
        return [x(outer.left), y(top), x(outer.right), y(bottom)];
    };
    const nodes = app.graph.nodes.map((node) => {
        const [x, y] = node.pos;
        const [width, height] = node.size;
        const element = vue && document.querySelector(`[data-node-id="${node.id}"]`);
        if (vue && !element) return [node.title, null];
        const title = LiteGraph.NODE_TITLE_HEIGHT;
        return [node.title, vue ? measured(element) : [x, y - title, x + width, y + height]];
    });
    const titles = app.graph.groups.map((group) => {
        const [x, y] = group.pos;
        const height = (group.font_size || LiteGraph.DEFAULT_GROUP_FONT_SIZE) * 1.4;
        return [group.title, [x, y, x + group.size[0], y + height]];
    });
    return {nodes, titles};
}"""


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Box) -> bool:
        """Whether the two boxes overlap by more than an edge."""
        return (
            min(self.right, other.right) - max(self.left, other.left) > SLACK
            and min(self.bottom, other.bottom) - max(self.top, other.top) > SLACK
        )


def covered(page: ComfyPage) -> list[str]:
    """A sentence for each pair of overlapping nodes, and for each node on a group's title."""
    boxes = page.evaluate(_MEASURE)
    assert all(box for _, box in boxes["nodes"]), "a node is not drawn"
    nodes = [(title, Box(*box)) for title, box in boxes["nodes"]]
    titles = [(title, Box(*box)) for title, box in boxes["titles"]]
    overlaps = [f"{a} and {b} overlap" for (a, x), (b, y) in combinations(nodes, 2) if x.covers(y)]
    return overlaps + [
        f"{node} covers the title {title}"
        for node, x in nodes
        for title, y in titles
        if x.covers(y)
    ]
