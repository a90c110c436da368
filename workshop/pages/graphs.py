"""The graphs that the help pages show: which nodes, their values, and how they stand.

Nodes that are not shown run, too, so that previews hold real results of the demo models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..demo.rows import SamplingSettings

SETTINGS = SamplingSettings()
TWO_SEED = 7  # one that gives two characters
_PREVIEW = (170, 240)  # of a node that shows a square result


@dataclass(frozen=True)
class Output:
    """An output of a node, to be connected to another one's input."""

    node: int
    name: str


@dataclass(frozen=True)
class Node:
    """A node of a graph.

    Attributes:
        size: width and height in units of the graph; None for what the page gives it.
        inputs: name -> what is connected there.
        values: of widgets, by name.
    """

    index: int
    kind: str
    title: str | None
    size: tuple[int, int] | None
    inputs: dict[str, Output]
    values: dict[str, Any]

    def __getitem__(self, output: str) -> Output:
        return Output(self.index, output)


@dataclass
class Graph:
    """Nodes, and those shown: columns from left to right, each a list of rows of nodes."""

    nodes: list[Node] = field(default_factory=list)
    columns: list[list[tuple[Node, ...]]] = field(default_factory=list)
    hover: str | None = None  # a CSS selector: what the mouse rests on

    def add(
        self, kind: str, title: str | None = None, size: tuple[int, int] | None = None, **given: Any
    ) -> Node:
        """Add a node; `given` are its connections and the values of its widgets."""
        inputs = {name: value for name, value in given.items() if isinstance(value, Output)}
        values = {name: value for name, value in given.items() if name not in inputs}
        node = Node(len(self.nodes), kind, title, size, inputs, values)
        self.nodes.append(node)
        return node

    def gallery(self, row: str, pictures: Sequence[dict[str, Any] | int], **given: Any) -> Node:
        """EasyRef References with pictures of a row of the demo's references."""
        entries = [{"number": p} if isinstance(p, int) else dict(p) for p in pictures]
        for entry in entries:
            entry["file"] = f"easyref/{row} {entry.pop('number')}.png"
        state = json.dumps({"version": 1, "pictures": [{"weight": 1, **e} for e in entries]})
        return self.add("EasyRefReferences", gallery=state, **given)

    def result(
        self,
        models: Node,
        model: Output,
        positive: Output,
        title: str,
        size: tuple[int, int] = _PREVIEW,
        across: int = 1,
        seed: int = SETTINGS.seed,
    ) -> Node:
        """Sample a picture, `across` times as wide as high, and show it."""
        negative = self.add("CLIPTextEncode", clip=models["clip"], text=SETTINGS.negative)
        latent = self.add("EmptyLatentImage", width=across * SETTINGS.side, height=SETTINGS.side)
        sampled = self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative["CONDITIONING"],
            latent_image=latent["LATENT"],
            seed=seed,
            steps=SETTINGS.steps,
            cfg=SETTINGS.cfg,
            sampler_name="ddim",
            scheduler="ddim_uniform",
        )
        decoded = self.add("VAEDecode", samples=sampled["LATENT"], vae=models["vae"])
        larger = self.add(
            "ImageScaleBy", image=decoded["IMAGE"], upscale_method="lanczos", scale_by=2
        )
        return self.add("PreviewImage", title, size, images=larger["IMAGE"])

    def text(self, models: Node, text: str) -> Node:
        return self.add("CLIPTextEncode", clip=models["clip"], text=text)

    def half(self, models: Node, text: str, place: int) -> Node:
        """A prompt for the left (0) or right (1) half of a picture twice as wide as high."""
        side = SETTINGS.side
        return self.add(
            "ConditioningSetArea",
            conditioning=self.text(models, text)["CONDITIONING"],
            width=side,
            height=side,
            x=place * side,
        )

    def show(self, *columns: Sequence[Node | tuple[Node, ...]]) -> Graph:
        self.columns = [
            [row if isinstance(row, tuple) else (row,) for row in column] for column in columns
        ]
        return self


def _encoded(graph: Graph, models: Node, row: str, prompt: str, count: int = 4) -> Node:
    group = graph.gallery(row, range(1, count + 1))
    return graph.add(
        "EasyRefEncode", easyref=models["easyref"], references=group["references"], prompt=prompt
    )


