"""What a run's folder keeps: tokens and LoRAs, computed once and the same again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_methods import generate, load, pixels
from safetensors.torch import load_file, save_file

from easyref_core import load_tokens
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.methods import easyref, lora, lora_training
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.lora import LoraMethod
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import NEGATIVE, GenerationSettings
from easyref_core.evaluation.trials import Trial
from easyref_core.training.records import PictureSource

MakeTrial = Callable[..., Trial]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of groups that the MLLM encodes."""
    encode, prompts = easyref.encode_references, []

    def counted(encoder: Any, plan: Any, **options: Any) -> Any:
        prompts.append(plan.prompt)
        return encode(encoder, plan, **options)

    monkeypatch.setattr(easyref, "encode_references", counted)
    return prompts


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The captions of groups on which a LoRA is trained."""
    train, groups = lora.train_lora, []

    def counted(base: Any, pictures: Any, captions: Any, settings: Any) -> Any:
        groups.append(tuple(captions))
        return train(base, pictures, captions, settings)

    monkeypatch.setattr(lora, "train_lora", counted)
    return groups


def test_tokens_are_encoded_once_for_all_weights(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path, encoded: list[str]
) -> None:
    trials = [make_trial("easyref", weight=weight) for weight in (1.0, 0.5)]
    method = load(settings, *trials)
    (first,) = generate(method, tmp_path, trials[0])
    (second,) = generate(method, tmp_path, trials[1])
    assert pixels([first]) != pixels([second])
    assert len(encoded) == 1
    assert first.seconds["encode"] == second.seconds["encode"] > 0
    method.close()
    # Another process, or a run that goes on.
    assert pixels(generate(load(settings, *trials), tmp_path, trials[0])) == pixels([first])
    assert len(encoded) == 1


def test_tokens_are_encoded_anew_for_whatever_changes_them(
    settings: GenerationSettings,
    tiny: Any,
    make_trial: MakeTrial,
    tmp_path: Path,
    encoded: list[str],
) -> None:
    picture = shutil.copy(tiny.pictures / "0_0.png", tmp_path / "picture.png")
    reference = GroupPicture(PictureSource(Path(picture)))
    trial = replace(make_trial("easyref"), references=(reference,))
    other = tmp_path / "other.safetensors"
    weights = load_file(tiny.adapter)
    weights["mllm_final_layer.reference_tokens"] *= 2
    save_file(weights, other)
    trials = [
        trial,
        replace(trial, prompt="another prompt"),
        replace(trial, variant=replace(trial.variant, insert_before=2)),
        replace(trial, variant=replace(trial.variant, image_size=84)),
        replace(trial, references=(reference, reference)),
        replace(trial, variant=replace(trial.variant, adapter=str(other))),
    ]
    method = load(settings, *trials)
    for number, changed in enumerate(trials, start=1):
        generate(method, tmp_path, changed)
        assert len(encoded) == number
    method.close()
    shutil.copy(tiny.pictures / "1_0.png", picture)  # another picture of this name
    method = load(settings, trial)
    generate(method, tmp_path, trial)
    method.close()
    generate(load(replace(settings, dtype="bfloat16"), trial), tmp_path, trial)
    assert len(encoded) == len(trials) + 2
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == len(trials) + 2


def test_an_adapter_of_a_variant_is_used_for_it_alone(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    weights = load_file(tiny.adapter)
    save_file({n: w * (2 if "_ip" in n else 1) for n, w in weights.items()}, other)
    plain, changed = make_trial("easyref"), make_trial("easyref", adapter=str(other))
    method = load(settings, plain, changed)
    before = pixels(generate(method, tmp_path, plain))
    assert pixels(generate(method, tmp_path, changed)) != before
    assert pixels(generate(method, tmp_path, plain)) == before
    assert len(method.identity()["adapters"]) == 2


def test_damaged_tokens_are_encoded_again(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path, encoded: list[str]
) -> None:
    trial = make_trial("average")
    wanted = pixels(generate(load(settings, trial), tmp_path, trial))
    (file,) = (tmp_path / "tokens").glob("*.safetensors")
    whole, tokens = file.read_bytes(), load_tokens(file)
    for content in (whole[:-100], b""):
        file.write_bytes(content)
        assert pixels(generate(load(settings, trial), tmp_path, trial)) == wanted
        assert load_tokens(file).cond.equal(tokens.cond)
    file.with_suffix(".json").write_text("half")
    assert pixels(generate(load(settings, trial), tmp_path, trial)) == wanted
    assert len(encoded) == 4
    assert load_tokens(file).aggregation == "average"


@pytest.mark.parametrize("name", ["easyref", "lora"])
def test_a_full_disk_ends_the_run(
    name: str,
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for module in (easyref, lora):
        monkeypatch.setattr(module, "write_atomically", full)
    trial = make_trial(name)
    with pytest.raises(EasyRefError, match="cannot be written") as raised:
        load(settings, trial).generate([trial], tmp_path)
    errors, error = [], raised.value
    while error is not None:
        errors.append(error)
        error = error.__cause__
    assert any(isinstance(e, OSError) and e.errno == 28 for e in errors)


def test_with_offload_the_mllm_leaves_the_device(
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from easyref_core.encode.encoder import EasyRefEncoder

    moves: list[str] = []
    to = EasyRefEncoder.to
    monkeypatch.setattr(EasyRefEncoder, "to", lambda e, d: (moves.append(str(d)), to(e, d))[1])
    trial = make_trial("easyref")
    wanted = pixels(generate(load(settings, trial), tmp_path / "a", trial))
    assert moves == ["cpu"]
    offload = replace(settings, offload=True)
    assert pixels(generate(load(offload, trial), tmp_path / "b", trial)) == wanted
    assert moves == ["cpu", "cpu", "cpu"]  # to the device and back


def test_a_lora_is_trained_once_for_its_references(
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    trained: list[tuple[str, ...]],
) -> None:
    trials = [
        make_trial("lora", seed=1),
        make_trial("lora", seed=2),
        make_trial("lora", weight=0.5),
        make_trial("lora", 1),
    ]
    method = load(settings, *trials)
    (first, second) = generate(method, tmp_path, *trials[:2])
    generate(method, tmp_path, trials[2])
    assert trained == [("a ball 0", "a ball 1")]
    assert first.seconds["train"] == second.seconds["train"] > 0
    generate(method, tmp_path, trials[3])
    assert len(trained) == 2
    method.close()
    again = load(settings, *trials)
    assert pixels(generate(again, tmp_path, *trials[:2])) == pixels([first, second])
    assert len(trained) == 2


def test_a_lora_is_the_same_wherever_it_is_trained(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    """After others or alone, whatever the state of torch's random numbers."""
    trials = [make_trial("lora", group) for group in (0, 1)]
    generate(load(settings, *trials), tmp_path / "a", *trials)
    torch.manual_seed(9)
    generate(load(settings, *trials), tmp_path / "b", trials[1])
    (alone,) = (tmp_path / "b" / "loras").glob("*.safetensors")
    after = load_file(tmp_path / "a" / "loras" / alone.name)
    assert after.keys() == load_file(alone).keys()
    assert all(torch.equal(weight, after[name]) for name, weight in load_file(alone).items())


