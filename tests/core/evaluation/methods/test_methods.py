"""Each method's pictures against a direct computation with diffusers, and the pipeline afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref_core.evaluation.methods import METHODS, Generated, Method
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.settings import GenerationSettings
from easyref_core.evaluation.trials import Trial

MakeTrial = Callable[..., Trial]


def images(results: list[Generated]) -> list[Image.Image]:
    assert [result.error for result in results] == [""] * len(results)
    assert all(result.image is not None for result in results)
    return [result.image for result in results if result.image is not None]


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


@pytest.fixture(scope="session")
def methods(settings: GenerationSettings, make_trial: MakeTrial) -> dict[str, Method]:
    return load_methods(settings, [make_trial(n, group) for n in METHODS for group in (0, 1)])


@pytest.fixture(scope="module")
def plain(methods: dict[str, Method], make_trial: MakeTrial, tmp_path_factory: Any) -> Image.Image:
    return images(methods["none"].generate([make_trial("none")], tmp_path_factory.mktemp("w")))[0]


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
    pipe = methods["none"]._base.pipe
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
        {n: [k for k, _ in m.state_dict().items()] for n, m in parts.items()},
        {n: sorted({str(type(k)) for k in m.modules()}) for n, m in parts.items()},
        {n: (m.training, {p.requires_grad for p in m.parameters()}) for n, m in parts.items()},
        {n: type(p) for n, p in pipe.unet.attn_processors.items()},
        {k: v for k, v in pipe.unet.config.items() if k != "_use_default_values"},
        dict(pipe.config),
        pipe.image_encoder,
        pipe.feature_extractor,
        sorted(vars(pipe)),
        getattr(pipe.unet, "peft_config", None),
        pipe.unet.encoder_hid_proj,
        pipe.unet.is_gradient_checkpointing,
    )
