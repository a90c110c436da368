"""The graphs photographed for the help pages: their nodes, values and layout.

Nodes that are not shown run too, so previews hold real results of the demo models. Rows are at most
`WIDE` units wide, so that text stays readable in the narrow help panel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo.rows import SamplingSettings

Size = tuple[int, int]

SETTINGS = SamplingSettings()
TWO_SEED = 7  # gives two characters
WIDE = 355
PREVIEW = (170, 240)  # with a square result; two fit into a row
HALVES = ("left half", "right half")


@dataclass(frozen=True)
class Output:
    """An output of a node, to be connected to an input."""

    node: int
    name: str


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        size: width and height in units of the graph, height 0 for the least; None: as the page
            gives it.
        inputs: name -> what is connected there.
        values: of widgets, by name.
    """

    index: int
    kind: str
    title: str | None
    size: Size | None
    inputs: dict[str, Output]
    values: dict[str, Any]

    def __getitem__(self, output: str) -> Output:
        return Output(self.index, output)


class Graph:
    """Nodes and their layout.

    Attributes:
        rows: the nodes shown, from top to bottom, each row from left to right.
        hover: CSS selector of the element under the mouse.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.rows: list[tuple[Node, ...]] = []
        self.hover: str | None = None

    def add(
        self, kind: str, size: Size | None = None, title: str | None = None, **given: Any
    ) -> Node:
        """Add a node; `given` are its connections and the values of its widgets."""
        inputs = {name: value for name, value in given.items() if isinstance(value, Output)}
        values = {name: value for name, value in given.items() if name not in inputs}
        node = Node(len(self.nodes), kind, title, size, inputs, values)
        self.nodes.append(node)
        return node

    def gallery(self, row: str, pictures: Sequence[dict[str, Any] | int], **given: Any) -> Node:
        """EasyRef References with pictures of a row of the demo's references, by number."""
        entries = [{"number": p} if isinstance(p, int) else dict(p) for p in pictures]
        for entry in entries:
            entry["file"] = f"easyref/{row} {entry.pop('number')}.png"
        state = json.dumps({"version": 1, "pictures": [{"weight": 1, **e} for e in entries]})
        return self.add("EasyRefReferences", gallery=state, **given)

    def mask(self, half: str) -> Output:
        return self.add("LoadImageMask", image=f"{half}.png", channel="red")["MASK"]

    def show(self, *rows: Node | tuple[Node, ...]) -> Graph:
        self.rows = [row if isinstance(row, tuple) else (row,) for row in rows]
        return self


class DemoGraph(Graph):
    """A graph that samples with the demo models, always with the same prompt."""

    def __init__(self, prompt: str) -> None:
        super().__init__()
        self.prompt = prompt
        self.models = self.add("EasyRefDemoModels", (WIDE, 0))

    def encoded(self, row: str) -> Output:
        """Tokens of a row of the demo's references."""
        group = self.gallery(row, range(1, 5))["references"]
        easyref = self.models["easyref"]
        encoded = self.add("EasyRefEncode", easyref=easyref, references=group, prompt=self.prompt)
        return encoded["tokens"]

    def applied(self, **given: Any) -> Node:
        models = self.models
        return self.add(
            "EasyRefApply", (WIDE, 0), model=models["model"], easyref=models["easyref"], **given
        )

    def quick(self, **given: Any) -> Node:
        models = {"model": self.models["model"], "easyref": self.models["easyref"]}
        return self.add("EasyRefQuick", (330, 190), prompt=self.prompt, **models, **given)

    def text(self, text: str) -> Output:
        return self.add("CLIPTextEncode", clip=self.models["clip"], text=text)["CONDITIONING"]

    def half(self, place: int) -> Output:
        """The prompt for the left (0) or right (1) half of a picture twice as wide as high."""
        side = SETTINGS.side
        area = {"width": side, "height": side, "x": place * side}
        conditioning = self.text(self.prompt)
        return self.add("ConditioningSetArea", conditioning=conditioning, **area)["CONDITIONING"]

    def both(self, halves: Sequence[Output]) -> Node:
        given = {f"conditioning_{number}": half for number, half in enumerate(halves, start=1)}
        return self.add("ConditioningCombine", (WIDE, 0), **given)

    def result(self, model: Node, title: str = "result", size: Size = PREVIEW) -> Node:
        """A square picture."""
        return self._sampled(model["model"], self.text(self.prompt), title, size, 1, SETTINGS.seed)

    def wide_result(self, model: Node, positive: Output) -> Node:
        """A picture twice as wide as high, of two characters."""
        return self._sampled(model["model"], positive, "result", (WIDE, 240), 2, TWO_SEED)

    def _sampled(
        self, model: Output, positive: Output, title: str, size: Size, across: int, seed: int
    ) -> Node:
        latent = self.add("EmptyLatentImage", width=across * SETTINGS.side, height=SETTINGS.side)
        sampled = self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=self.text(SETTINGS.negative),
            latent_image=latent["LATENT"],
            seed=seed,
            steps=SETTINGS.steps,
            cfg=SETTINGS.cfg,
            sampler_name="ddim",
            scheduler="ddim_uniform",
        )
        decoded = self.add("VAEDecode", samples=sampled["LATENT"], vae=self.models["vae"])["IMAGE"]
        larger = self.add("ImageScaleBy", image=decoded, upscale_method="lanczos", scale_by=2)
        return self.add("PreviewImage", size, title, images=larger["IMAGE"])


