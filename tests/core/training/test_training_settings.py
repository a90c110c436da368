"""Recipes: which are refused, and with which sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from easyref_core.errors import EasyRefError
from easyref_core.training.config import Settings, load_settings

Recipe = Callable[..., Path]
RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_overrides_replace_values_of_the_recipe(recipe: Recipe) -> None:
    settings = load_settings(recipe(), ["optimiser.steps=9", "optimiser.learning_rate=1e-4"])
    assert settings.optimiser.steps == 9
    assert settings.optimiser.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimiser.stepz=1", "no setting optimiser.stepz. Did you mean steps"),
        ("colour=1", "There is no setting colour"),
        ("optimiser.steps", "write section.key=value"),
        ("optimiser.steps=many", "optimiser.steps must be of type int"),
        ("optimiser.steps=0", "optimiser.steps is 0; it must be above 0"),
        ("optimiser.steps=true", "optimiser.steps must be of type int"),
        ("stage=alinment", "Did you mean alignment"),
        ("data.crop=middle", "data.crop is 'middle'"),
        ("data.drop_text=0.96", "probabilities"),
        ("data.drop_text=1.5", "data.drop_text is 1.5; it must be 1 or less"),
        ("optimiser.learning_rate=fast", "learning_rate must be of type float, not 'fast'"),
        ("optimiser.gradient_checkpointing=1", "gradient_checkpointing must be of type bool"),
        ("optimiser.parts=[]", "optimiser.parts must name at least one"),
        ("data.files=5", "data.files must be a list, not 5"),
        ("data.files=[nothing.json]", "no data file 'nothing.json'"),
        ("model.base=nowhere", "model.base: there is no folder 'nowhere'"),
        ("model.adapter=gone.safetensors", "Train the stage before"),
        ("stage=multi_reference", "starts from the adapter of the stage before"),
        ("optimiser.parts=[lora, lore]", "Did you mean lora"),
        ("model.lora_rank=0", "model.lora_rank is 0; it must be 1 or more"),
        ("model.lora_rank=-1", "model.lora_rank is -1"),
        ("optimiser.ema=1.5", "optimiser.ema is 1.5; it must be less than 1"),
        ("optimiser.max_grad_norm=-1", "optimiser.max_grad_norm is -1; it must be above 0"),
        ("optimiser.weight_decay=-1", "optimiser.weight_decay is -1; it must be 0 or more"),
        ("seed=-1", "seed is -1; it must be 0 or more"),
        ("data.workers=-1", "data.workers is -1"),
        ("data.image_size=20", "data.image_size is 20; it must be 56 or more"),
        ("output.trackers=[tensorbord]", "Did you mean tensorboard"),
        ("output.folder=/dev/null", "'/dev/null' is a file"),
        ("optimiser=5", "must be a section"),
        ("optimiser.warmup_steps=99", "warmup_steps is 99; it must be 0 to 4"),
        ("optimiser.warmup_steps=-1", "warmup_steps is -1"),
        ("optimiser.learning_rate_schedule=cosin", "Did you mean cosine"),
        ("optimiser.loss_weighting=minsnr", "Did you mean min_snr"),
        ("optimiser.snr_gamma=0", "optimiser.snr_gamma is 0; it must be above 0"),
        ("optimiser.noise_levels=0", "optimiser.noise_levels is 0; it must be above 0"),
        ("optimiser.noise_levels=1001", "noise_levels is 1001; it must be 1,000 or less"),
        ("optimiser.batch_size=1000000000", "is 1000000000; it must be 4,096 or less"),
        ("optimiser.accumulation=10000000000", "accumulation is 10000000000; it must be"),
        ("optimiser.steps=1" + "0" * 4000, "optimiser.steps"),
        (
            "optimiser.steps=1" + "0" * 5000,
            "optimiser.steps is not YAML that can be used: Exceeds",
        ),
        ("optimiser.learning_rate=.inf", "learning_rate is inf; it must be a finite number"),
        ("optimiser.learning_rate=1e30", "it must be 10 or less"),
        ("data.resolution=1", "data.resolution is 1; it must be 32 or more"),
        ("optimiser.learning_rate=.nan", "learning_rate is nan; it must be"),
        ("optimiser.learning_rate=1e999", "must be a finite number"),
        ("optimiser.learning_rate=1" + "0" * 400, "optimiser.learning_rate"),
        ("optimiser.weight_decay=.inf", "weight_decay is inf; it must be a finite number"),
        ("optimiser.max_grad_norm=.inf", "max_grad_norm is inf; it must be a finite number"),
        ("optimiser.ema=.nan", "optimiser.ema is nan; it must be"),
        ("data.drop_text=.nan", "data.drop_text is nan; it must be"),
        ("model.reference_tokens=1000000000", "reference_tokens is 1000000000; it must be"),
        ("model.lora_rank=1000000000", "lora_rank is 1000000000; it must be 4,096 or less"),
        ("data.resolution=1000000000", "resolution is 1000000000; it must be 8,192 or less"),
        ("data.image_size=1000000000", "image_size is 1000000000; it must be 8,192 or less"),
        ("data.workers=1000000000", "workers is 1000000000; it must be 256 or less"),
        ("data.max_references=1000000000", "max_references is 1000000000; it must be"),
        ("seed=4294967296", "seed is 4294967296; it must be 4,294,967,295 or less"),
        ("model.base=" + "a" * 300, "model.base: there is no folder 'aaa"),
        ('data.files="a\\0b"', r"no data file 'a\x00b"),
        ('stage="\\e[2J"', r"stage is '\x1b[2J'; it can be"),
        ('"\x1b[2J"=1', r"There is no setting"),
        ("data.root=" + "[" * 60_000, "data.root is not YAML that can be used: it is nested"),
        ("model.aggregation=dna", "Did you mean dla"),
        ("model.aggregation=dla", "a new adapter has no layer pooling. Add layer_pooling"),
        ("model.pooling=scores", "model.aggregation is easyref, but model.pooling is set"),
        ("model.mllm_layers=[1]", "model.aggregation is easyref, but model.mllm_layers is set"),
        ("optimiser.parts=[layer_pooling]", "but the part layer_pooling is trained: only dla and"),
        ("stage=identity", "model.identity_references is 0; it must be 1 or more in the stage"),
        ("optimiser.parts=[identity]", "model.identity_references is 0; it must be 1 or more"),
        ("data.drop_tokens=0.5", "drop_tokens are (0.0, 0.5), but model.identity_references is 0"),
        ("model.identity_references=29", "is 29, but a sample has at most 28 references"),
        ("data.root.deep=1", "'data.root.deep=1': 'root' is not a section"),
    ],
)
def test_wrong_settings_are_refused(recipe: Recipe, override: str, sentence: str) -> None:
    with pytest.raises(EasyRefError) as refused:
        load_settings(recipe(), [override])
    assert sentence in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("layers", ["[2, 1]", "[1, 1]", "[]"])
def test_layers_to_pool_are_named_once_in_order(recipe: Recipe, layers: str) -> None:
    pooled = ["model.aggregation=lap", f"model.mllm_layers={layers}"]
    with pytest.raises(EasyRefError, match="each once and in ascending order"):
        load_settings(recipe(), pooled)


def test_a_key_that_yaml_does_not_read_as_text_is_refused(recipe: Recipe) -> None:
    path = recipe()
    path.write_text(path.read_text(encoding="utf-8") + "on: 5\n", encoding="utf-8")
    with pytest.raises(EasyRefError, match="There is no setting true"):
        load_settings(path)


def test_a_word_that_yaml_takes_for_false_is_read_as_written(recipe: Recipe) -> None:
    assert load_settings(recipe(), ["optimiser.precision=no"]).optimiser.precision == "no"


def test_cache_with_random_crops_is_refused(recipe: Recipe) -> None:
    with pytest.raises(EasyRefError, match=r"data\.cache needs the same target"):
        load_settings(recipe(), ["data.cache=cache", "data.crop=random"])


def test_missing_section_is_named(recipe: Recipe) -> None:
    path = recipe()
    content = yaml.safe_load(path.read_text())
    del content["optimiser"]["steps"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(EasyRefError, match=r"optimiser\.steps is missing"):
        load_settings(path)


def test_a_tracker_that_is_not_installed_is_named(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyref_core.training.check_settings.find_spec", lambda name: None)
    with pytest.raises(EasyRefError, match="not installed: pip install wandb"):
        load_settings(recipe(), ["output.trackers=[wandb]"])


def test_fp16_is_refused_on_a_cpu(recipe: Recipe) -> None:
    pytest.importorskip("accelerate")
    from easyref_core.training.loop import train

    with pytest.raises(EasyRefError, match="fp16 needs a GPU"):
        train(load_settings(recipe(), ["optimiser.precision=fp16"]))


@pytest.mark.parametrize("content", [b"[1, 2]", b"a: [", b"", b"\xff\xfe"])
def test_files_that_are_not_recipes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(EasyRefError, match="recipe"):
        load_settings(path)


def test_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match=r"There is no recipe .*none\.yaml"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(path.read_text())
    for folder in (content["model"]["base"], content["model"]["mllm"]):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for file in (*content["data"]["files"], content["model"].get("adapter", "none")):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    settings: Settings = load_settings(path)
    parts = settings.optimiser.parts
    assert ("identity" in parts) == (settings.stage == "identity")
    if "cross_attention" not in parts:
        assert parts in (("layer_pooling",), ("identity",))
        assert settings.model.aggregation == "dla"
    else:  # the official stages
        rates = {"alignment": 1e-4, "single_reference": 4e-5, "multi_reference": 2e-5}
        assert settings.optimiser.learning_rate == rates[settings.stage]
        assert ("mllm" in parts) == (settings.stage != "alignment")
