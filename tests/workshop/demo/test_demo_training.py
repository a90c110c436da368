"""All demo models from scratch, a few steps each: each part uses the results of those before."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.demo_set import TRAINED_SET, read_stored_weights
from easyref_core.errors import EasyRefError
from easyref_core.training.recipe import differences, read_recipe
from workshop.demo import train as demo_train
from workshop.demo.__main__ import main
from workshop.demo.dataset.splits import identities
from workshop.demo.pretraining.assemble import assemble_set
from workshop.demo.pretraining.base import add_noise, edge_mask, encode_images, noise_loss
from workshop.demo.pretraining.composed import Composer
from workshop.demo.pretraining.pictures import read_pictures, read_pixels
from workshop.demo.pretraining.vae import detail_loss
from workshop.demo.tiny_codecs import VAE_CONFIG
from workshop.demo.train import (
    PARTS,
    RECIPES,
    adapter_of,
    is_done,
    train_demo,
    train_part,
    write_set,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipes with two steps each, on a few small groups."""
    folder = tmp_path_factory.mktemp("recipes")
    for source in (*RECIPES.glob("[1-9]_*.yaml"), RECIPES / "pretraining.yaml"):
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        if source.stem == "pretraining":
            content["data"] |= {"groups": 5, "held_out_groups": 5, "pictures": 5}
            content |= {"base_pictures": 6, "vae_details_from": 1}
            for part in ("vae", "mllm", "base", "controlnet", "judge", "decoder"):
                content[part] |= {"steps": 2, "batch": 4, "warmup": 1, "restarts": []}
        else:
            content["optimiser"] |= {"steps": 2, "batch_size": 2, "warmup_steps": 1}
        (folder / source.name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def work(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for part in PARTS:
        train_part(part, folder, CPU, recipes)
    return folder


def test_every_part_leaves_its_result(work: Path) -> None:
    assert all(is_done(work, part) for part in PARTS)


def test_finished_parts_are_not_trained_again(work: Path, recipes: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo_train, "_stage", lambda *_: pytest.fail("trained again"))
    for part in PARTS:
        train_part(part, work, CPU, recipes)


def test_two_processes_are_started_with_valid_commands_in_a_valid_order(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []

    class Process:
        """What would run in another one, run here."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert env["OMP_WAIT_POLICY"] == "PASSIVE"
            assert env["MALLOC_MMAP_MAX_"] == "0"
            launched = "torch.distributed.run" in command
            processes = int(command[command.index("--nproc-per-node") + 1]) if launched else 1
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            self._status = main(command[command.index("workshop.demo") + 1 :])
            monkeypatch.delenv("WORLD_SIZE")

        def wait(self) -> int:
            return self._status

    def note(part: str, *_: object) -> None:
        trained.append((part, int(os.environ.get("WORLD_SIZE", "1"))))

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(demo_train, "train_part", note)
    train_demo(tmp_path, CPU, recipes)
    assert sorted(part for part, _ in trained) == sorted(PARTS)
    alone = {part for part, processes in trained if processes == 1}
    assert alone == {"data", "controlnet", "judge", "decoder"}
    order = [part for part, _ in trained]
    for before, after in (("vae", "base"), ("base", "controlnet"), ("vae", "decoder")):
        assert order.index(before) < order.index(after)
    assert order[-3:] == ["1_alignment", "2_single_reference", "3_multi_reference"]


def test_layer_pooling_and_identity_are_trained_on_the_last_stage_when_named(
    work: Path, recipes: Path, tmp_path: Path
) -> None:
    names = ("4_layer_pooling", "4_lap", "5_identity")
    for part in names:
        train_part(part, work, CPU, recipes)
    write_set(work, tmp_path / "set")
    merged = load_checkpoint(tmp_path / "set" / "easyref.safetensors")
    assert merged.aggregations == ("dla", "lap")
    assert merged.identity_lora_rank == 16


def test_interrupted_drawing_starts_again(recipes: Path, tmp_path: Path) -> None:
    half = tmp_path / "data.unfinished" / "training" / "00000_0.png"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    train_part("data", tmp_path, CPU, recipes)
    assert is_done(tmp_path, "data")
    assert not (tmp_path / "data.unfinished").exists()


def test_a_folder_that_was_not_drawn_is_left_alone(recipes: Path, tmp_path: Path) -> None:
    own = tmp_path / "data" / "own.txt"
    own.parent.mkdir()
    own.write_text("precious", encoding="utf-8")
    with pytest.raises(EasyRefError, match="holds no whole drawn data set"):
        train_part("data", tmp_path, CPU, recipes)
    assert own.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("vae", "steps"), 0, "vae.steps is 0; it must be above 0"),
        (("mllm", "learning_rate"), -1.0, "mllm.learning_rate is -1.0"),
        (("base", "ema"), 1.0, "base.ema is 1.0; it must be less than 1"),
        (
            ("base", "restarts"),
            [{"step": 1, "learning_rate": 1.0}],
            "base.restarts has step 1; it must be after step 1",
        ),
        (("base", "restarts"), [{"step": 2, "learning_rate": 1.0}], "before the end, 2"),
        (("data", "pictures"), 4, "data.pictures is 4; it must be 5 or more"),
        (("data", "side"), 64, "data.side is 64; it must be 128"),
        (("base_pictures",), 0, "base_pictures is 0"),
        (("vae_details_from",), 0, "vae_details_from is 0"),
    ],
)
def test_a_recipe_out_of_range_is_refused_before_anything_is_made(
    recipes: Path, tmp_path: Path, place: tuple[str, ...], value: Any, message: str
) -> None:
    content = yaml.safe_load((recipes / "pretraining.yaml").read_text(encoding="utf-8"))
    (content[place[0]] if len(place) == 2 else content)[place[-1]] = value
    (tmp_path / "pretraining.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(EasyRefError, match=re.escape(message)):
        train_demo(tmp_path / "work", CPU, tmp_path)
    assert not (tmp_path / "work").exists()


def test_a_drawn_picture_that_is_broken_or_of_another_size_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path, side in zip(paths, (8, 9), strict=True):
        Image.new("RGB", (side, side)).save(path)
    with pytest.raises(EasyRefError, match=r"b\.png has 9x9 pixels, but .*a\.png 8x8"):
        read_pixels(paths)
    paths[1].write_bytes(b"no picture")
    with pytest.raises(EasyRefError, match=r"b\.png is not a picture"):
        read_pixels(paths)


def test_an_unknown_part_is_named(tmp_path: Path, recipes: Path) -> None:
    with pytest.raises(EasyRefError, match=r"no part 'mlm'.*mllm"):
        train_part("mlm", tmp_path, CPU, recipes)


def test_a_part_names_what_it_needs(tmp_path: Path, recipes: Path) -> None:
    with pytest.raises(EasyRefError, match="data is not trained yet"):
        train_part("vae", tmp_path, CPU, recipes)


def test_the_set_is_small_and_whole(work: Path, tmp_path: Path) -> None:
    adapter = adapter_of(work, "3_multi_reference")
    size = assemble_set(work, adapter, tmp_path / "set")
    assert size == sum(f.stat().st_size for f in (tmp_path / "set").rglob("*.safetensors"))
    assert size < 32e6
    info = json.loads((tmp_path / "set" / "set.json").read_text(encoding="utf-8"))
    assert info["trained"]
    stored = load_file(tmp_path / "set" / "easyref.safetensors")
    trained = load_file(adapter)
    large = {name for name, weight in stored.items() if weight.dtype == torch.float8_e4m3fn}
    assert any(name.startswith("multimodal_llm.") for name in large)
    scales = {name.removesuffix("weight") + "scale_weight" for name in large}
    assert stored.keys() == trained.keys() | scales
    assert {stored[name].dtype for name in trained.keys() - large} == {torch.float16}
    for folder in (tmp_path / "set", TRAINED_SET):
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        assert config.keys() <= {*VAE_CONFIG, "_diffusers_version"}


def test_each_stage_starts_from_the_one_before(work: Path) -> None:
    first, second, third = (
        load_file(adapter_of(work, stage))
        for stage in ("1_alignment", "2_single_reference", "3_multi_reference")
    )
    key = "mllm_final_layer.reference_tokens"
    assert (first[key] - second[key]).abs().max() < (first[key]).abs().max() / 4
    body = [name for name in third if name.startswith("multimodal_llm.")]
    assert body
    assert not any(name in first for name in body)  # the first stage leaves the MLLM as it was


def test_only_the_decoder_is_trained_further_and_shipped(work: Path, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(work / part / "model" / name) for part in ("vae", "decoder"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("decoder.") for key in changed)
    assemble_set(work, adapter_of(work, "3_multi_reference"), tmp_path / "set")
    shipped = read_stored_weights(tmp_path / "set" / "vae" / name)
    assert shipped.keys() == after.keys()
    for key, weight in after.items():  # to within a step of int8
        assert (shipped[key] - weight).abs().max() <= weight.abs().max() / 127, key


def test_the_decoders_loss_weights_details_more_near_the_figures_edges() -> None:
    pixels, nowhere = torch.zeros(1, 3, 32, 32), -torch.ones(1, 3, 32, 32)
    assert detail_loss(pixels + 0.5, pixels, nowhere) < 1e-10  # no detail, however wrong
    dot, edges = pixels.clone(), nowhere.clone()
    dot[..., 16, 16] = 1
    edges[..., 8:24, 8:24] = 1
    plain, beside = (float(detail_loss(dot, pixels, where)) for where in (nowhere, edges))
    assert beside > 2 * plain > 0
    assert beside == pytest.approx(float(detail_loss(dot.flip(3), pixels, edges.flip(3))))


def test_a_missing_part_stops_the_assembly(work: Path, tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match=r"4_none.*missing"):
        assemble_set(work, work / "4_none.safetensors", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_fewer_pictures_are_of_all_kinds(work: Path, tmp_path: Path) -> None:
    """Kinds of groups take turns in the list, so every n-th picture can be of one kind alone."""
    records = json.loads((work / "data" / "captions.json").read_text(encoding="utf-8"))
    facts = json.loads((work / "data" / "facts.json").read_text(encoding="utf-8"))
    kinds = [tuple(sorted(facts[record["target"]])) for record in records]
    assert len(set(kinds)) == 2, "a character, or a style"
    styled = next(record for record, kind in zip(records, kinds, strict=True) if kind != kinds[0])
    plain = records[0]
    (tmp_path / "training").symlink_to(work / "data" / "training", target_is_directory=True)
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    turns = json.dumps([styled, *[plain] * 4] * 40)
    (tmp_path / "captions.json").write_text(turns, encoding="utf-8")
    chosen = [name == styled["target"] for name in read_pictures(tmp_path, 40).names]
    assert 0 < sum(chosen) < 40
    assert chosen == [name == styled["target"] for name in read_pictures(tmp_path, 40).names]


def test_cached_latents_of_other_images_or_another_autoencoder_are_refused(
    work: Path, tmp_path: Path
) -> None:
    pictures, cache = read_pictures(work / "data", 6), tmp_path / "part" / "latents.pt"
    vae = AutoencoderTiny.from_pretrained(work / "vae" / "model")
    latents = encode_images(vae, pictures, CPU, cache)
    assert torch.equal(encode_images(vae, pictures, CPU, cache), latents)
    fewer = read_pictures(work / "data", 3)
    assert fewer.names != pictures.names[:3]
    with pytest.raises(EasyRefError, match="base_pictures has changed"):
        encode_images(vae, fewer, CPU, cache)
    other = AutoencoderTiny.from_pretrained(work / "decoder" / "model")
    with pytest.raises(EasyRefError, match="another autoencoder"):
        encode_images(other, pictures, CPU, cache)
    cache.write_bytes(cache.read_bytes()[:-50])
    with pytest.raises(EasyRefError, match="cannot be read"):
        encode_images(vae, pictures, CPU, cache)


def test_the_mllm_is_trained_on_training_identities_only(
    recipes: Path, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composers: list[Composer] = []
    monkeypatch.setattr(
        "workshop.demo.pretraining.mllm.train_mllm",
        lambda groups, composer, *_: composers.append(composer),
    )
    (tmp_path / "data").symlink_to(work / "data", target_is_directory=True)
    train_part("mllm", tmp_path, CPU, recipes)
    assert composers[0].identities == identities()[0]


def test_stages_train_on_the_chosen_device(
    recipes: Path, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("data", "base", "mllm"):
        (tmp_path / part).symlink_to(work / part, target_is_directory=True)
    asked: list[bool] = []
    monkeypatch.setattr(
        "easyref_core.training.loop.train", lambda settings, *, cpu: asked.append(cpu)
    )
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        train_part("1_alignment", tmp_path, torch.device(device), recipes)
    assert asked == [True, False, False]
    assert chosen == [torch.device("cuda:1")]


def test_a_stage_resumes_if_its_folder_is_spelt_otherwise_but_not_with_another_recipe(
    recipes: Path, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = "1_alignment"
    whole = adapter_of(work, stage)
    whole.rename(tmp_path / "kept")  # as if interrupted just before its end
    monkeypatch.chdir(work.parent)
    train_part(stage, Path(work.name), CPU, recipes)
    resumed, original = load_file(whole), load_file(tmp_path / "kept")
    assert all(torch.equal(resumed[name], original[name]) for name in original)
    whole.unlink()
    shutil.copytree(recipes, tmp_path / "other")
    changed = tmp_path / "other" / f"{stage}.yaml"
    content = yaml.safe_load(changed.read_text())
    content["optimiser"]["weight_decay"] = 0.5
    changed.write_text(yaml.safe_dump(content))
    with pytest.raises(EasyRefError, match=r"weight_decay.* delete .*1_alignment") as raised:
        train_part(stage, work, CPU, tmp_path / "other")
    assert "--force" not in str(raised.value)
    (tmp_path / "kept").rename(whole)


def test_folders_that_cannot_be_written_are_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_train, "train_demo", lambda *_: pytest.fail("trained"))
    file = tmp_path / "file"
    file.write_text("")
    for command in (
        ["data", str(file)],
        ["data", str(file / "x")],
        ["data", "/proc/x"],
        ["train", "--folder", str(file)],
        ["train", "--folder", str(file), "--pretrained", str(TRAINED_SET)],
        ["train", "--folder", str(tmp_path / "work"), "--set", str(file)],
    ):
        assert main(command) == 1
        assert "cannot be written" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "drawn"), "--side", "99999"]) == 1
    assert "32 to 1024 pixels wide, not 99999" in capsys.readouterr().err


def test_edges_have_more_weight_the_less_noise_there_is() -> None:
    outlines = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    outlines[0, :, 40, 87] = 255
    edges = edge_mask(outlines)
    assert edges.shape == (1, 1, 16, 16)
    assert edges.nonzero().tolist() == [[0, 0, 5, 10]]

    class Wrong(torch.nn.Module):
        """Wrong at that place only, by 1 in each channel."""

        def forward(self, noisy: torch.Tensor, *_: object, **__: object) -> SimpleNamespace:
            return SimpleNamespace(sample=noisy + edges)

    def loss(level: float, edges: torch.Tensor) -> float:
        # Latents chosen so that what is noisy is the noise: only the place's error is left.
        generator, levels = torch.Generator().manual_seed(0), torch.full((1000,), level)
        noise = add_noise(torch.zeros(1, 4, 16, 16), levels, generator)[1]
        latents = noise * (1 - (1 - level) ** 0.5) / level**0.5
        nothing = torch.zeros(1, 1)
        generator.manual_seed(0)
        return float(noise_loss(Wrong(), latents, edges, nothing, nothing, levels, generator, CPU))

    for level in (0.8, 0.3, 0.001):
        counted, plain = loss(level, edges), loss(level, torch.zeros_like(edges))
        assert counted / plain == pytest.approx(1 + 3 * level, rel=1e-3)


def test_training_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["train", "--folder", str(tmp_path)]) == 1
    assert "pip install -e '.[train]'" in capsys.readouterr().err
    assert main(["check"]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_baselines_are_trained_alike() -> None:
    names = ("1_alignment", "2_single_reference", "3_multi_reference")
    stages = [read_recipe(RECIPES / f"{name}.yaml") for name in names]
    averaged = read_recipe(RECIPES / "3_averaged.yaml")
    scratch = read_recipe(RECIPES / "3_from_scratch.yaml")
    dla, lap = (read_recipe(RECIPES / f"4_{name}.yaml") for name in ("layer_pooling", "lap"))

    def changed(recipe: dict[str, Any], before: dict[str, Any] = stages[-1]) -> set[str]:
        return {line.split(":")[0] for line in differences(before, recipe)}

    assert changed(averaged) == {"model.aggregation", "output.folder"}
    identity, both = (read_recipe(RECIPES / f"5_{n}.yaml") for n in ("identity", "single_stage"))
    together = sum(stage["optimiser"]["steps"] for stage in (dla, identity))
    assert both["optimiser"]["steps"] == together
    assert changed(lap, dla) == {"model.aggregation", "output.folder"}
    assert changed(scratch) == {"stage", "model.adapter", "optimiser.steps", "output.folder"}
    in_all = sum(stage["optimiser"]["steps"] for stage in stages)
    assert scratch["optimiser"]["steps"] == in_all


def test_several_processes_train_one_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--folder", str(tmp_path), "--only", "vae", "mllm"]) == 1
    assert "name one part" in capsys.readouterr().err
    assert main(["train", "--folder", str(tmp_path), "--only", "data"]) == 1
    assert "drawn by one process" in capsys.readouterr().err
