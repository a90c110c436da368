"""Parts that the templates share: loaders with the switch, references, texts, sampling, notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .workflow_editor import Box
from .workflow_graph import Graph, ModelFile, Node, Output

SDXL_PAGE = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"
SDXL = ModelFile("sd_xl_base_1.0.safetensors", "checkpoints", SDXL_PAGE, "any SDXL model will do")
ADAPTER = ModelFile(
    "model.safetensors",
    "easyref",
    "https://huggingface.co/zongzhuofan/EasyRef",
    "choose it in **EasyRef Loader**",
)
CONTROLNET = ModelFile(
    "diffusers_xl_canny_full.safetensors",
    "controlnet",
    "https://huggingface.co/lllyasviel/sd_control_collection",
    "or another edge ControlNet for SDXL",
)
LORA = ModelFile(
    "sd_xl_offset_example-lora_1.0.safetensors",
    "loras",
    SDXL_PAGE,
    "or any LoRA for SDXL",
)

MODELS_BOX = "1. Models"
NEGATIVE = "A collage of images, monochrome, lowres, bad anatomy, worst quality, low quality"
_GALLERY = "Drop reference pictures here"
_OTHER_WAYS = (
    "They may have any sizes; more than two work best. Pictures of other nodes, such as **Load "
    "Image**, can be connected to it: after each of them a free input stands ready."
)
# A picture that comes with every ComfyUI, for nodes that cannot do without one.
EXAMPLE = "example.png"


@dataclass
class Models:
    """All models of a graph, behind the switch.

    Attributes:
        switch: EasyRef Demo Models; its outputs are model, clip, vae, easyref and control_net.
        size: the empty latent, which is not muted with the loaders.
        fitted: EasyRef Demo Latent behind it.
        loaders: what stands before the switch.
    """

    switch: Node
    size: Node
    fitted: Node
    loaders: list[Node] = field(default_factory=list)

    @property
    def model(self) -> Output:
        return self.switch.out(0)

    @property
    def clip(self) -> Output:
        return self.switch.out(1)

    @property
    def vae(self) -> Output:
        return self.switch.out(2)

    @property
    def easyref(self) -> Output:
        return self.switch.out(3)

    @property
    def control_net(self) -> Output:
        return self.switch.out(4)

    @property
    def stage(self) -> list[Box]:
        """Muting the first box leaves the second with nothing connected."""
        return [
            Box(MODELS_BOX, [self.loaders]),
            Box("Demo models, if 1 is muted", [[self.switch, self.fitted]], own=True),
        ]


def add_models(graph: Graph, *, lora: bool = False, control_net: bool = False) -> Models:
    """Loaders of SDXL and EasyRef, if asked for a LoRA and a ControlNet, and the switch."""
    checkpoint = graph.add(
        "CheckpointLoaderSimple", "Load SDXL", models=(SDXL,), ckpt_name=SDXL.name
    )
    loader = graph.add("EasyRefLoader", models=(ADAPTER,), adapter=ADAPTER.name)
    loaders = [checkpoint, loader]
    model, clip = checkpoint.out(0), checkpoint.out(1)
    if lora:
        changed = graph.add(
            "LoraLoader", "Load LoRA", models=(LORA,), model=model, clip=clip, lora_name=LORA.name
        )
        model, clip = changed.out(0), changed.out(1)
        loaders.insert(1, changed)
    others: dict[str, Node] = {}
    if control_net:
        others["control_net"] = graph.add(
            "ControlNetLoader", "ControlNet", models=(CONTROLNET,), control_net_name=CONTROLNET.name
        )
        loaders.append(others["control_net"])
    size = graph.add("EmptyLatentImage", "Picture size", width=1024, height=1024)
    switch = graph.add(
        "EasyRefDemoModels",
        model=model,
        clip=clip,
        vae=checkpoint.out(2),
        easyref=loader,
        **others,
    )
    fitted = graph.add("EasyRefDemoLatent", latent=size, easyref=switch.out(3))
    return Models(switch, size, fitted, loaders)


@dataclass(frozen=True)
class Texts:
    """The prompt and what SDXL's text encoders make of it and of the negative one."""

    prompt: Node
    size: Node
    positive: Node
    negative: Node

    @property
    def box(self) -> Box:
        columns = [[self.prompt, self.size], [self.positive, self.negative]]
        return Box("2. What to draw", columns)


