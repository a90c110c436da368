"""Variants and trials: the same for all, chosen from the seed alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench_fakes import settings_for

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.groups import GroupPicture, ReferenceGroup
from easyref_core.evaluation.methods import METHODS
from easyref_core.evaluation.planning import (
    batches_of,
    labels,
    make_variants,
    plan_trials,
    share_of,
)
from easyref_core.evaluation.protocols import PRESETS, Preset, chosen_methods
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource

SOME = Path("somewhere")


def group(name: str, size: int, **more: object) -> ReferenceGroup:
    pictures = tuple(
        GroupPicture(PictureSource(Path(f"{name}/{number}")), f"{name} {number}")
        for number in range(size)
    )
    return ReferenceGroup(name, pictures, **more)  # type: ignore[arg-type]


def names(trial: Trial) -> list[str]:
    return [picture.source.path.name for picture in trial.references]


def variants(
    *vary: str, methods: tuple[str, ...] = ("easyref", "none"), **more: object
) -> list[Variant]:
    return make_variants(settings_for(SOME, vary, **more), methods, Preset(), 100)


def test_what_a_method_does_not_use_is_not_varied() -> None:
    found = variants("weight=0.4,1", "references=1,2", methods=METHODS)
    counts = {name: sum(v.method == name for v in found) for name in METHODS}
    assert counts == dict.fromkeys(METHODS, 4) | {"none": 1}
    (none,) = (v for v in found if v.method == "none")
    assert none == Variant("none")


def test_layers_identity_and_stages_are_varied_where_the_mllm_reads_references() -> None:
    vary = ("aggregation=easyref,dla", "identity=0,0.5", "stages=none,noise")
    found = variants(*vary, methods=METHODS)
    counts = {name: sum(v.method == name for v in found) for name in METHODS}
    assert counts == dict.fromkeys(METHODS, 1) | {
        **dict.fromkeys(("easyref", "easyref-other"), 8),
        **dict.fromkeys(("average", "concatenate"), 4),
    }
    named = list(labels(found).values())
    assert named[0] == "easyref, aggregation easyref, identity 0, stages none"
    assert named[7] == "easyref, aggregation dla, identity 0.5, stages noise"
    assert "average, identity 0.5, stages none" in named
    (one, _) = variants(aggregation="lap", identity=0.5, stages="0-0.36/0.14-1")
    assert (one.aggregation, one.identity, one.stages) == ("lap", 0.5, "0-0.36/0.14-1")


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("aggregation=last", "last"),
        ("identity=-1", "identity"),
        ("identity=much", "identity"),
        ("stages=0-0.36", "stages: '0-0.36' cannot be read"),
        ("stages=0-0.36/0.9-0.2", "is after its end"),
    ],
)
def test_values_that_cannot_be_varied_are_refused(vary: str, said: str) -> None:
    with pytest.raises(EasyRefError, match=re.escape(said)):
        variants(vary)


def test_steps_and_guidance_are_varied_for_every_method() -> None:
    assert len(variants("steps=10,20", "guidance=5,7")) == 8
    assert variants(steps=11)[1] == Variant("none", steps=11)


def test_labels_say_what_differs_and_nothing_else() -> None:
    found = variants("weight=0.4,1", "references=0,1,4", "adapter=x/a.safetensors,y/a.safetensors")
    named = list(labels(found).values())
    assert named[0] == "easyref, weight 0.4, all references, x/a.safetensors"
    assert named[-2:] == ["easyref, weight 1, 4 references, y/a.safetensors", "none"]
    assert len(set(named)) == len(found) == 13
    assert list(labels(variants(weight=0.3)).values()) == ["easyref", "none"]


def test_target_references_and_noise_are_equal_for_all_variants() -> None:
    found = variants("weight=0.4,1", methods=METHODS)
    trials = plan_trials([group("a", 6), group("b", 3)], found, seed=3, images=2)
    by_image: dict[str, set[object]] = {}
    for trial in trials:
        image = trial.path.partition("/")[2].partition("/")[2]
        by_image.setdefault(image, set()).add(
            (trial.references, trial.targets, trial.prompt, trial.seed)
        )
    assert len(by_image) == 4
    assert all(len(same) == 1 for same in by_image.values())


def test_another_seed_chooses_others() -> None:
    chosen = {
        seed: [
            (names(t), t.targets, t.seed) for t in plan_trials([group("a", 9)], variants(), seed, 1)
        ]
        for seed in (0, 1)
    }
    assert chosen[0] != chosen[1]


def test_the_target_is_no_reference_and_every_picture_becomes_the_target() -> None:
    trials = plan_trials([group("a", 5)], [Variant("easyref")], seed=0, images=10)
    for trial in trials:
        assert sorted([*names(trial), trial.targets[0].source.path.name]) == list("01234")
        assert trial.prompt == trial.targets[0].caption
    targets = [trial.targets[0].source.path.name for trial in trials]
    assert sorted(targets[:5]) == sorted(targets[5:]) == list("01234")


def test_fewer_references_are_the_first_of_more() -> None:
    trials = plan_trials([group("a", 9)], variants("references=1,3,0,100"), seed=5, images=1)
    one, three, every, hundred = (
        names(trial) for trial in trials if trial.variant.method != "none"
    )
    assert one == every[:1]
    assert three == every[:3]
    assert hundred == every
    assert len(every) == 8


def test_a_fixed_target_stays() -> None:
    trials = plan_trials([group("a", 4, target=2)], [Variant("easyref")], seed=0, images=3)
    assert {trial.targets[0].source.path.name for trial in trials} == {"2"}
    assert len({trial.seed for trial in trials}) == 3


def test_each_prompt_gets_its_images_and_all_pictures_are_targets() -> None:
    subject = group("a", 3, prompts=("in the snow", "red"))
    trials = plan_trials([subject], [Variant("easyref", references=2)], 0, 4, "all")
    assert [trial.prompt for trial in trials] == ["in the snow"] * 4 + ["red"] * 4
    assert len({trial.seed for trial in trials}) == 8
    assert all(len(t.targets) == 3 and len(t.references) == 2 for t in trials)


def test_a_picture_can_be_its_own_reference() -> None:
    (trial,) = plan_trials([group("a", 1, target=0)], [Variant("easyref")], 0, 1, "itself")
    assert trial.references == trial.targets


def test_paths_differ_also_where_names_look_alike() -> None:
    odd = ("a b", "a/b", "A-B", "../..", "日本", "x" * 300, "x" * 301)
    groups = [group(name, 2) for name in odd]
    trials = plan_trials(groups, variants("weight=1,1.0000001,0.5"), 0, 1)
    paths = [trial.path.casefold() for trial in trials]
    assert len(set(paths)) == len(paths)
    assert all(part not in ("", ".", "..") for path in paths for part in path.split("/"))
    assert all(path.isascii() and len(path) < 300 for path in paths)


def test_batches_hold_one_variant_and_depend_on_the_plan_alone() -> None:
    trials = plan_trials([group(name, 3) for name in "abcde"], variants("weight=0.5,1"), 0, 1)
    batches = batches_of(trials, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1] * 3
    assert all(len({trial.variant for trial in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_every_batch_is_one_process_s(processes: int, size: int) -> None:
    trials = plan_trials([group(name, 3) for name in "abcdef"], variants("weight=0.5,1"), 0, 4)
    batches = batches_of(trials, size)
    shared = [batch for index in range(processes) for batch in share_of(batches, processes, index)]
    assert sorted(b[0].path for b in shared) == sorted(b[0].path for b in batches)


def test_a_groups_batches_stay_in_one_process() -> None:
    trials = plan_trials([group(name, 3) for name in "abcdef"], variants("weight=0.5,1"), 0, 4)
    for index in range(2):
        groups = {b[0].group for b in share_of(batches_of(trials, 1), 2, index)}
        assert len(groups) == 3


def test_methods_without_files_are_left_out_and_named() -> None:
    notes: list[str] = []
    assert chosen_methods(settings_for(SOME, methods=[]), notes) == ["none"]
    assert "easyref is left out: it needs --adapter and --mllm." in notes
    assert "ip-adapter is left out: it needs --ip-adapter and --image-encoder." in notes
    given = settings_for(SOME, ["adapter=a,b"], methods=[], mllm="m")
    assert chosen_methods(given, []) == ["easyref", "average", "concatenate", "none"]
    with pytest.raises(EasyRefError, match=r"nothing to generate with: easyref is left out"):
        chosen_methods(settings_for(SOME, methods=[], protocol="tokens"), [])


def test_methods_that_are_named_are_compared_once() -> None:
    assert chosen_methods(settings_for(SOME, methods=["lora", "none", "lora"]), []) == [
        "lora",
        "none",
    ]


def test_a_preset_varies_until_a_group_is_used_up() -> None:
    preset = PRESETS["group-size"]
    found = make_variants(settings_for(SOME), ["easyref"], preset, 5)
    assert [variant.references for variant in found] == [1, 2, 4, 8]
    found = make_variants(settings_for(SOME, ["references=3,50"]), ["easyref"], preset, 5)
    assert [variant.references for variant in found] == [3, 50]


def test_a_presets_references_can_be_replaced() -> None:
    preset = PRESETS["multibanana"]
    (most,) = make_variants(settings_for(SOME), ["easyref"], preset, 9)
    (every,) = make_variants(settings_for(SOME, references=0), ["easyref"], preset, 9)
    assert (most.references, every.references) == (8, 0)
