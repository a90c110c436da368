"""The templates: what each graph holds, where its nodes stand, and what its note says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .workflow_editor import Box, Template
from .workflow_graph import Graph, Node, Subgraph
from .workflow_parts import (
    EXAMPLE,
    TOO_STRONG,
    add_gallery,
    add_models,
    add_reading,
    add_sampling,
    add_texts,
    drop_pictures,
    note,
)

_HIKING = "the character hiking through a pine forest, storybook illustration, soft morning light"
_LIGHTHOUSE = "a lighthouse on a cliff above the sea, at dawn"
_FRIENDS = "two friends having coffee at a street cafe, one left and one right, film photo"
_SAMPLING_BOX = "5. Sampling and result"


def templates() -> list[Template]:
    return [
        quick(),
        character(),
        style(),
        controlnet(),
        two_people(),
        curves_and_layers(),
        tokens(),
        with_lora(),
        subgraph(),
    ]


def quick() -> Template:
    graph = Graph()
    models = add_models(graph)
    texts = add_texts(graph, models, _HIKING)
    group = add_gallery(graph)
    steered = graph.add(
        "EasyRefQuick",
        model=models.model,
        easyref=models.easyref,
        references=group,
        prompt=texts.prompt,
    )
    sampling = add_sampling(
        graph, models, steered, texts.positive, texts.negative, "4. Sampling and result"
    )
    easyref = Box("3. EasyRef", [[group], [steered]], own=True)
    text = note(
        "EasyRef in its smallest form",
        models,
        [
            drop_pictures("pictures of one person, character or style"),
            "Say in **Prompt** what the picture shall show. Both SDXL and EasyRef read it.",
        ],
        [
            "Too much like the references, or the prompt is lost: lower `weight` in **EasyRef "
            "Quick** to 0.6.",
            "Too little like them: more references that share just what you want, or `weight` 1.2.",
            "For masks, curves and everything else use **EasyRef Encode** and **EasyRef Apply**, "
            "as in the template easyref_character.",
        ],
    )
    return Template("easyref_quick", graph, [models.stage, [texts.box, easyref], [sampling]], text)


def character() -> Template:
    return _single_group(
        "easyref_character",
        "EasyRef: one character, any scene",
        _HIKING,
        [
            drop_pictures("pictures of one character"),
            "Say in **Prompt** what the character does and where. Both SDXL and EasyRef read it.",
        ],
        [
            TOO_STRONG,
            "Too little like them: more references of the same character, or `weight` 1.2.",
            "Something else of the references comes along, such as their background: take "
            "pictures that share nothing but the character, or crop them in the gallery.",
        ],
    )


def style() -> Template:
    return _single_group(
        "easyref_style",
        "EasyRef: one style, any subject",
        _LIGHTHOUSE,
        [
            drop_pictures("pictures of one style with different subjects"),
            "Say in **Prompt** what to draw; leave the style to the references.",
        ],
        [
            "Things of the references come along: take references whose subjects have nothing in "
            "common, or connect **EasyRef Layer Weights** with the profile `style` to **EasyRef "
            "Apply**.",
            TOO_STRONG,
            "Too little of the style: more references, `weight` 1.2, or a word for the style in "
            "the prompt.",
        ],
    )


def _single_group(
    name: str,
    title: str,
    prompt: str,
    steps: Sequence[str],
    hints: Sequence[str],
    remarks: Sequence[str] = (),
    lora: bool = False,
    inside: Callable[[Node, Node], Subgraph] | None = None,
) -> Template:
    """
    Args:
        inside: of EasyRef Encode and EasyRef Apply, where these are to be shown as one node.
    """
    graph = Graph()
    models = add_models(graph, lora=lora)
    read = add_reading(graph, models, prompt)
    applied = graph.add(
        "EasyRefApply", model=models.model, easyref=models.easyref, tokens=read.tokens
    )
    sampling = add_sampling(
        graph, models, applied, read.texts.positive, read.texts.negative, _SAMPLING_BOX
    )
    easyref = Box("4. EasyRef", [[read.tokens, applied]], own=True)
    text = note(title, models, steps, hints, remarks)
    stages = [models.stage, [read.texts.box, read.references], [easyref], [sampling]]
    return Template(name, graph, stages, text, inside and inside(read.tokens, applied))


def controlnet() -> Template:
    graph = Graph()
    models = add_models(graph, control_net=True)
    read = add_reading(graph, models, _HIKING)
    applied = graph.add(
        "EasyRefApply", model=models.model, easyref=models.easyref, tokens=read.tokens
    )
    pose = graph.add("LoadImage", "Pose or composition", image=EXAMPLE)
    edges = graph.add("Canny", "Edges", image=pose, low_threshold=0.1, high_threshold=0.3)
    controlled = graph.add(
        "ControlNetApplyAdvanced",
        "Apply ControlNet",
        positive=read.texts.positive,
        negative=read.texts.negative,
        control_net=models.control_net,
        image=edges,
        strength=0.7,
        vae=models.vae,
    )
    sampling = add_sampling(
        graph, models, applied, controlled.out(0), controlled.out(1), "6. Sampling and result"
    )
    easyref = Box("4. EasyRef", [[read.tokens, applied]], own=True)
    structure = Box("5. Structure", [[pose], [edges, controlled]])
    text = note(
        "EasyRef with a ControlNet",
        models,
        [
            drop_pictures("pictures of one character"),
            "Choose the picture whose lines the result shall follow in **Pose or composition**; "
            "the example only holds the place.",
            "Say in **Prompt** what the character does and where.",
        ],
        [
            "Too stiff, or the shape is that of the control picture: lower `strength` in **Apply "
            "ControlNet**, or its `end_percent` to 0.5.",
            "It ignores the lines: raise `strength`, or lower the thresholds in **Edges**.",
            TOO_STRONG,
        ],
        ["The ControlNet sees your prompt only; the references act in SDXL beside it."],
    )
    stages = [models.stage, [read.texts.box, read.references], [easyref], [structure], [sampling]]
    return Template("easyref_controlnet", graph, stages, text)


def two_people() -> Template:
    graph = Graph()
    models = add_models(graph)
    texts = add_texts(graph, models, _FRIENDS)
    pictures = [graph.add("LoadImage", f"Person {name} 1", image=EXAMPLE) for name in "AB"]
    groups = [
        graph.add("EasyRefReferences", f"Person {name}", **{"images.image_1": picture})
        for name, picture in zip("AB", pictures, strict=True)
    ]
    read = [
        graph.add(
            "EasyRefEncode",
            f"Read person {name}",
            easyref=models.easyref,
            references=group,
            prompt=texts.prompt,
        )
        for name, group in zip("AB", groups, strict=True)
    ]
    ground = graph.add("SolidMask", "Whole picture", value=0.0, width=1024, height=1024)
    half = graph.add("SolidMask", "Left half", value=1.0, width=512, height=1024)
    left = graph.add(
        "MaskComposite", "Left: person A", destination=ground, source=half, operation="add"
    )
    right = graph.add("InvertMask", "Right: person B", mask=left)
    region_a = graph.add("EasyRefRegion", "Region of A", tokens=read[0], mask=left)
    region_b = graph.add(
        "EasyRefRegion", "Region of B", tokens=read[1], mask=right, previous=region_a
    )
    applied = graph.add(
        "EasyRefApply", model=models.model, easyref=models.easyref, regions=region_b
    )
    sampling = add_sampling(
        graph, models, applied, texts.positive, texts.negative, "6. Sampling and result"
    )
    references = [
        Box(f"3. References of person {name}", [[picture], [group], [encoded]])
        for name, picture, group, encoded in zip("AB", pictures, groups, read, strict=True)
    ]
    masks = Box("4. Where each of them stands", [[ground, half], [left, right]])
    easyref = Box("5. EasyRef", [[region_a, region_b, applied]], own=True)
    text = note(
        "EasyRef: two people, each with references",
        models,
        [
            "Choose a picture of one person in **Person A 1**, of the other in **Person B 1**; the "
            "example only holds the place. Drop more onto the two **Person** nodes, or connect "
            "them there. They may have any sizes.",
            "Say in **Prompt** who they are, what they do, and that one stands left and one right.",
            "Each person's references act where the mask is white. Here A has the left half and B "
            "the right: for another share change `width` of **Left half**. Masks that you paint "
            "(**Load Image (as Mask)**) go to the two **Region** nodes; any size will do.",
        ],
        [
            "Both look alike: leave a gap between the masks, and describe both in the prompt.",
            "One of them is missing: name both places in the prompt, or add a ControlNet for the "
            "poses.",
            "One is too strong: lower `weight` of this **Region**.",
            "Hard seams: blur the masks, or set `end_percent` in **EasyRef Apply** to 0.8.",
        ],
        [
            "The masks say where references act, not where SDXL draws people: that is up to the "
            "prompt."
        ],
    )
    stages = [
        models.stage,
        [texts.box, masks],
        references,
        [easyref],
        [sampling],
    ]
    return Template("easyref_two_people", graph, stages, text)


def curves_and_layers() -> Template:
    graph = Graph()
    models = add_models(graph)
    read = add_reading(graph, models, _LIGHTHOUSE)
    curve = graph.add(
        "EasyRefWeightCurve", "Prompt first, references later", start_value=0.4, end_value=1.0
    )
    layers = graph.add("EasyRefLayerWeights", "Style only", profile="style")
    applied = graph.add(
        "EasyRefApply",
        model=models.model,
        easyref=models.easyref,
        tokens=read.tokens,
        layer_weights=layers,
        curve=curve,
    )
    sampling = add_sampling(
        graph, models, applied, read.texts.positive, read.texts.negative, _SAMPLING_BOX
    )
    easyref = Box("4. When and where in SDXL", [[read.tokens, applied, curve], [layers]], own=True)
    text = note(
        "EasyRef: weight curve and layer profile",
        models,
        [
            drop_pictures("pictures that share a style"),
            "Say in **Prompt** what to draw; leave the style to the references.",
            "**Prompt first, references later** multiplies the weight over the sampling: here 0.4 "
            "at the start, where the composition is decided, and 1 at the end. `custom points` "
            "takes a line of your own, such as `0:0, 0.3:1, 1:0.5`.",
            "**Style only** lets the references act in the layers known for style. Choose another "
            "`profile`, or `all` and factors of your own below it.",
        ],
        [
            "Too little of the references: `weight` 1.5 in **EasyRef Apply**, `start_value` 1, or "
            "the profile `style and composition`.",
            "Things of the references come along: stay with `style`, and lower `start_value`.",
            "To see what each of them does, disconnect one and run again with the same seed.",
        ],
        [
            "What layers are known for comes from published work on SDXL; how clearly it shows "
            "differs from model to model. The small demo models keep a style in their finest "
            "layers: choose the profile `fine detail` with them. The frames part of the curve is "
            "for batches, as in animations."
        ],
    )
    return Template(
        "easyref_curves_and_layers",
        graph,
        [models.stage, [read.texts.box, read.references], [easyref], [sampling]],
        text,
    )


def tokens() -> Template:
    graph = Graph()
    models = add_models(graph)
    read = add_reading(graph, models, _HIKING)
    saved = graph.add("EasyRefSaveTokens", tokens=read.tokens, filename_prefix="character")
    loaded = graph.add("EasyRefLoadTokens", file="character_00001_.safetensors [output]")
    applied = graph.add("EasyRefApply", model=models.model, easyref=models.easyref, tokens=loaded)
    sampling = add_sampling(
        graph, models, applied, read.texts.positive, read.texts.negative, "5. Sampling and result"
    )
    reading = Box("3. Once: read and save", [[read.gallery], [read.tokens, saved]])
    using = Box("4. From then on: load", [[loaded, applied]], own=True)
    text = note(
        "EasyRef: save tokens once, use them again",
        models,
        [
            drop_pictures("pictures of one character"),
            "Run. The tokens are saved; **Save Tokens** shows the file. No picture comes yet: "
            "**Load Tokens** is marked, as the file was not there when you started.",
            "Press R, and choose the file in **Load Tokens**. The name that stands there is that "
            "of the very first file.",
            "Mute box 3: right-click on an empty spot of it, **Set Group Nodes to Never**. From "
            "now on the references and the MLLM are not needed, so a run starts sooner and "
            "takes less memory.",
            "Change prompt and seed as you like.",
        ],
        [
            "Tokens remember the prompt they were read with. If the old one shows through, save "
            "them with an empty prompt in **EasyRef Encode**, or lower `weight` to 0.8.",
            TOO_STRONG,
            "Load Tokens refuses a file: it was made by another adapter. The message names it.",
        ],
        [
            "The files lie in `output/easyref_tokens`. Moved to `models/easyref_tokens` they stand "
            "beside your models; about 1 MB each, easy to share."
        ],
    )
    return Template(
        "easyref_tokens",
        graph,
        [models.stage, [read.texts.box, reading], [using], [sampling]],
        text,
    )


def with_lora() -> Template:
    return _single_group(
        "easyref_with_lora",
        "EasyRef beside a LoRA",
        _HIKING,
        [
            "Choose your LoRA in **Load LoRA** and set its two strengths; the example is only a "
            "stand-in.",
            drop_pictures("pictures of one character or style"),
            "Write the LoRA's trigger words, if it has any, into **Prompt**.",
        ],
        [
            "The LoRA's look is lost: lower `weight` in **EasyRef Apply** to 0.7, then "
            "`lora_strength`. EasyRef brings a LoRA of its own, and both add up.",
            "The references are lost: lower `strength_model` of **Load LoRA**.",
            "Burnt colours: lower both, or the CFG.",
        ],
        [
            "**More LoRAs** go one behind the other between **Load SDXL** and **EasyRef Demo "
            "Models**. The demo models have no LoRA: muting box 1 leaves it out.",
            "**Beside IPAdapter**: put its Apply node before or behind **EasyRef Apply**, in the "
            "line of the model. Both add to the same layers, so start with 0.5 to 0.7 for each, "
            "for instance IPAdapter for the face and EasyRef for what a whole group of pictures "
            "shares.",
        ],
        lora=True,
    )


def subgraph() -> Template:
    return _single_group(
        "easyref_subgraph",
        "EasyRef as one node",
        _HIKING,
        [
            drop_pictures("pictures of one character"),
            "Say in **Prompt** what the character does and where. Both SDXL and EasyRef read it.",
        ],
        [
            "Too much like the references, or the prompt is lost: lower `weight` in **EasyRef** to "
            "0.6, or raise `start_percent` to 0.2.",
            "Too little like them: more references of the same character, or `weight` 1.2.",
        ],
        [
            "**The node EasyRef in box 4** is a subgraph: **EasyRef Encode** and **EasyRef Apply** "
            "in one. Double-click it to see and change what is inside, or copy it into your own "
            "graphs. ComfyUI also lists the blueprint **EasyRef** among the nodes to add; "
            "it holds **EasyRef Loader**, too.",
        ],
        inside=_encode_and_apply,
    )


def _encode_and_apply(encoded: Node, applied: Node) -> Subgraph:
    return Subgraph(
        "EasyRef",
        [encoded, applied],
        {
            "model": [(applied, "model")],
            "easyref": [(encoded, "easyref"), (applied, "easyref")],
            "references": [(encoded, "references")],
            "images": [(encoded, "images")],
            "prompt": [(encoded, "prompt")],
            "weight": [(applied, "weight")],
            "start_percent": [(applied, "start_percent")],
        },
        {"model": applied.out()},
    )