def add_texts(graph: Graph, models: Models, prompt: str) -> Texts:
    text = graph.add("PrimitiveStringMultiline", "Prompt", value=prompt)
    return Texts(
        text,
        models.size,
        graph.add("CLIPTextEncode", "Positive prompt", clip=models.clip, text=text),
        graph.add("CLIPTextEncode", "Negative prompt", clip=models.clip, text=NEGATIVE),
    )


@dataclass(frozen=True)
class Reading:
    """Texts, reference pictures, and the tokens made of them.

    Attributes:
        gallery: EasyRef References, still without a picture.
        tokens: EasyRef Encode.
    """

    texts: Texts
    gallery: Node
    tokens: Node

    @property
    def references(self) -> Box:
        return Box("3. Reference pictures: any number, any sizes", [[self.gallery]])


def add_gallery(graph: Graph) -> Node:
    """A place for reference pictures; it starts empty, as nobody has the same ones."""
    return graph.add("EasyRefReferences", _GALLERY)


def add_reading(graph: Graph, models: Models, prompt: str) -> Reading:
    gallery = add_gallery(graph)
    texts = add_texts(graph, models, prompt)
    tokens = graph.add(
        "EasyRefEncode", easyref=models.easyref, references=gallery, prompt=texts.prompt
    )
    return Reading(texts, gallery, tokens)


def add_sampling(
    graph: Graph,
    models: Models,
    model: Node,
    positive: Output | Node,
    negative: Output | Node,
    title: str,
) -> Box:
    """From the steered model to the saved picture, with the official settings."""
    sampler = graph.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=models.fitted,
        seed=1,
        steps=30,
        cfg=7.5,
        sampler_name="ddim",
        scheduler="normal",
    )
    decoded = graph.add("VAEDecode", samples=sampler, vae=models.vae)
    saved = graph.add("SaveImage", images=decoded, filename_prefix="EasyRef")
    return Box(title, [[sampler, decoded], [saved]])


def note(
    title: str,
    models: Models,
    steps: Sequence[str],
    hints: Sequence[str],
    remarks: Sequence[str] = (),
) -> str:
    """The template's instructions, in Markdown.

    Args:
        hints: what to change if the result is off.
        remarks: paragraphs for the end.
    """
    files = [file for node in models.loaders for file in node.models]
    parts = [
        f"# {title}",
        "**Models**\n" + "\n".join(_file_line(file) for file in files),
        "**Steps**\n" + "\n".join(f"{n}. {step}" for n, step in enumerate(steps, 1)),
        "**If the result is off**\n" + "\n".join(f"- {hint}" for hint in hints),
        *remarks,
        "**No models at hand?** Right-click on an empty spot of the box **1. Models** and choose "
        "**Set Group Nodes to Never**. The graph then runs on the demo models: small models of "
        "drawings, which make pictures of 128 x 128 pixels whatever **Picture size** says and know "
        "prompts such as `in the snow at night` for characters and `a star shape` for styles. "
        "Pictures of both lie in the pack's folder `demo/references`. **Set Group Nodes to "
        "Always** brings your models back.",
    ]
    return "\n\n".join(parts) + "\n"


def _file_line(file: ModelFile) -> str:
    remark = f"; {file.remark}" if file.remark else ""
    return (
        f"- [{file.name}]({file.url}) in `models/{file.folder}`, from [its page]({file.page})"
        f"{remark}"
    )


def drop_pictures(what: str) -> str:
    """The first step of templates with a gallery."""
    return f"Drop {what} onto the node **{_GALLERY}**. {_OTHER_WAYS}"


TOO_STRONG = (
    "Too much like the references, or the prompt is lost: lower `weight` in **EasyRef Apply** to "
    "0.6, or raise `start_percent` to 0.2."
)
