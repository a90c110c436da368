"""The command `easyref` encodes and inspects without ComfyUI, and refuses in one sentence."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from PIL import Image

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.cli import main
from easyref_core.encode.group import Reference
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens, load_tokens

REFS = [str(goldens.GOLDEN / "refs" / f"ref_{i}.png") for i in range(4)]
Capture = pytest.CaptureFixture[str]


def arguments(out: Path, images: list[str], **options: Any) -> list[str]:
    given = {"adapter": goldens.ADAPTER, "mllm": goldens.MLLM, "image-size": "84", "out": out}
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    return ["encode", *(f"--{name}={value}" for name, value in given.items()), *images]


@pytest.mark.parametrize(
    ("case", "count"), [("one_ref_prompt", 1), ("four_refs_prompt", 4), ("four_refs_empty", 4)]
)
def test_encode_writes_the_golden_tokens(
    tmp_path: Path, capsys: Capture, checkpoint: AdapterCheckpoint, case: str, count: int
) -> None:
    out, prompt = tmp_path / "made" / "tokens.safetensors", goldens.user_prompt(case)
    assert main(arguments(out, REFS[:count], prompt=prompt)) == 0
    found, wanted = load_tokens(out), goldens.expected()
    assert goldens.difference(found.cond, wanted[f"full.{case}.tokens"]) <= 1e-4
    assert goldens.difference(found.uncond, wanted["full.uncond_black.tokens"]) <= 1e-4
    assert (found.prompt, found.num_references) == (prompt, count)
    assert (found.adapter[:16], found.adapter_name) == (checkpoint.identity, checkpoint.name)
    assert checkpoint.made(found.adapter)
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    total = count + 1 + 2 * 4
    assert printed.err.split("\r")[1:] == [
        f"encoding {i}/{total}" + ("\n" if i == total else "") for i in range(1, total + 1)
    ]


def test_options_reach_the_encoder(tmp_path: Path) -> None:
    def made(name: str, images: list[str], **options: Any) -> ReferenceTokens:
        out = tmp_path / f"{name}.safetensors"
        assert main(arguments(out, images, **options)) == 0
        return load_tokens(out)

    joined = made("joined", REFS[:2], aggregation="concatenate", insert_before="2")
    assert (joined.num_tokens, joined.aggregation, joined.prompt) == (32, "concatenate", "")
    half = made("half", REFS[:1], dtype="bfloat16").cond
    full = made("full", REFS[:1]).cond
    rounded = made("rounded", REFS[:1], dtype="int8").cond
    sizes = [made(size, REFS[:1], image_size=size).cond for size in ("0", "336")]
    assert torch.equal(*sizes)
    for other in (half, rounded):
        assert 0 < float((other - full).norm() / full.norm()) < 0.05
    assert not torch.equal(half, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_in_fewer_bytes_are_read_as_they_are_and_computed_with_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    whole = {
        name: tensor.to(dtype if dtype.itemsize == 2 or tensor.ndim > 1 else torch.bfloat16)
        for name, tensor in goldens.pooled_adapter("dla").items()
    }
    stored = goldens.write(tmp_path / "stored.safetensors", whole)
    wide = {name: tensor.float() for name, tensor in whole.items()}
    wide = goldens.write(tmp_path / "wide.safetensors", wide)
    built, build = [], EncoderPlan.build
    monkeypatch.setattr(
        EncoderPlan, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1]
    )
    found = []
    for number, adapter in enumerate((stored, wide)):
        out = tmp_path / f"{number}.safetensors"
        options = {"adapter": adapter, "aggregation": "dla", "prompt": "a red car"}
        assert main(arguments(out, REFS[:2], **options)) == 0
        found.append(load_tokens(out).cond)
    assert torch.equal(*found)
    small, large = ({t.dtype for t in encoder.parameters()} for encoder in built)
    assert (dtype in small, large) == (True, {torch.float32})


def test_layers_are_pooled_and_weighed_as_asked(tmp_path: Path, capsys: Capture) -> None:
    adapter = goldens.write(tmp_path / "pooled.safetensors", goldens.pooled_adapter("dla"))

    def made(name: str, **options: str) -> ReferenceTokens:
        out = tmp_path / f"{name}.safetensors"
        assert main(arguments(out, REFS[:2], adapter=adapter, **options)) == 0
        return load_tokens(out)

    plain, even = made("plain"), made("even", aggregation="dla", mllm_layers="even")
    early = made("early", aggregation="dla", mllm_layers="early", picture_layers="0,1,1")
    text = made("text", aggregation="dla", text_layers="0,1")
    found = [plain.cond, even.cond, early.cond, text.cond]
    assert all(goldens.difference(a, b) > 0 for a, b in itertools.combinations(found, 2))
    assert {t.adapter for t in (plain, even, early, text)} == {plain.adapter}
    capsys.readouterr()
    assert main(["inspect", str(adapter)]) == 0
    assert "layer pooling           dla (blocks)" in capsys.readouterr().out


def broken_picture(folder: Path) -> str:
    path = folder / "broken.png"
    path.write_bytes(Path(REFS[0]).read_bytes()[:60])
    return str(path)


def long_picture(folder: Path) -> str:
    Image.new("RGB", (500, 2)).save(folder / "long.png")
    return str(folder / "long.png")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": "nothing.safetensors"}, "no weight file nothing.safetensors"),
        ({"adapter": REFS[0]}, "neither a safetensors nor a PyTorch file"),
        ({"mllm": "nowhere"}, "no MLLM directory nowhere"),
        ({"mllm": str(goldens.UNET)}, "describes a model of type nothing"),
        ({"image_size": "20"}, "image_size is 20"),
        ({"aggregation": "sum"}, "no aggregation 'sum'"),
        ({"aggregation": "dla"}, "easyref.safetensors has no weights for aggregation 'dla'"),
        ({"mllm_layers": "loud"}, "no preset 'loud'"),
        ({"mllm_layers": "early"}, "'easyref' reads the last layer alone"),
        ({"text_layers": "1,x"}, "--text-layers is '1,x'"),
        ({"picture_layers": "1,-2"}, "from 0 to 10"),
        ({"insert_before": "9"}, "last 9 layers"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
        ({"images": "nothing.png"}, "no picture nothing.png"),
        ({"images": broken_picture}, "broken.png"),
        ({"images": long_picture}, "long.png: the picture is 500x2"),
        ({"out": str(Path(REFS[0]) / "tokens.safetensors")}, "cannot be written"),
        ({"out": "tokens"}, "Name it tokens.safetensors"),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_file(
    tmp_path: Path, capsys: Capture, options: dict, said: str
) -> None:
    out = tmp_path / "out" / "tokens.safetensors"
    images = options.pop("images", REFS[0])
    images = images(tmp_path) if callable(images) else images
    assert main(arguments(**{"out": out, "images": [images], **options})) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("easyref: ")
    assert said in last
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_missing_mllm_is_asked_for(tmp_path: Path, capsys: Capture) -> None:
    given = [a for a in arguments(tmp_path / "out", REFS[:1]) if not a.startswith("--mllm")]
    assert main(given) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("easyref: ")
    assert "--mllm" in printed.err


def test_inspect_refuses_too(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").touch()
    assert main(["inspect", str(tmp_path / "empty")]) == 1
    assert "is empty (0 bytes)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["encode"],
        ["encode", "--out", "x", "--adapter", "y"],
        ["juggle"],
        ["inspect", "x", "a=1"],
        ["train", "x", "--fast", "a=1"],
    ],
)
def test_unfit_arguments_show_the_usage(capsys: Capture, given: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(given)
    assert raised.value.code == 2
    assert "usage: easyref" in capsys.readouterr().err


def test_settings_of_a_recipe_may_stand_behind_options(capsys: Capture) -> None:
    pytest.importorskip("diffusers")
    recipe = str(Path(__file__).parents[2] / "recipes" / "1_alignment.yaml")
    for given in (["seed=x", "--dry-run"], ["--dry-run", "seed=x"], ["seed=x"]):
        assert main(["train", recipe, *given]) == 1
        assert "seed must be of type int" in capsys.readouterr().err


def test_interrupting_ends_quietly(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("easyref_core.adapter.checkpoint.load_checkpoint", interrupted)
    assert main(["inspect", str(goldens.ADAPTER)]) == 130
    assert capsys.readouterr().err == "easyref: interrupted\n"


def commands() -> list[list[str]]:
    script = shutil.which("easyref", path=str(Path(sys.executable).parent))
    return [[sys.executable, "-m", "easyref_core.cli"], *([[script]] if script else [])]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=lambda c: Path(c[0]).stem)
def test_command_from_the_shell(command: list[str], tmp_path: Path) -> None:
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("usage: easyref", "inspect", "encode"))
    refused = subprocess.run(
        [*command, "inspect", "nothing"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "easyref: There is no weight file nothing. Check the name and the folder.\n"
    )


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 20}, "image_size is 20"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"aggregation": "sum"}, "no aggregation 'sum'"),
        ({"insert_before": 9}, "last 9 layers"),
        ({"image_size": 3000}, "the MLLM would read"),
        ({"out": REFS[0] + "/tokens.safetensors"}, "cannot be written"),
        ({"out": new_folder}, "cannot be written"),
    ],
)
def test_the_command_refuses_before_it_reads_weights(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, options: dict, said: str
) -> None:
    monkeypatch.setattr(EncoderPlan, "build", lambda *_, **__: pytest.fail("read weights"))
    out = options.get("out", tmp_path / "new" / "tokens.safetensors")
    out = out(tmp_path / "folder.safetensors") if callable(out) else out
    assert main(arguments(out, REFS, **{k: v for k, v in options.items() if k != "out"})) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("easyref: ")
    assert said in printed
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_holds_no_full_size_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are resized when opened, which changes no bit of the tokens."""
    large = [str(tmp_path / f"{side}.png") for side in (500, 900)]
    for path, side in zip(large, (500, 900), strict=True):
        noise = Image.effect_noise((side, 700), 90).convert("RGB")
        noise.save(path)
    sides: list[int] = []

    def noted(*given: Any, **options: Any) -> Any:
        sides.extend(max(reference.picture.size) for reference in given[1].references)
        return encode_references(*given, **options)

    monkeypatch.setattr("easyref_core.encode.passes.encode_references", noted)
    assert main(arguments(tmp_path / "tokens.safetensors", large)) == 0
    assert max(sides) < 200
    encoder = plan_encoder(load_checkpoint(goldens.ADAPTER), goldens.MLLM).build()
    whole = [Reference(Image.open(path)) for path in large]
    tokenizer = PromptTokenizer.from_directory(goldens.MLLM)
    wanted = goldens.encode(encoder, tokenizer, whole, "", image_size=84)
    assert torch.equal(load_tokens(tmp_path / "tokens.safetensors").cond, wanted.cond)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [True, False])
