"""Parts of the demo that need no ComfyUI: workflows, references, the sheet, a server that dies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from easyref_core.demo_set import score_model
from easyref_core.errors import EasyRefError
from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo import predictions, run
from workshop.demo.dataset.characters import ATTRIBUTES, Identity
from workshop.demo.dataset.groups import Style
from workshop.demo.dataset.splits import identities, styles
from workshop.demo.evaluation.classifier import (
    CLASSIFIER_FILE,
    Classifier,
    Prediction,
    save_classifier,
)
from workshop.demo.predictions import attribute_table, summary
from workshop.demo.references import GROUPS, Group, draw_row, read_rows
from workshop.demo.rows import DemoImages, DemoInputs, Row, RowImages, SamplingSettings
from workshop.demo.sheet import draw_sheet, fact_words
from workshop.demo.workflow import (
    DEMO_NODE,
    EXAMPLE,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    set_prompts,
    use_demo_models,
    with_identity,
    with_references,
    without_easyref,
    without_nodes,
)
from workshop.demo.workflow import WORKFLOWS as FOLDER
from workshop.templates.template_pictures import SCENES
from workshop.templates.thumbnail import write_thumbnail

SCORES = {"EasyRefScore", "PreviewAny"}
WORKFLOWS = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))

ROUND = Identity("round", "teal", "plain", "single", "crown")


def links(graph: Graph) -> list[list[object]]:
    return [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_demo_models_replace_all_loaders_and_nothing_else(name: str) -> None:
    graph = load_workflow(name)
    changed = use_demo_models(graph)
    classes = {node["class_type"] for node in changed.values()}
    loaders = {"CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader", "LoraLoader"}
    assert not loaders & classes
    only_node(changed, "EasyRefDemoModels")
    assert {link[0] for link in links(changed)} <= changed.keys()
    if score_model("clip") is None:
        loaders |= SCORES
    untouched = {n: graph[n]["class_type"] for n in graph if graph[n]["class_type"] not in loaders}
    assert {n: changed[n]["class_type"] for n in changed if n != DEMO_NODE} == untouched
    latents = [n["inputs"] for n in changed.values() if n["class_type"] == "EmptyLatentImage"]
    small = {"width": 128, "height": 128, "batch_size": 1}
    assert all(latent == small for latent in latents)
    assert graph == load_workflow(name)


@pytest.mark.parametrize("shipped", [False, True])
def test_scores_are_left_out_unless_the_demo_has_models_for_them(
    monkeypatch: pytest.MonkeyPatch, shipped: bool
) -> None:
    found = FOLDER if shipped else None
    monkeypatch.setattr("workshop.demo.workflow.score_model", lambda name: found)
    changed = use_demo_models(load_workflow("easyref_score"))
    assert ({node["class_type"] for node in changed.values()} >= SCORES) == shipped
    assert {link[0] for link in links(changed)} <= changed.keys()
    if shipped:
        inputs = changed[only_node(changed, "EasyRefScore")]["inputs"]
        assert (inputs["clip_model"], inputs["dino_model"]) == ("demo", "demo")


def test_each_loader_output_is_replaced_by_one_of_the_demo_models() -> None:
    graph = use_demo_models(load_workflow("easyref_controlnet"))
    demo = only_node(graph, "EasyRefDemoModels")
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_class["EasyRefDemoModels"] == {}
    assert by_class["KSampler"]["latent_image"] == [only_node(graph, "EmptyLatentImage"), 0]
    assert by_class["EasyRefApply"]["model"] == [demo, 0]
    assert by_class["CLIPTextEncode"]["clip"] == [demo, 1]
    assert by_class["VAEDecode"]["vae"] == [demo, 2]
    assert by_class["EasyRefEncode"]["easyref"] == [demo, 3]
    assert by_class["ControlNetApplyAdvanced"]["control_net"] == [demo, 4]


def test_a_lora_is_left_out_with_the_loaders() -> None:
    graph = use_demo_models(load_workflow("easyref_with_lora"))
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_class["EasyRefApply"]["model"] == [DEMO_NODE, 0]
    assert by_class["CLIPTextEncode"]["clip"] == [DEMO_NODE, 1]


def test_without_easyref_the_model_goes_straight_to_the_sampler() -> None:
    graph = without_easyref(load_workflow("easyref_character"))
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert "EasyRefApply" not in by_class
    assert by_class["KSampler"]["model"] == [only_node(graph, "CheckpointLoaderSimple"), 0]


def test_setting_an_input_needs_one_node_of_the_class() -> None:
    graph = load_workflow("easyref_character")
    sampler = only_node(graph, "KSampler")
    assert set_inputs(graph, "KSampler", seed=9)[sampler]["inputs"]["seed"] == 9
    assert graph[sampler]["inputs"]["seed"] != 9
    with pytest.raises(EasyRefError, match="2 nodes of class CLIPTextEncode"):
        set_inputs(graph, "CLIPTextEncode", text="")


def test_the_prompts_of_a_workflow_are_set() -> None:
    graph = set_prompts(load_workflow("easyref_character"), "on a beach by day", "rain")
    texts = [n["inputs"]["text"] for n in graph.values() if n["class_type"] == "CLIPTextEncode"]
    prompt = only_node(graph, "PrimitiveStringMultiline")
    assert graph[prompt]["inputs"]["value"] == "on a beach by day"
    assert sorted(texts, key=str) == [[prompt, 0], "rain"]


def test_a_node_is_taken_out_of_its_line() -> None:
    graph = without_nodes(load_workflow("easyref_controlnet"), "Canny", "image")
    source = graph[only_node(graph, "ControlNetApplyAdvanced")]["inputs"]["image"]
    assert graph[source[0]]["inputs"]["image"] == EXAMPLE


@pytest.mark.parametrize("count", [1, 4])
def test_a_workflow_takes_as_many_references_as_there_are(count: int) -> None:
    names = [f"picture_{number}.png" for number in range(count)]
    before = load_workflow("easyref_controlnet")
    graph = with_references(before, names)
    inputs = graph[only_node(graph, "EasyRefReferences")]["inputs"]
    slots = [f"images.image_{number}" for number in range(1, count + 1)]
    assert inputs.keys() == {"weight", "gallery", *slots}
    assert [graph[inputs[slot][0]]["inputs"]["image"] for slot in slots] == names
    assert {link[0] for link in links(graph)} <= graph.keys()
    shown = {n["inputs"]["image"] for n in graph.values() if n["class_type"] == "LoadImage"}
    assert shown == {*names, EXAMPLE}
    assert before == load_workflow("easyref_controlnet")


def test_each_group_of_a_workflow_takes_its_own_references() -> None:
    before = load_workflow("easyref_two_people")
    graph = with_references(before, ["a.png", "b.png"], ["c.png"])
    groups = [n["inputs"] for n in graph.values() if n["class_type"] == "EasyRefReferences"]
    files = [
        [graph[value[0]]["inputs"]["image"] for value in inputs.values() if isinstance(value, list)]
        for inputs in groups
    ]
    assert files == [["a.png", "b.png"], ["c.png"]]
    with pytest.raises(EasyRefError, match="has 2 EasyRef References"):
        with_references(before, ["a.png"])


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_the_demos_characters_and_style_are_held_out(group: Group) -> None:
    _, held_out = styles() if isinstance(group.shared, Style) else identities()
    assert group.shared in held_out


def test_the_shipped_references_are_the_drawn_ones() -> None:
    shipped = {row.name: row for row in read_rows()}
    assert list(shipped) == [group.name for group in GROUPS]
    for group in (GROUPS[0], GROUPS[3], GROUPS[5]):  # one of each kind
        drawn, read = draw_row(group), shipped[group.name]
        assert (read.kind, read.prompt, read.facts) == (drawn.kind, drawn.prompt, drawn.facts)
        pairs = zip(drawn.references, read.references, strict=True)
        for ours, theirs in ((drawn.outline, read.outline), *pairs):
            assert ours.size == theirs.size
            # Another Pillow may round an edge differently.
            assert max(ImageStat.Stat(ImageChops.difference(ours, theirs)).mean) < 1


def test_prompts_do_not_name_what_references_share() -> None:
    for row in read_rows():
        in_prompt = ("shape",) if row.kind == "style" else ("place", "time")
        shared = {value for name, value in row.facts.items() if name not in in_prompt}
        assert not any(value in row.prompt for value in shared)
        assert len(row.references) == 4


def test_missing_references_are_named(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="Draw the references again"):
        read_rows(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps({"a": {"kind": "identity"}}))
    with pytest.raises(EasyRefError, match="'prompt'"):
        read_rows(tmp_path)


def test_facts_are_described_in_words() -> None:
    facts = {a: getattr(ROUND, a) for a in ATTRIBUTES} | {"place": "sea", "time": "day"}
    row = Row("a", "identity", "at sea by day", (), Image.new("RGB", (8, 8)), facts)
    assert fact_words(row) == "teal round, a single eye, crown"
    assert fact_words(read_rows()[5]) == "blue and pink checks on yellow"


def test_the_sheet_and_its_images_are_written(tmp_path: Path) -> None:
    rows = read_rows()[3:]
    greys = [Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 60, 120, 180, 240)]
    images = DemoImages((RowImages(*greys),) * 3, made_by="a test")
    predicted = [dict.fromkeys(images.rows[0].named(), star_by_day("star", "day"))] * 3
    sheet = run.write_results(DemoInputs(rows), images, predicted, tmp_path)
    assert Image.open(sheet).width > 1000
    for row in rows:
        assert len(list((tmp_path / row.name).glob("*.png"))) == 10


def test_the_sheet_has_a_column_for_identity_where_there_are_images_of_it() -> None:
    rows = read_rows()[:2]
    grey, green = Image.new("RGB", (64, 64), (128,) * 3), Image.new("RGB", (64, 64), (0, 255, 0))
    without = RowImages(*[grey] * 5)
    sheets = []
    for images in (without, replace(without, identity=green)):
        predicted = [dict.fromkeys(images.named(), star_by_day("star", "day"))] * 2
        sheets.append(draw_sheet(DemoInputs(rows), DemoImages((images,) * 2, "a test"), predicted))
    narrow, wide = sheets
    assert wide.width > narrow.width + 200
    greens = [bytes((0, 255, 0)) * 200 in sheet.tobytes() for sheet in sheets]
    assert greens == [False, True]


def test_identity_goes_between_easyref_apply_and_the_sampler() -> None:
    graph = load_workflow("easyref_character")
    apply, sampler = only_node(graph, "EasyRefApply"), only_node(graph, "KSampler")
    changed = with_identity(graph, 0.5, 0.14)
    node = changed[only_node(changed, "EasyRefIdentity")]["inputs"]
    assert node["model"] == [apply, 0]
    assert changed[sampler]["inputs"]["model"] == [only_node(changed, "EasyRefIdentity"), 0]
    assert node["references"] == graph[only_node(graph, "EasyRefEncode")]["inputs"]["references"]
    assert (node["weight"], node["start_percent"], node["end_percent"]) == (0.5, 0.14, 1.0)
    assert "EasyRefIdentity" not in {n["class_type"] for n in graph.values()}


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_thumbnail_is_drawn_of_any_template(tmp_path: Path, count: int) -> None:
    references = read_rows()[0].references[:count]
    target = tmp_path / "thumbnail.jpg"
    thumbnail = Image.open(write_thumbnail(references, references[0], "Title", "text", target))
    assert thumbnail.width > thumbnail.height >= 400
    assert target.stat().st_size < 70_000
    with pytest.raises(EasyRefError, match="cannot be written"):
        write_thumbnail(references, references[0], "a", "b", tmp_path / "absent" / "x.jpg")


def test_every_template_has_its_thumbnail() -> None:
    templates = {path.stem for path in FOLDER.glob("*.json")}
    assert {scene.file for scene in SCENES} == templates
    rows = {row.name: row for row in read_rows()}
    for scene in SCENES:
        assert scene.prompt in rows
        assert all(1 <= number <= 4 for row, number in scene.references if rows[row])


def star_by_day(shape: str, time: str) -> list[Prediction]:
    """Predictions for an image that should show a star by day."""
    return [Prediction("shape", "star", shape), Prediction("time", "day", time)]


def test_the_table_shows_expected_and_predicted_values() -> None:
    rows = [{"prompt_only": star_by_day("drop", "day"), "easyref": star_by_day("star", "day")}]
    lines = attribute_table(DemoInputs(read_rows()[:1]), rows).splitlines()
    assert [line.split() for line in lines] == [
        ["row", "attribute", "expected", "prompt_only", "easyref"],
        ["flower", "shape", "star", "drop", "="],
        ["flower", "time", "day", "=", "="],
        ["all", "correct", "1", "of", "2", "2", "of", "2"],
    ]


def test_a_run_writes_all_rows_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noise(inputs: DemoInputs) -> DemoImages:
        image = Image.effect_noise((64, 64), 80).convert("RGB")
        return DemoImages((RowImages(*[image] * 5),) * len(inputs.rows), "a test")

    save_classifier(Classifier(), tmp_path / CLASSIFIER_FILE)
    monkeypatch.setattr(predictions, "SHIPPED_CLASSIFIER", tmp_path / CLASSIFIER_FILE)
    monkeypatch.setattr(run, "OUT", tmp_path / "out")
    monkeypatch.setattr(run, "_make_images", noise)
    run.run_demo()
    printed = capsys.readouterr().out
    assert "expected" in printed
    assert f"{tmp_path / 'out' / 'sheet.png'}" in printed
    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(folders) == len(GROUPS)


def test_predictions_are_summed_up() -> None:
    assert summary(star_by_day("star", "day")) == "2 of 2"
    assert summary(star_by_day("drop", "day")) == "1 of 2, not shape"
    assert summary(star_by_day("drop", "night")) == "0 of 2, not shape and time"


def test_diffusers_samples_every_image_with_its_own_conditioning() -> None:
    pytest.importorskip("diffusers")
    from workshop.demo.diffusers_backend import make_images

    results = make_images(DemoInputs(read_rows()[:2], SamplingSettings(steps=2, side=64)))
    images = [image for row in results.rows for image in row.named().values()]
    assert [image.size for image in images] == [(64, 64)] * 12
    assert len({image.tobytes() for image in images}) == 12


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("print('a module is missing'); raise SystemExit(3)\n")
    with pytest.raises(ComfyUIError, match="ended with status 3") as caught:
        ComfyServer(comfyui, tmp_path / "base").start()
    assert "a module is missing" in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("import time; time.sleep(60)\n")
    server = ComfyServer(comfyui, tmp_path / "base", seconds=0.5)
    with pytest.raises(ComfyUIError, match="not ready after"):
        server.start()
    with pytest.raises(ComfyUIError, match="not running"):
        server.get("/system_stats")
