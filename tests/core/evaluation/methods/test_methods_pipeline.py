"""The SDXL that all methods share: which files it takes, what it samples, what fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import refused
from PIL import Image
from safetensors.torch import load_file, save_file
from single_file_sdxl import write_single_file

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.methods import sampling
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.plain import PlainMethod
from easyref_core.evaluation.methods.settings import NEGATIVE, GenerationSettings
from easyref_core.evaluation.methods.single_file import check_single_file
from easyref_core.evaluation.trials import Trial

MakeTrial = Callable[..., Trial]


def generate(base: GenerationPipeline, *trials: Trial) -> list[Image.Image]:
    results = PlainMethod(base).generate(trials, Path())
    assert [result.error for result in results] == [""] * len(results)
    return [result.image for result in results if result.image is not None]


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers directory with a VAE of the kind that SDXL has."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    folder = tmp_path_factory.mktemp("whole") / "sdxl"
    torch.manual_seed(0)
    blocks = 4
    vae = AutoencoderKL(
        block_out_channels=(32,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        scaling_factor=0.13025,
    )
    base = GenerationPipeline(GenerationSettings(tiny.base))
    pipe = StableDiffusionXLPipeline(**{**base.pipe.components, "vae": vae}, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    pipe.save_pretrained(folder)
    return folder


def test_a_picture_is_that_of_diffusers_with_ddim(folder: Path, make_trial: MakeTrial) -> None:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    trial = make_trial("none", steps=3, guidance=5.0)
    (image,) = generate(GenerationPipeline(GenerationSettings(folder, size=64)), trial)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipe.scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    wanted = pipe(
        trial.prompt,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(trial.seed),
    ).images[0]
    assert image.tobytes() == wanted.tobytes()


def test_one_file_gives_the_picture_of_the_directory(
    folder: Path, make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_single_file(tmp_path / "sdxl.safetensors", folder)
    config = tmp_path / "config"
    shutil.copytree(
        folder, config, ignore=lambda _, names: [n for n in names if n.endswith(".safetensors")]
    )
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    trial = make_trial("none")
    (wanted,) = generate(GenerationPipeline(GenerationSettings(folder, size=64)), trial)
    single = GenerationPipeline(GenerationSettings(file, config, size=64))
    assert generate(single, trial)[0].tobytes() == wanted.tobytes()
    assert json.loads(json.dumps(single.identity))["base"]["single_file"]["bytes"] > 1000


def test_one_file_without_configurations_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_single_file(tmp_path / "sdxl.safetensors", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with refused("holds no configurations and tokenizers", "stable-diffusion-xl-base-1.0"):
        GenerationPipeline(GenerationSettings(file))
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").unlink()
    with refused(other, "lacks model_index.json"):
        GenerationPipeline(GenerationSettings(file, other))


def test_a_file_that_does_not_fit_the_configurations_is_refused(
    folder: Path, tmp_path: Path, make_trial: MakeTrial
) -> None:
    file = write_single_file(tmp_path / "sdxl.safetensors", folder)
    weights = load_file(file)
    for name in (
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.ln_final.weight",
    ):
        save_file({n: w for n, w in weights.items() if n != name}, file, {"format": "pt"})
        with refused(file, "does not fit the configurations in", folder):
            generate(GenerationPipeline(GenerationSettings(file, folder)), make_trial("none"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cond_stage_model.x", "model.diffusion_model.x"], "Stable Diffusion 1 or 2"),
        (["conditioner.embedders.0.model.x", "model.diffusion_model.x"], "an SDXL refiner"),
        (["ip_adapter.1.to_k_ip.weight", "image_proj.x"], "an IP-Adapter"),
        (["model.diffusion_model.x"], "lacks VAE, text encoder CLIP L, text encoder CLIP G"),
    ],
)
def test_other_files_are_refused_by_what_they_are(
    names: list[str], said: str, tmp_path: Path, folder: Path
) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2) for name in names}, file)
    with refused(file, said):
        GenerationPipeline(GenerationSettings(file, folder))


def test_an_index_of_shards_is_no_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "0.safetensors")
    index = tmp_path / "sdxl.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "0.safetensors"}}))
    with refused(index, "is an index of shards"):
        check_single_file(index)


def test_no_file_and_other_directories_are_refused(tiny: Any, tmp_path: Path) -> None:
    with refused("There is no weight file", "nowhere"):
        GenerationPipeline(GenerationSettings(tmp_path / "nowhere"))
    older = shutil.copytree(tiny.base, tmp_path / "sd15")
    shutil.rmtree(older / "text_encoder_2")
    shutil.rmtree(older / "tokenizer_2")
    with refused("base:", older, "lacks text_encoder_2, tokenizer_2"):
        GenerationPipeline(GenerationSettings(older))


def test_weights_are_read_when_an_image_is_made(
    tiny: Any, tmp_path: Path, make_trial: MakeTrial
) -> None:
    damaged = shutil.copytree(tiny.base, tmp_path / "damaged")
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if n != "conv_out.bias"}, file)
    base = GenerationPipeline(GenerationSettings(damaged, size=64))
    with refused(damaged, "conv_out.bias"):
        PlainMethod(base).generate([make_trial("none")], tmp_path)


def test_half_precision_files_alone_are_loaded(
    tiny: Any, tmp_path: Path, make_trial: MakeTrial, base: GenerationPipeline
) -> None:
    half = shutil.copytree(tiny.base, tmp_path / "half")
    for path in half.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    (image,) = generate(GenerationPipeline(GenerationSettings(half, size=64)), make_trial("none"))
    assert image.tobytes() == generate(base, make_trial("none"))[0].tobytes()


def test_an_images_noise_depends_on_its_own_seed_alone(
    base: GenerationPipeline, make_trial: MakeTrial
) -> None:
    trials = [make_trial("none", group, seed=seed) for group, seed in ((0, 1), (1, 2), (0, 3))]
    together = generate(base, *trials)
    assert difference(together[0], together[2]) > 20
    for trial, image in zip(trials, together, strict=True):
        assert difference(generate(base, trial)[0], image) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_give_nearly_the_picture_of_thirty_two(
    dtype: str, settings: GenerationSettings, base: GenerationPipeline, make_trial: MakeTrial
) -> None:
    half, trial = GenerationPipeline(replace(settings, dtype=dtype)), make_trial("none", guidance=1)
    (image,) = generate(half, trial)
    assert half.pipe.unet.dtype == getattr(torch, dtype)
    assert half.pipe.vae.dtype == torch.float32
    assert 0 < difference(image, generate(base, trial)[0]) < 12


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sampling more than this many images fails."""
    sample = sampling._latents

    def set_limit(most: int) -> None:
        def limited(base: Any, trials: Sequence[Trial], *others: Any) -> torch.Tensor:
            if len(trials) > most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return sample(base, trials, *others)

        monkeypatch.setattr(sampling, "_latents", limited)

    return set_limit