def loader() -> Graph:
    graph = Graph()
    loaded = graph.add(
        "EasyRefLoader", None, (270, 0), adapter="model.safetensors", mllm="Qwen2-VL-2B-Instruct"
    )
    encoded = graph.add("EasyRefEncode", None, (230, 240), easyref=loaded["easyref"])
    return graph.show([loaded], [encoded])


def references() -> Graph:
    graph = Graph()
    entries = [
        {"number": 1},
        {"number": 2, "crop": [0.15, 0.05, 0.7, 0.7]},
        {"number": 3, "weight": 0.5},
        {"number": 4},
    ]
    graph.hover = ".easyref-tile:nth-child(2)"
    return graph.show([graph.gallery("flower", entries)])


def encode() -> Graph:
    graph = Graph()
    group = graph.gallery("flower", range(1, 4))
    encoded = graph.add(
        "EasyRefEncode",
        None,
        (270, 300),
        references=group["references"],
        prompt="a watercolour of this character in a forest",
    )
    return graph.show([group], [encoded])


def apply() -> Graph:
    graph, prompt = Graph(), "in a city at night"
    models = graph.add("EasyRefDemoModels")
    encoded, positive = _encoded(graph, models, "star", prompt), graph.text(models, prompt)
    right = graph.add("LoadImageMask", image="right half.png", channel="red")
    shown, results = None, []
    for title, given in (
        ("weight 0", {"weight": 0}),
        ("weight 0.5", {"weight": 0.5}),
        ("weight 1", {"weight": 1}),
        ("mask: right half", {"mask": right["MASK"]}),
    ):
        applied = graph.add(
            "EasyRefApply",
            None,
            (240, 0),
            model=models["model"],
            easyref=models["easyref"],
            tokens=encoded["tokens"],
            **given,
        )
        shown = applied if title == "weight 1" else shown
        results.append(graph.result(models, applied["model"], positive["CONDITIONING"], title))
    assert shown is not None
    return graph.show([shown], [tuple(results[:2]), tuple(results[2:])])


def demo_models() -> Graph:
    graph, prompt = Graph(), "in a desert at sunset"
    models = graph.add("EasyRefDemoModels", None, (210, 0))
    references = graph.add("PreviewImage", "images", (210, 240), images=models["images"])
    positive = graph.text(models, prompt)
    applied = graph.add(
        "EasyRefQuick",
        model=models["model"],
        easyref=models["easyref"],
        images=models["images"],
        prompt=prompt,
    )
    result = graph.result(
        models, applied["model"], positive["CONDITIONING"], "result", (210, 240), seed=2
    )
    return graph.show([models], [references], [result])


def quick() -> Graph:
    graph, prompt = Graph(), "in a city at night"
    models = graph.add("EasyRefDemoModels")
    group = graph.gallery("star", range(1, 5), size=(300, 0))
    quick = graph.add(
        "EasyRefQuick",
        None,
        (250, 200),
        model=models["model"],
        easyref=models["easyref"],
        references=group["references"],
        prompt=prompt,
    )
    positive = graph.text(models, prompt)
    result = graph.result(models, quick["model"], positive["CONDITIONING"], "result", (250, 320))
    return graph.show([group], [quick, result])


def crop() -> Graph:
    graph = Graph()
    picture = graph.add("LoadImage", None, (220, 314), image="masked.png")
    cropped = graph.add(
        "EasyRefCrop", None, (220, 0), images=picture["IMAGE"], mask=picture["MASK"], padding=0.1
    )
    preview = graph.add("PreviewImage", "crop", _PREVIEW, images=cropped["images"])
    return graph.show([picture], [cropped], [preview])


def combine_tokens() -> Graph:
    graph, prompt = Graph(), "in a meadow by day"
    models = graph.add("EasyRefDemoModels")
    first, second = (_encoded(graph, models, row, prompt) for row in ("star", "square"))
    positive = graph.text(models, prompt)
    sets = {"tokens_1": first, "tokens_2": second}
    shown = None
    for method in ("concatenate", "average"):
        sets[method] = graph.add(
            "EasyRefCombineTokens",
            None,
            (240, 0),
            tokens_1=first["tokens"],
            tokens_2=second["tokens"],
            method=method,
        )
        shown = shown or sets[method]
    assert shown is not None
    results = []
    for title, tokens in sets.items():
        applied = graph.add(
            "EasyRefApply",
            model=models["model"],
            easyref=models["easyref"],
            tokens=tokens["tokens"],
        )
        results.append(graph.result(models, applied["model"], positive["CONDITIONING"], title))
    return graph.show(results[:2], [shown], results[2:])