def test_a_lora_depends_on_captions_pictures_and_settings(
    settings: GenerationSettings, make_trial: MakeTrial
) -> None:
    references = make_trial("lora").references
    silent = tuple(replace(reference, caption="") for reference in references)
    changes = [
        (settings, references),
        (settings, silent),
        (settings, references[::-1]),
        (settings, references[:1]),
        (replace(settings, size=128), references),
        (replace(settings, lora=replace(settings.lora, steps=1)), references),
        (replace(settings, lora=replace(settings.lora, rank=1)), references),
        (replace(settings, lora=replace(settings.lora, learning_rate=2e-2)), references),
        (replace(settings, lora=replace(settings.lora, batch=2)), references),
        (replace(settings, lora=replace(settings.lora, seed=1)), references),
    ]
    keys = [LoraMethod(GenerationPipeline(s))._key(r) for s, r in changes]
    assert len(set(keys)) == len(changes)
    assert LoraMethod(GenerationPipeline(settings))._key(references) == keys[0]


def test_training_lowers_the_loss(settings: GenerationSettings, make_trial: MakeTrial) -> None:
    losses: list[float] = []
    loss = lora_training._loss

    def noted(base: Any, schedule: Any, samples: Any, count: int, generator: Any) -> Any:
        found = loss(base, schedule, samples, 16, torch.Generator().manual_seed(0))
        losses.append(found.item())
        return found

    trial = make_trial("lora")
    longer = replace(settings, lora=replace(settings.lora, steps=6))
    method = load(longer, trial)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lora_training, "_loss", noted)
        lora_training.train_lora(
            method._base,  # type: ignore[attr-defined]
            [reference.source.open() for reference in trial.references],
            ["", ""],
            longer.lora,
        )
    assert losses[-1] < 0.98 * losses[0]