def test_a_batch_that_does_not_fit_is_sampled_image_by_image(
    base: GenerationPipeline, make_trial: MakeTrial, out_of_memory: Callable[[int], None]
) -> None:
    trials = [make_trial("none", seed=seed) for seed in (1, 2)]
    wanted = [generate(base, trial)[0].tobytes() for trial in trials]
    out_of_memory(1)
    assert [image.tobytes() for image in generate(base, *trials)] == wanted


def test_an_image_that_does_not_fit_is_marked(
    base: GenerationPipeline, make_trial: MakeTrial, out_of_memory: Callable[[int], None]
) -> None:
    out_of_memory(0)
    results = PlainMethod(base).generate([make_trial("none"), make_trial("none", seed=2)], Path())
    assert [result.image for result in results] == [None, None]
    assert all("has not enough memory to sample the image" in r.error for r in results)


@pytest.mark.parametrize("what", ["latents", "pixels"])
def test_values_that_are_not_numbers_mark_their_image_alone(
    what: str, base: GenerationPipeline, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, decode, decoded = sampling._latents, base.pipe.vae.decode, []

    def damaged(*arguments: Any) -> torch.Tensor:
        latents = sample(*arguments)
        latents[1, 0, 0, 0] = float("nan")
        return latents

    def black(*arguments: Any, **options: Any) -> Any:
        decoded.append(1)
        (pixels,) = decode(*arguments, **options)
        return (pixels * (float("inf") if len(decoded) == 2 else 1),)

    if what == "latents":
        monkeypatch.setattr(sampling, "_latents", damaged)
    else:
        monkeypatch.setattr(base.pipe.vae, "decode", black)
    trials = [make_trial("none", seed=seed) for seed in (1, 2, 3)]
    results = PlainMethod(base).generate(trials, Path())
    assert [result.image is None for result in results] == [False, True, False]
    assert f"The image's {what} hold values that are not numbers" in results[1].error


def test_other_errors_are_not_hidden(
    base: GenerationPipeline, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("a mistake in the code")

    monkeypatch.setattr(sampling, "_latents", broken)
    with pytest.raises(ValueError, match="a mistake"):
        PlainMethod(base).generate([make_trial("none")], Path())


def test_a_lack_of_memory_for_the_model_itself_is_said(
    tiny: Any, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr("easyref_core.evaluation.methods.pipeline.load_base", full)
    with pytest.raises(EasyRefError, match=r"not enough memory for \S+base"):
        PlainMethod(GenerationPipeline(GenerationSettings(tiny.base))).generate(
            [make_trial("none")], Path()
        )


def test_the_identity_tells_models_and_settings_apart(
    tiny: Any, settings: GenerationSettings, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny.base, tmp_path / "moved")
    identity = GenerationPipeline(settings).identity
    assert json.loads(json.dumps(identity)) == identity
    assert GenerationPipeline(replace(settings, base=moved)).identity == identity
    for change in ({"negative": ""}, {"size": 128}, {"dtype": "bfloat16"}):
        assert GenerationPipeline(replace(settings, **change)).identity != identity
    file = moved / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += 1
    save_file(weights, file)
    assert GenerationPipeline(replace(settings, base=moved)).identity != identity
