"""The graphs photographed for the help pages: their nodes, values and layout.

Nodes that are not shown run too, so previews hold real results of the demo models. Rows are at most
`WIDE` units wide, so that text stays readable in the narrow help panel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..demo.rows import SamplingSettings

SETTINGS = SamplingSettings()
TWO_SEED = 7  # gives two characters
WIDE = 355
PREVIEW = (170, 240)  # with a square result; two fit into a row


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
    """Nodes and their layout.

    Attributes:
        rows: the nodes shown, from top to bottom, each row from left to right.
        hover: CSS selector of the element under the mouse.
    """

    nodes: list[Node] = field(default_factory=list)
    rows: list[tuple[Node, ...]] = field(default_factory=list)
    hover: str | None = None

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
        size: tuple[int, int] = PREVIEW,
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

    def show(self, *rows: Node | tuple[Node, ...]) -> Graph:
        self.rows = [row if isinstance(row, tuple) else (row,) for row in rows]
        return self


def _encoded(graph: Graph, models: Node, row: str, prompt: str, count: int = 4) -> Node:
    group = graph.gallery(row, range(1, count + 1))
    return graph.add(
        "EasyRefEncode", easyref=models["easyref"], references=group["references"], prompt=prompt
    )


def _applied(graph: Graph, models: Node, **given: Any) -> Node:
    return graph.add(
        "EasyRefApply",
        None,
        (WIDE, 0),
        model=models["model"],
        easyref=models["easyref"],
        **given,
    )


def loader() -> Graph:
    graph = Graph()
    size, mllm = (300, 0), "Qwen2-VL-2B-Instruct"
    return graph.show(
        graph.add("EasyRefLoader", None, size, adapter="model.safetensors", mllm=mllm)
    )


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
    prompt = "a watercolour of this character in a forest"
    encoded = graph.add(
        "EasyRefEncode", None, (330, 230), references=group["references"], prompt=prompt
    )
    return graph.show(group, encoded)


def apply() -> Graph:
    graph, prompt = Graph(), "in a city at night"
    models = graph.add("EasyRefDemoModels")
    encoded, positive = _encoded(graph, models, "star", prompt), graph.text(models, prompt)
    right = graph.add("LoadImageMask", image="right half.png", channel="red")
    settings = {
        "weight 0": {"weight": 0},
        "weight 0.5": {"weight": 0.5},
        "weight 1": {"weight": 1},
        "mask: right half": {"mask": right["MASK"]},
    }
    results = []
    for title, given in settings.items():
        applied = _applied(graph, models, tokens=encoded["tokens"], **given)
        results.append(graph.result(models, applied["model"], positive["CONDITIONING"], title))
    return graph.show(applied, tuple(results[:2]), tuple(results[2:]))


def quick() -> Graph:
    graph, prompt = Graph(), "in a city at night"
    models = graph.add("EasyRefDemoModels")
    group = graph.gallery("star", range(1, 5), size=(330, 0))
    quick = graph.add(
        "EasyRefQuick",
        None,
        (330, 190),
        model=models["model"],
        easyref=models["easyref"],
        references=group["references"],
        prompt=prompt,
    )
    positive = graph.text(models, prompt)
    result = graph.result(models, quick["model"], positive["CONDITIONING"], "result", (330, 310))
    return graph.show(group, quick, result)


def crop() -> Graph:
    graph = Graph()
    picture = graph.add("LoadImage", None, (170, 330), image="masked.png")
    cropped = graph.add(
        "EasyRefCrop",
        None,
        (WIDE, 0),
        images=picture["IMAGE"],
        mask=picture["MASK"],
        padding=0.1,
    )
    preview = graph.add("PreviewImage", "crop", PREVIEW, images=cropped["images"])
    return graph.show(cropped, (picture, preview))


def combine_tokens() -> Graph:
    graph, prompt = Graph(), "in a meadow by day"
    models = graph.add("EasyRefDemoModels")
    first, second = (_encoded(graph, models, row, prompt) for row in ("star", "square"))
    positive = graph.text(models, prompt)
    combined = {
        method: graph.add(
            "EasyRefCombineTokens",
            None,
            (WIDE, 0),
            tokens_1=first["tokens"],
            tokens_2=second["tokens"],
            method=method,
        )
        for method in ("average", "concatenate")
    }
    results = []
    for title, tokens in {"tokens_1": first, "tokens_2": second, **combined}.items():
        applied = _applied(graph, models, tokens=tokens["tokens"])
        results.append(graph.result(models, applied["model"], positive["CONDITIONING"], title))
    return graph.show(tuple(results[:2]), combined["concatenate"], tuple(results[2:]))


def inspect() -> Graph:
    graph = Graph()
    models = graph.add("EasyRefDemoModels")
    group = graph.gallery("flower", range(1, 3))
    return graph.show(
        graph.add(
            "EasyRefInspect",
            None,
            (WIDE, 405),
            easyref=models["easyref"],
            references=group["references"],
            prompt="in the snow at night",
        )
    )


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
                half.capitalize(),
                (170, 0),
                tokens=encoded["tokens"],
                mask=mask["MASK"],
                **before,
            )
        )
    applied = _applied(graph, models, regions=regions[-1]["regions"])
    both = graph.add(
        "ConditioningCombine",
        conditioning_1=graph.half(models, prompt, 0)["CONDITIONING"],
        conditioning_2=graph.half(models, prompt, 1)["CONDITIONING"],
    )
    result = graph.result(
        models, applied["model"], both["CONDITIONING"], "result", (WIDE, 240), 2, TWO_SEED
    )
    return graph.show(tuple(regions), result)


def layer_weights() -> Graph:
    graph = Graph()
    layers = graph.add("EasyRefLayerWeights", None, (330, 0), profile="style and composition")
    text = graph.add("PreviewAny", None, (330, 250), source=layers["text"])
    return graph.show(layers, text)


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
                (WIDE, 0),
                conditioning=graph.half(models, prompt, place)["CONDITIONING"],
                tokens=encoded["tokens"],
            )
        )
    both = graph.add(
        "ConditioningCombine",
        None,
        (WIDE, 0),
        conditioning_1=halves[0]["conditioning"],
        conditioning_2=halves[1]["conditioning"],
    )
    result = graph.result(
        models,
        _applied(graph, models)["model"],
        both["CONDITIONING"],
        "result",
        (WIDE, 240),
        2,
        TWO_SEED,
    )
    return graph.show(*halves, both, result)


def save_tokens() -> Graph:
    graph = Graph()
    encoded = graph.add("EasyRefEncode")
    return graph.show(
        graph.add(
            "EasyRefSaveTokens",
            None,
            (300, 0),
            tokens=encoded["tokens"],
            filename_prefix="people/ann",
        )
    )


def load_tokens() -> Graph:
    graph = Graph()
    file = "people/ann_00001_.safetensors [output]"
    return graph.show(graph.add("EasyRefLoadTokens", None, (330, 0), file=file))


def demo_models() -> Graph:
    graph, prompt = Graph(), "in a meadow by day"
    models = graph.add("EasyRefDemoModels", None, (WIDE, 0))
    images = graph.add("PreviewImage", "images", PREVIEW, images=models["images"])
    quick = graph.add(
        "EasyRefQuick",
        model=models["model"],
        easyref=models["easyref"],
        images=models["images"],
        prompt=prompt,
    )
    positive = graph.text(models, prompt)
    result = graph.result(models, quick["model"], positive["CONDITIONING"], "result")
    return graph.show(models, (images, result))


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