def loader() -> Graph:
    graph = Graph()
    files = {"adapter": "model.safetensors", "mllm": "Qwen2-VL-2B-Instruct"}
    return graph.show(graph.add("EasyRefLoader", (300, 0), **files))


def references() -> Graph:
    graph = Graph()
    entries = [
        {"number": 1},
        {"number": 2, "crop": [0.15, 0.05, 0.7, 0.7]},
        {"number": 3, "weight": 0.5},
        {"number": 4},
    ]
    graph.hover = ".easyref-tile:nth-child(2)"
    return graph.show(graph.gallery("flower", entries))


def encode() -> Graph:
    graph = Graph()
    group = graph.gallery("flower", range(1, 4))
    given = {
        "references": group["references"],
        "prompt": "a watercolour of this character in a forest",
    }
    return graph.show(group, graph.add("EasyRefEncode", (330, 230), **given))


def apply() -> Graph:
    graph = DemoGraph("in a city at night")
    tokens = graph.encoded("star")
    settings = {
        "weight 0": {"weight": 0},
        "weight 0.5": {"weight": 0.5},
        "weight 1": {"weight": 1},
        "mask: right half": {"mask": graph.mask("right half")},
    }
    applied = [graph.applied(tokens=tokens, **given) for given in settings.values()]
    results = [graph.result(*pair) for pair in zip(applied, settings, strict=True)]
    return graph.show(applied[-1], tuple(results[:2]), tuple(results[2:]))


def identity() -> Graph:
    graph = DemoGraph("in a city at night")
    given = {"model": graph.models["model"], "vae": graph.models["vae"]}
    given["references"] = graph.gallery("star", range(1, 3))["references"]
    nodes = [graph.add("EasyRefIdentity", (WIDE, 0), weight=weight, **given) for weight in (0, 0.7)]
    results = [graph.result(node, f"weight {w}") for node, w in zip(nodes, (0, 0.7), strict=True)]
    return graph.show(nodes[-1], tuple(results))


def quick() -> Graph:
    graph = DemoGraph("in a city at night")
    group = graph.gallery("star", range(1, 5), size=(330, 0))
    node = graph.quick(references=group["references"])
    return graph.show(group, node, graph.result(node, size=(330, 310)))


def demo_models() -> Graph:
    graph = DemoGraph("in a meadow by day")
    images = graph.models["images"]
    shown = graph.add("PreviewImage", PREVIEW, "images", images=images)
    return graph.show(graph.models, (shown, graph.result(graph.quick(images=images))))


def crop() -> Graph:
    graph = Graph()
    loaded = graph.add("LoadImage", (170, 330), image="masked.png")
    given = {"images": loaded["IMAGE"], "mask": loaded["MASK"], "padding": 0.1}
    cropped = graph.add("EasyRefCrop", (WIDE, 0), **given)
    preview = graph.add("PreviewImage", PREVIEW, "crop", images=cropped["images"])
    return graph.show(cropped, (loaded, preview))


