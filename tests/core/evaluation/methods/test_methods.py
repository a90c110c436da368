"""Each method's pictures against a direct computation; the pipeline afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_methods import images, load
from PIL import Image

from easyref_core import (
    PromptTokenizer,
    Reference,
    append_tokens,
    attach_adapter,
    encode_references,
    load_checkpoint,
    open_picture,
    plan_encoder,
    plan_group,
)
from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.methods import METHODS, Method
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import NEGATIVE, GenerationSettings
from easyref_core.evaluation.trials import Trial
from easyref_core.training.records import PictureSource

MakeTrial = Callable[..., Trial]
ENCODED = ("easyref", "average", "concatenate")


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


@pytest.fixture(scope="module")
def methods(settings: GenerationSettings, make_trial: MakeTrial) -> dict[str, Method]:
    return load_methods(settings, [make_trial(n, group) for n in METHODS for group in (0, 1, 2)])


@pytest.fixture(scope="module")
def plain(methods: dict[str, Method], make_trial: MakeTrial) -> Image.Image:
    return images(methods["none"].generate([make_trial("none")], Path()))[0]


@pytest.fixture
def own(settings: GenerationSettings) -> Any:
    """A pipeline as diffusers loads it, for direct computations."""
    return GenerationPipeline(settings).pipe


def options(trial: Trial) -> dict[str, Any]:
    return {
        "height": 64,
        "width": 64,
        "num_inference_steps": trial.variant.steps,
        "guidance_scale": trial.variant.guidance,
        "generator": torch.Generator().manual_seed(trial.seed),
    }


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_picture_of_its_own_and_leaves_the_pipeline_as_it_was(
    name: str,
    methods: dict[str, Method],
    plain: Image.Image,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    method, trial = methods[name], make_trial(name)
    assert method.name == name
    assert json.loads(json.dumps(method.identity())) == method.identity()
    pipe = methods["none"]._base.pipe  # type: ignore[attr-defined]
    before = state(pipe)
    (result,) = method.generate([trial], tmp_path)
    (image,) = images([result])
    assert image.size == (64, 64)
    assert result.seconds["sample"] > 0
    assert same(image, plain) == (name == "none")
    method.close()
    method.close()
    assert state(pipe) == before
    assert same(images(methods["none"].generate([make_trial("none")], tmp_path))[0], plain)
    # Once more, from what the run's folder keeps.
    assert same(images(method.generate([trial], tmp_path))[0], image)
    method.close()


def state(pipe: Any) -> Any:
    """All that a method could leave behind."""
    parts = {n: getattr(pipe, n) for n in ("unet", "vae", "text_encoder", "text_encoder_2")}
    return (
        {n: list(m.state_dict()) for n, m in parts.items()},
        {n: sorted({str(type(k)) for k in m.modules()}) for n, m in parts.items()},
        {n: (m.training, {p.requires_grad for p in m.parameters()}) for n, m in parts.items()},
        {n: type(p) for n, p in pipe.unet.attn_processors.items()},
        {k: v for k, v in pipe.unet.config.items() if k != "_use_default_values"},
        dict(pipe.config),
        sorted(vars(pipe)),
        getattr(pipe.unet, "peft_config", None),
        pipe.unet.encoder_hid_proj,
        pipe.unet.is_gradient_checkpointing,
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_gives_each_group_its_own_picture(
    name: str, methods: dict[str, Method], make_trial: MakeTrial, tmp_path: Path
) -> None:
    """Groups of different sizes, whose concatenated tokens differ in number."""
    trials = [
        make_trial(name, group, seed=3, count=count) for group, count in ((0, 2), (1, 1), (2, 2))
    ]
    together = images(methods[name].generate(trials, tmp_path))
    for trial, image in zip(trials, together, strict=True):
        assert difference(images(methods[name].generate([trial], tmp_path))[0], image) <= 2
    methods[name].close()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_an_unreadable_reference_marks_its_trial_alone(
    name: str, settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    good, bad = make_trial(name), make_trial(name, 1)
    bad = replace(bad, references=(GroupPicture(PictureSource(broken)),))
    empty = replace(make_trial(name, 2), references=())
    method = load(settings, good, bad, empty)
    results = method.generate([bad, good, empty], tmp_path)
    method.close()
    marked = [result.image is None for result in results]
    if name.endswith("-other"):  # the group before fails
        assert marked == [False, True, False] or marked.count(True) == 2
        results = [results[1], results[0], results[0]]
    else:
        assert marked == [True, False, True]
        assert "There is no reference picture" in results[2].error
    assert "broken.png" in results[0].error


def test_easyref_is_what_the_readme_computes(
    tiny: Any, own: Any, methods: dict[str, Method], make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("easyref", weight=0.7, insert_before=2)
    image = images(methods["easyref"].generate([trial], tmp_path))[0]
    methods["easyref"].close()
    checkpoint = load_checkpoint(tiny.adapter)
    names = [str(reference.source.path) for reference in trial.references]
    encoder_plan = plan_encoder(checkpoint, tiny.mllm)
    plan = plan_group(
        encoder_plan,
        PromptTokenizer.from_directory(tiny.mllm),
        [Reference(open_picture(name), name=name) for name in names],
        trial.prompt,
        image_size=trial.variant.image_size,
        insert_before=2,
    )
    tokens = encode_references(encoder_plan.build(), plan)
    with torch.no_grad():
        text, negative, pooled, negative_pooled = own.encode_prompt(
            trial.prompt, negative_prompt=NEGATIVE
        )
    attach_adapter(own.unet, checkpoint, scale=0.7)
    text, negative = append_tokens(own.unet, tokens, text, negative)
    wanted = own(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        **options(trial),
    ).images[0]
    assert same(image, wanted)


@pytest.mark.parametrize("layout", ["ip_adapter", "ip_adapter_plus"])
def test_an_ip_adapter_of_one_reference_is_what_diffusers_computes(
    layout: str,
    tiny: Any,
    settings: GenerationSettings,
    own: Any,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    trial = make_trial("ip-adapter", count=1, weight=0.8)
    path = getattr(tiny, layout)
    method = load(replace(settings, ip_adapter=path), trial)
    image = images(method.generate([trial], tmp_path))[0]
    own.load_ip_adapter(
        str(path.parent),
        subfolder="",
        weight_name=path.name,
        image_encoder_folder=tiny.image_encoder.name,
        local_files_only=True,
    )
    own.set_ip_adapter_scale(0.8)
    wanted = own(
        trial.prompt,
        negative_prompt=NEGATIVE,
        ip_adapter_image=trial.references[0].source.open(),
        **options(trial),
    ).images[0]
    assert same(image, wanted)


def test_several_references_are_the_average_of_their_embeddings(
    tiny: Any,
    own: Any,
    methods: dict[str, Method],
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    trial = make_trial("ip-adapter", count=3)
    image = images(methods["ip-adapter"].generate([trial], tmp_path))[0]
    one = images(methods["ip-adapter"].generate([make_trial("ip-adapter", count=1)], tmp_path))[0]
    assert not same(image, one)
    methods["ip-adapter"].close()
    own.load_ip_adapter(
        str(tiny.ip_adapter.parent),
        subfolder="",
        weight_name=tiny.ip_adapter.name,
        image_encoder_folder=tiny.image_encoder.name,
        local_files_only=True,
    )
    with torch.no_grad():
        pictures = [reference.source.open() for reference in trial.references]
        embeds = [own.encode_image(picture, "cpu", 1)[0] for picture in pictures]
    mean = torch.stack(embeds).mean(0)
    rows = torch.cat((torch.zeros_like(mean), mean))[:, None]
    wanted = own(
        trial.prompt, negative_prompt=NEGATIVE, ip_adapter_image_embeds=[rows], **options(trial)
    ).images[0]
    assert same(image, wanted)


def test_without_guidance_an_ip_adapter_acts_too(
    own: Any, tiny: Any, methods: dict[str, Method], make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("ip-adapter", count=1, guidance=1.0)
    image = images(methods["ip-adapter"].generate([trial], tmp_path))[0]
    methods["ip-adapter"].close()
    own.load_ip_adapter(
        str(tiny.ip_adapter.parent),
        subfolder="",
        weight_name=tiny.ip_adapter.name,
        image_encoder_folder=tiny.image_encoder.name,
        local_files_only=True,
    )
    picture = trial.references[0].source.open()
    wanted = own(trial.prompt, ip_adapter_image=picture, **options(trial)).images[0]
    assert same(image, wanted)


@pytest.mark.parametrize("name", ["ip-adapter", "lora"])
def test_a_weight_of_zero_is_the_plain_model(
    name: str,
    methods: dict[str, Method],
    plain: Image.Image,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    image = images(methods[name].generate([make_trial(name, weight=0.0)], tmp_path))[0]
    methods[name].close()
    assert difference(image, plain) <= 1


def test_easyrefs_own_lora_stays_on_at_a_weight_of_zero(
    tiny: Any,
    own: Any,
    methods: dict[str, Method],
    plain: Image.Image,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    from easyref_core import set_tokens

    trial = make_trial("easyref", weight=0.0)
    image = images(methods["easyref"].generate([trial], tmp_path))[0]
    methods["easyref"].close()
    assert difference(image, plain) > 5
    attach_adapter(own.unet, load_checkpoint(tiny.adapter))
    set_tokens(own.unet, None)
    wanted = own(trial.prompt, negative_prompt=NEGATIVE, **options(trial)).images[0]
    assert difference(image, wanted) <= 1


@pytest.mark.parametrize("name", ["easyref", "ip-adapter", "lora"])
def test_every_method_works_in_sixteen_bits(
    name: str, settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    for dtype in ("bfloat16", "float16"):
        trial = make_trial(name)
        method = load(replace(settings, dtype=dtype), trial)
        images(method.generate([trial], tmp_path))
        method.close()