def test_a_kept_lora_is_one_for_diffusers(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("lora", weight=0.6)
    (result,) = generate(load(settings, trial), tmp_path, trial)
    (file,) = (tmp_path / "loras").glob("*.safetensors")
    weights = load_file(file)
    assert {w.shape[0] for n, w in weights.items() if "lora_A" in n} == {settings.lora.rank}
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in weights} >= {"to_q", "to_k", "to_v"}
    pipe = GenerationPipeline(settings).pipe
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    pipe.set_adapters(pipe.get_active_adapters(), 0.6)
    wanted = pipe(
        trial.prompt,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_inference_steps=trial.variant.steps,
        guidance_scale=trial.variant.guidance,
        generator=torch.Generator().manual_seed(trial.seed),
    ).images[0]
    assert pixels([result]) == [wanted.tobytes()]


def test_lora_other_uses_the_next_groups_lora(
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    trained: list[tuple[str, ...]],
) -> None:
    others = [make_trial("lora-other", group, count=3 - group) for group in (0, 1)]
    own = [make_trial("lora", group, count=3 - group) for group in (0, 1)]
    methods = load_methods(settings, [*others, *own])
    generate(methods["lora-other"], tmp_path, others[0])
    assert [len(group) for group in trained] == [2]
    assert pixels(generate(methods["lora-other"], tmp_path, others[1])) != []
    methods["lora-other"].close()
    swapped = replace(own[1], prompt=others[0].prompt)
    seen = pixels(generate(methods["lora"], tmp_path, swapped))
    methods["lora"].close()
    assert pixels(generate(methods["lora-other"], tmp_path, others[0])) == seen
    assert [len(group) for group in trained] == [2, 3]
    with pytest.raises(EasyRefError, match="only the group 'group 0'"):
        load(settings, others[0])


def test_a_damaged_lora_is_trained_again(
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    trained: list[tuple[str, ...]],
) -> None:
    trial = make_trial("lora")
    wanted = pixels(generate(load(settings, trial), tmp_path, trial))
    (file,) = (tmp_path / "loras").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert pixels(generate(load(settings, trial), tmp_path, trial)) == wanted
    assert len(trained) == 2


def test_training_that_fails_marks_the_image_and_keeps_nothing(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("lora")
    wild = load(replace(settings, lora=replace(settings.lora, learning_rate=1e30, steps=4)), trial)
    (result,) = wild.generate([trial], tmp_path)
    assert result.image is None
    assert "is not a number. Lower the learning rate" in result.error
    assert not list(tmp_path.rglob("*.safetensors"))
    unet = wild._base.pipe.unet  # type: ignore[attr-defined]
    assert not any("lora" in name for name, _ in unet.named_modules())


def test_memory_that_runs_out_in_training_marks_the_image(
    settings: GenerationSettings,
    make_trial: MakeTrial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(lora_training, "_loss", full)
    trial = make_trial("lora")
    method = load(settings, trial)
    (result,) = method.generate([trial], tmp_path)
    assert "not enough memory to prepare its references" in result.error
    monkeypatch.undo()
    generate(method, tmp_path, trial)


def test_easyref_other_uses_the_next_groups_references(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path, encoded: list[str]
) -> None:
    others = [make_trial("easyref-other", group, count=3 - group) for group in (0, 1)]
    own = make_trial("easyref", 1, count=2)
    methods = load_methods(settings, [*others, own])
    (seen,) = generate(methods["easyref-other"], tmp_path, others[0])
    methods["easyref-other"].close()
    swapped = replace(own, prompt=others[0].prompt)
    assert pixels(generate(methods["easyref"], tmp_path, swapped)) == pixels([seen])
    assert len(encoded) == 1  # tokens are kept for both methods
    methods["easyref"].close()
    with pytest.raises(EasyRefError, match="easyref-other out"):
        load(settings, others[0])