def test_no_input_is_replaced_by_tokens(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.setattr(EncoderPlan, "build", lambda *_, **__: pytest.fail("read weights"))
    adapter, mllm = tmp_path / "adapter.safetensors", tmp_path / "mllm"
    shutil.copyfile(goldens.ADAPTER, adapter)
    shutil.copytree(goldens.MLLM, mllm)
    picture = tmp_path / "picture.safetensors"  # what a picture is does not depend on its name
    shutil.copyfile(REFS[0], picture)
    other = tmp_path / "other.safetensors"
    shutil.copyfile(goldens.ADAPTER, other)
    (tmp_path / "link.safetensors").symlink_to(adapter)
    before = content(tmp_path)
    for out, said in (
        (adapter, "which is read"),
        (tmp_path / "link.safetensors", "which is read"),
        (picture, "which is read"),
        (mllm / "model.safetensors", "which is read"),
        (mllm / "new.safetensors", "which is read"),
        (other, "something else than reference tokens"),
    ):
        given = arguments(out, [str(picture)], adapter=adapter, mllm=mllm)
        assert main([*given, *(["--overwrite"] if overwrite else [])]) == 1
        assert said in capsys.readouterr().err
    assert content(tmp_path) == before


def test_tokens_are_replaced_only_where_that_was_asked_for(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tokens.safetensors"
    assert main(arguments(out, REFS[:1])) == 0
    first = load_tokens(out)
    assert main([*arguments(out, REFS[:1], prompt="a hat"), "--overwrite"]) == 0
    second = load_tokens(out)
    assert (first.prompt, second.prompt) == ("", "a hat")
    monkeypatch.setattr(EncoderPlan, "build", lambda *_, **__: pytest.fail("read weights"))
    assert main(arguments(out, REFS[:1])) == 1
    assert "tokens.safetensors exists" in capsys.readouterr().err.splitlines()[-1]
    assert load_tokens(out).prompt == "a hat"


def test_names_are_printed_without_control_characters(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a\x1b[2Jb\n.safetensors"
    assert main(["inspect", str(path)]) == 1
    shutil.copyfile(goldens.ADAPTER, path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert r"a\x1b[2Jb\n.safetensors" in text
        assert "\x1b" not in text


@pytest.mark.parametrize("step", ["open_picture", "build", "encode"])
def test_lack_of_memory_is_one_sentence(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise MemoryError

    name = {
        "open_picture": "easyref_core.pictures.loading.open_picture",
        "build": "easyref_core.encode.plan_encoder.EncoderPlan.build",
        "encode": "easyref_core.encode.passes.encode_references",
    }[step]
    monkeypatch.setattr(name, run_out)
    assert main(arguments(tmp_path / "tokens.safetensors", REFS)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("easyref: cpu has not enough memory (")
    assert "--dtype bfloat16 or int8" in said


def test_another_error_is_not_taken_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(EncoderPlan, "build", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main(arguments(tmp_path / "tokens.safetensors", REFS))