def combine_tokens() -> Graph:
    graph = DemoGraph("in a meadow by day")
    sets = {"tokens_1": graph.encoded("star"), "tokens_2": graph.encoded("square")}
    combined = [
        graph.add("EasyRefCombineTokens", (WIDE, 0), method=method, **sets)
        for method in ("average", "concatenate")
    ]
    shown = {**sets, "average": combined[0]["tokens"], "concatenate": combined[1]["tokens"]}
    results = [graph.result(graph.applied(tokens=t), title) for title, t in shown.items()]
    return graph.show(tuple(results[:2]), combined[1], tuple(results[2:]))


def inspect() -> Graph:
    graph = DemoGraph("in the snow at night")
    given = {
        "easyref": graph.models["easyref"],
        "references": graph.gallery("flower", range(1, 3))["references"],
        "prompt": graph.prompt,
    }
    return graph.show(graph.add("EasyRefInspect", (WIDE, 405), **given))


def region() -> Graph:
    graph = DemoGraph("in a meadow by day")
    regions: list[Node] = []
    for row, half in zip(("flower", "star"), HALVES, strict=True):
        given = {"tokens": graph.encoded(row), "mask": graph.mask(half)}
        if regions:
            given["previous"] = regions[-1]["regions"]
        regions.append(graph.add("EasyRefRegion", (170, 0), half.capitalize(), **given))
    both = graph.both([graph.half(0), graph.half(1)])
    applied = graph.applied(regions=regions[-1]["regions"])
    return graph.show(tuple(regions), graph.wide_result(applied, both["CONDITIONING"]))


def layer_weights() -> Graph:
    graph = Graph()
    layers = graph.add("EasyRefLayerWeights", (330, 0), profile="style and composition")
    return graph.show(layers, graph.add("PreviewAny", (330, 250), source=layers["text"]))


def mllm_layers() -> Graph:
    graph = Graph()
    layers = graph.add("EasyRefMllmLayers", (330, 0), preset="early", picture_layers="1, 0.5, 1")
    return graph.show(layers, graph.add("PreviewAny", (330, 250), source=layers["text"]))


def set_conditioning() -> Graph:
    graph = DemoGraph("in a meadow by day")
    halves: list[Node] = []
    for place, row in enumerate(("flower", "star")):
        given = {"conditioning": graph.half(place), "tokens": graph.encoded(row)}
        title = f"Set Conditioning: {HALVES[place]}"
        halves.append(graph.add("EasyRefSetConditioning", (WIDE, 0), title, **given))
    both = graph.both([half["conditioning"] for half in halves])
    return graph.show(*halves, both, graph.wide_result(graph.applied(), both["CONDITIONING"]))


def save_tokens() -> Graph:
    graph = Graph()
    given = {"tokens": graph.add("EasyRefEncode")["tokens"], "filename_prefix": "people/ann"}
    return graph.show(graph.add("EasyRefSaveTokens", (300, 0), **given))


def score() -> Graph:
    graph = Graph()
    given = {
        "prompt": "in a city at night",
        "clip_model": "clip-vit-large-patch14",
        "dino_model": "dinov2-small",
    }
    return graph.show(graph.add("EasyRefScore", (330, 250), **given))


def stages() -> Graph:
    graph = Graph()
    return graph.show(graph.add("EasyRefStages", (330, 0), preset="steps", cross_fade=0.1))


def load_tokens() -> Graph:
    graph = Graph()
    file = "people/ann_00001_.safetensors [output]"
    return graph.show(graph.add("EasyRefLoadTokens", (330, 0), file=file))


# The name of the picture -> its graph.
GRAPHS: dict[str, Callable[[], Graph]] = {
    graph.__name__: graph
    for graph in (
        apply,
        combine_tokens,
        crop,
        demo_models,
        encode,
        identity,
        inspect,
        layer_weights,
        mllm_layers,
        load_tokens,
        loader,
        quick,
        references,
        region,
        save_tokens,
        score,
        set_conditioning,
        stages,
    )
}
