"""The command `train`: all demo models from scratch, part by part; finished parts are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from easyref_core.demo_set import SET_FILE
from easyref_core.errors import EasyRefError
from easyref_core.files import check_apart, check_place, writing
from easyref_core.training.config import make_settings
from easyref_core.training.processes import world_size
from easyref_core.training.recipe import read_recipe

from .pretraining.recipe import Pretraining, load_pretraining
from .pretraining.steps import leave_processes

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "demo"
WORK = "runs/demo"  # in the recipes

# Rounds of sequences of parts. On a CPU a round's only sequence is trained by two processes
# together; two sequences, which are independent and take about equally long, get one process each.
# The samples of a part depend on that.
_ROUNDS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("vae", "base", "mllm"),),
    (("controlnet", "judge"), ("decoder",)),
    (("1_alignment", "2_single_reference", "3_multi_reference"),),
)
PARTS = ("data", *(part for sequences in _ROUNDS for parts in sequences for part in parts))
PRETRAINED = tuple(part for part in PARTS if part != "data" and not part[0].isdigit())
# Trained only when named: baselines, and layer pooling and identity on the last stage's adapter.
OPTIONAL = (
    *("3_averaged", "3_from_scratch"),
    *("4_layer_pooling", "4_lap", "4_last"),
    *("5_identity", "5_single_stage"),
)
# Those of them whose weights a set's adapter gets beside the last stage's.
_ADDED = ("4_layer_pooling", "4_lap", "5_identity")

# Otherwise glibc returns large blocks to the system, which clears them again in each step.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def train_demo(work: Path, device: torch.device, recipes: Path = RECIPES) -> Path:
    """Train all parts that are not finished; returns the last stage's adapter.

    On a CPU with several cores two processes train: one part together, or independent parts. That
    is faster than two threads.

    Raises:
        EasyRefError: a recipe that cannot be used, or a part that failed.
    """
    train_part("data", work, device, recipes)
    for sequences in _ROUNDS:
        if device.type == "cpu" and (os.cpu_count() or 1) > 1:
            _in_two_processes(sequences, work, recipes)
        else:
            for part in (part for parts in sequences for part in parts):
                train_part(part, work, device, recipes)
    return adapter_of(work, "3_multi_reference")


def adapter_of(work: Path, stage: str) -> Path:
    """The EMA weights of a finished stage."""
    return work / stage / "easyref_ema.safetensors"


def write_set(work: Path, to: Path) -> tuple[int, tuple[str, ...]]:
    """Write the model set; before the last stage is finished, the pretrained parts that are.

    Its adapter also has the layer pooling and the identity LoRA that are trained on that stage's.

    Returns:
        Bytes of all safetensors files; the parts written, empty if the set is whole.

    Raises:
        EasyRefError: a part is missing, none is finished, one was trained on another adapter, or
            it cannot be written there.
    """
    from easyref_core.training.merge import merge_adapters

    from .pretraining.assemble import assemble_parts, assemble_set

    adapter = adapter_of(work, "3_multi_reference")
    with writing(to):
        if adapter.exists():
            added = [adapter_of(work, part) for part in _ADDED if is_done(work, part)]
            if added:
                merged = work / "merged" / "easyref.safetensors"
                adapter = merge_adapters(adapter, added, merged, overwrite=True)
            return assemble_set(work, adapter, to), ()
        parts = tuple(part for part in PRETRAINED if is_done(work, part))
        return assemble_parts(work, parts, to), parts


def check_set_folder(to: Path, inputs: Iterable[Path | None] = (), overwrite: bool = False) -> None:
    """Check where a model set is to be written, before anything is trained for it.

    Args:
        inputs: files and folders that are read.
        overwrite: whether a set that is there may be replaced.

    Raises:
        EasyRefError: the folder holds something else, or a set without `overwrite`; it is an
            input; it cannot be written to.
    """
    from .pretraining.assemble import PARTS_FILE

    check_place(to / SET_FILE)
    check_apart(to / SET_FILE, [source for source in inputs if source is not None])
    if not to.exists() or not any(to.iterdir()):
        return
    if not any((to / name).is_file() for name in (SET_FILE, PARTS_FILE)):
        raise EasyRefError(f"{to} holds no model set, but other files. Choose another folder.")
    if not overwrite:
        raise EasyRefError(
            f"{to} holds a model set. Choose another folder, or add --overwrite to replace it."
        )


def train_part(part: str, work: Path, device: torch.device, recipes: Path = RECIPES) -> None:
    """Train one part unless it is finished; the parts that it needs must be.

    Raises:
        EasyRefError: an unknown part, or one that it needs is missing.
    """
    work = work.resolve()  # however it is spelt, an interrupted part continues
    from easyref_core.training.checkpoints import OtherSettings

    recipe = _split_batches(load_pretraining(recipes / "pretraining.yaml"))
    trainers: Mapping[str, Callable[[Pretraining, Path, torch.device], object]] = {
        "data": _data,
        "vae": _vae,
        "mllm": _mllm,
        "base": _base,
        "controlnet": _controlnet,
        "judge": _judge,
        "decoder": _decoder,
    }
    stages = [stage for stage in (*PARTS, *OPTIONAL) if stage not in trainers]
    if part not in trainers and part not in stages:
        raise EasyRefError(
            f"There is no part {part!r}. Choose one of {', '.join((*PARTS, *OPTIONAL))}."
        )
    if is_done(work, part):
        return
    print(f"training {part}", file=sys.stderr, flush=True)
    try:
        if part in trainers:
            trainers[part](recipe, work, device)
            leave_processes()
        else:
            _stage(part, work, recipes, device)
    except OtherSettings as error:
        raise EasyRefError(
            f"{work / part} was begun with other settings: {'; '.join(error.changed)}. Restore "
            f"them to continue, or delete {work / part} to train this part again from its start."
        ) from error


def _split_batches(recipe: Pretraining) -> Pretraining:
    """Under torchrun every process computes its share of each batch."""
    shares = {
        part: replace(schedule, batch=max(1, schedule.batch // world_size()))
        for part, schedule in recipe.schedules().items()
    }
    return replace(recipe, **shares)


def is_done(work: Path, part: str) -> bool:
    """Whether a part's result exists; results are written atomically."""
    weights = "diffusion_pytorch_model.safetensors"
    results = {
        "data": work / "data" / "facts.json",
        "vae": work / "vae" / "model" / weights,
        "mllm": work / "mllm" / "model" / "model.safetensors",
        "base": work / "base" / "model" / "scheduler",
        "controlnet": work / "controlnet" / "model" / weights,
        "judge": work / "judge" / "judge.safetensors",
        "decoder": work / "decoder" / "model" / weights,
    }
    return results.get(part, adapter_of(work, part)).exists()