def inspect() -> Graph:
    graph = Graph()
    models = graph.add("EasyRefDemoModels")
    group = graph.gallery("flower", range(1, 3))
    inspected = graph.add(
        "EasyRefInspect",
        None,
        (360, 412),
        easyref=models["easyref"],
        references=group["references"],
        prompt="in the snow at night",
    )
    return graph.show([inspected])


def region() -> Graph:
    graph, prompt = Graph(), "in a meadow by day"
    models = graph.add("EasyRefDemoModels")
    regions: list[Node] = []
    for row, half in (("flower", "left half"), ("star", "right half")):
        encoded = _encoded(graph, models, row, prompt)
        mask = graph.add("LoadImageMask", image=f"{half}.png", channel="red")
        before = {"previous": regions[-1]["regions"]} if regions else {}
        regions.append(
            graph.add(
                "EasyRefRegion",
                f"Region: {half}",
                (230, 0),
                tokens=encoded["tokens"],
                mask=mask["MASK"],
                **before,
            )
        )
    applied = graph.add(
        "EasyRefApply",
        model=models["model"],
        easyref=models["easyref"],
        regions=regions[-1]["regions"],
    )
    both = graph.add(
        "ConditioningCombine",
        conditioning_1=graph.half(models, prompt, 0)["CONDITIONING"],
        conditioning_2=graph.half(models, prompt, 1)["CONDITIONING"],
    )
    result = graph.result(
        models,
        applied["model"],
        both["CONDITIONING"],
        "result",
        (475, 270),
        across=2,
        seed=TWO_SEED,
    )
    return graph.show([tuple(regions), result])


def layer_weights() -> Graph:
    graph = Graph()
    layers = graph.add("EasyRefLayerWeights", None, (270, 0), profile="style and composition")
    text = graph.add("PreviewAny", None, (220, 338), source=layers["text"])
    return graph.show([layers], [text])


def set_conditioning() -> Graph:
    graph, prompt = Graph(), "in a meadow by day"
    models = graph.add("EasyRefDemoModels")
    halves: list[Node] = []
    for place, (row, half) in enumerate((("flower", "left half"), ("star", "right half"))):
        encoded = _encoded(graph, models, row, prompt)
        halves.append(
            graph.add(
                "EasyRefSetConditioning",
                f"Set Conditioning: {half}",
                (300, 0),
                conditioning=graph.half(models, prompt, place)["CONDITIONING"],
                tokens=encoded["tokens"],
            )
        )
    both = graph.add(
        "ConditioningCombine",
        None,
        (270, 0),
        conditioning_1=halves[0]["conditioning"],
        conditioning_2=halves[1]["conditioning"],
    )
    applied = graph.add("EasyRefApply", model=models["model"], easyref=models["easyref"])
    result = graph.result(
        models,
        applied["model"],
        both["CONDITIONING"],
        "result",
        (270, 220),
        across=2,
        seed=TWO_SEED,
    )
    return graph.show(halves, [both, result])


def save_tokens() -> Graph:
    graph = Graph()
    encoded = graph.add("EasyRefEncode", None, (230, 240), prompt="a portrait of this woman")
    saved = graph.add(
        "EasyRefSaveTokens",
        None,
        (240, 0),
        tokens=encoded["tokens"],
        filename_prefix="people/ann",
    )
    return graph.show([encoded], [saved])


def load_tokens() -> Graph:
    graph = Graph()
    loaded = graph.add(
        "EasyRefLoader", None, (240, 0), adapter="model.safetensors", mllm="from adapter"
    )
    tokens = graph.add(
        "EasyRefLoadTokens",
        None,
        (240, 0),
        file="people/ann.safetensors [output]",
    )
    applied = graph.add(
        "EasyRefApply", None, (230, 0), easyref=loaded["easyref"], tokens=tokens["tokens"]
    )
    return graph.show([loaded, tokens], [applied])


# The name of the picture -> its graph.
GRAPHS: dict[str, Callable[[], Graph]] = {
    graph.__name__: graph
    for graph in (
        apply,
        combine_tokens,
        crop,
        demo_models,
        encode,
        inspect,
        layer_weights,
        load_tokens,
        loader,
        quick,
        references,
        region,
        save_tokens,
        set_conditioning,
    )
}