def _data(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .dataset.files import write_dataset

    final, unfinished = work / "data", work / "data.unfinished"
    if final.exists():
        raise EasyRefError(
            f"{final} exists, but holds no whole drawn data set. Move it away, or choose another "
            "--folder."
        )
    shutil.rmtree(unfinished, ignore_errors=True)  # an interrupted drawing starts again
    write_dataset(unfinished, recipe.data).rename(final)


def _vae(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .pretraining.pictures import read_outlines, read_pictures
    from .pretraining.vae import train_vae

    data = _needed(work, "data")
    pictures = read_pictures(data)
    given = pictures, read_outlines(data, pictures), recipe.vae, recipe.vae_details_from
    train_vae(*given, work / "vae", device)


def _mllm(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .dataset.splits import identities
    from .pretraining.composed import Composer
    from .pretraining.mllm import train_mllm
    from .pretraining.references import read_groups

    groups, composer = read_groups(_needed(work, "data")), Composer(identities()[0])
    train_mllm(groups, composer, recipe.mllm, work / "mllm", device)


def _base(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .pretraining.base import train_base
    from .pretraining.pictures import read_outlines, read_pictures

    data = _needed(work, "data")
    pictures = read_pictures(data, recipe.base_pictures)
    vae, outlines = _autoencoder(work, device), read_outlines(data, pictures)
    train_base(pictures, outlines, vae, recipe.base, work / "base", device)


def _controlnet(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .pretraining.base import encode_images
    from .pretraining.controlnet import train_controlnet
    from .pretraining.pictures import read_outlines, read_pictures

    data, base = _needed(work, "data"), _needed(work, "base")
    pictures = read_pictures(data, recipe.base_pictures)
    cache = work / "base" / "latents.pt"
    latents = encode_images(_autoencoder(work, device), pictures, device, cache)
    outlines, folder = read_outlines(data, pictures), work / "controlnet"
    train_controlnet(pictures, outlines, latents, base, recipe.controlnet, folder, device)


def _judge(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .evaluation.classifier import train_classifier
    from .pretraining.pictures import read_pictures

    train_classifier(read_pictures(_needed(work, "data")), recipe.judge, work / "judge", device)


def _decoder(recipe: Pretraining, work: Path, device: torch.device) -> None:
    from .pretraining.pictures import read_outlines, read_pictures
    from .pretraining.vae import train_decoder

    data = _needed(work, "data")
    pictures = read_pictures(data)
    vae, outlines = _autoencoder(work, device), read_outlines(data, pictures)
    train_decoder(vae, pictures, outlines, recipe.decoder, work / "decoder", device)


def _autoencoder(work: Path, device: torch.device) -> Any:
    from diffusers import AutoencoderTiny

    whole = {"torch_dtype": torch.float32, "local_files_only": True}
    vae = AutoencoderTiny.from_pretrained(_needed(work, "vae"), **whole)
    return vae.to(device).eval()


def _needed(work: Path, part: str) -> Path:
    if not is_done(work, part):
        raise EasyRefError(f"The part {part} is not trained yet. Train it first.")
    return work / "data" if part == "data" else work / part / "model"


def _stage(part: str, work: Path, recipes: Path, device: torch.device) -> None:
    from easyref_core.training.loop import train

    if device.type == "cuda" and device.index is not None:  # accelerate takes the current one
        torch.cuda.set_device(device)
    settings = make_settings(_relocated(read_recipe(recipes / f"{part}.yaml"), work))
    share = max(1, settings.optimiser.batch_size // world_size())
    optimiser = replace(settings.optimiser, batch_size=share)
    train(replace(settings, optimiser=optimiser), cpu=device.type == "cpu")


def _relocated(content: Any, work: Path) -> Any:
    """A recipe's content with `work` in place of `WORK`."""
    if isinstance(content, dict):
        return {key: _relocated(value, work) for key, value in content.items()}
    if isinstance(content, list):
        return [_relocated(value, work) for value in content]
    if isinstance(content, str) and content.startswith(WORK + "/"):
        return str(work / content[len(WORK) + 1 :])
    return content


def _in_two_processes(sequences: Sequence[Sequence[str]], work: Path, recipes: Path) -> None:
    """Train two sequences side by side, or the parts of one with two processes each."""
    python = [sys.executable, "-m"]
    if len(sequences) == 1:
        python += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        rounds = [[(part,)] for part in sequences[0]]
    else:
        rounds = [list(sequences)]
    command = [*python, "workshop.demo", "train", "--device", "cpu"]
    command += ["--folder", str(work), "--recipes", str(recipes), "--only"]
    threads = max(1, (os.cpu_count() or 1) // 2)
    environment = {**os.environ, **_KEEP_MEMORY}
    environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    for side_by_side in rounds:
        running = [
            subprocess.Popen([*command, *parts], env=environment)
            for parts in side_by_side
            if not all(is_done(work, part) for part in parts)
        ]
        failed = [process for process in running if process.wait() != 0]
        if failed:
            raise EasyRefError("A part failed; its messages are above. Run the command again.")
