"""`easyref convert`: other dtypes, with and without the MLLM, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import ADAPTER, BODY, MLLM
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.convert import DTYPES, convert_adapter
from easyref_core.adapter.key_values import lora_weights, project_tokens
from easyref_core.cli import main
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

FOUR = "four_refs_prompt"
UNUSED = "multimodal_llm.lm_head.weight"


def convert(to: Path, source: Path = ADAPTER, dtype: str | None = None, **options: Any) -> Path:
    return convert_adapter(load_checkpoint(source), to, dtype, **options)


def used() -> goldens.Tensors:
    """The golden adapter's tensors, without the head of the language model."""
    return goldens.without(goldens.adapter_tensors(), UNUSED)


def same(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one
    )


def test_without_a_dtype_every_weight_stays_as_it_is(tmp_path: Path) -> None:
    made = convert(tmp_path / "made" / "a.safetensors")
    assert load_file(ADAPTER).keys() - load_file(made).keys() == {UNUSED}
    assert same(made, goldens.write(tmp_path / "b.safetensors", used()))
    assert load_checkpoint(made).identity == load_checkpoint(ADAPTER).identity


def test_without_the_mllm_and_whole_again_nothing_is_lost(tmp_path: Path) -> None:
    small = convert(tmp_path / "small.safetensors", mllm={})
    found = load_checkpoint(small)
    assert not found.has_mllm
    assert not any(name.startswith(BODY) for name in load_file(small))
    assert found.identity == load_checkpoint(ADAPTER).identity
    config = plan_encoder(load_checkpoint(ADAPTER), MLLM).config
    body = goldens.mllm_directory(tmp_path / "mllm", config, goldens.bare_mllm(used()))
    again = convert(tmp_path / "again.safetensors", small, mllm=plan_encoder(found, body).sources)
    assert same(again, goldens.write(tmp_path / "b.safetensors", used()))


@pytest.mark.parametrize(
    ("dtype", "near"), [("bfloat16", 0.02), ("float16", 2e-3), ("fp8", 0.08), ("int8", 0.02)]
)
def test_another_dtype_gives_about_the_same(
    tmp_path: Path, tokenizer: PromptTokenizer, dtype: str, near: float
) -> None:
    made = convert(tmp_path / "a.safetensors", dtype=dtype)
    checkpoint, before = load_checkpoint(made), load_checkpoint(ADAPTER)
    share = {"fp8": 0.36, "int8": 0.38}.get(dtype, 0.52)
    assert made.stat().st_size < share * ADAPTER.stat().st_size
    for old, new in zip(
        lora_weights(before).values(), lora_weights(checkpoint).values(), strict=True
    ):
        assert float((new.float() - old).norm() / old.norm()) < near
    cond = torch.randn(1, 16, before.token_width, generator=torch.Generator().manual_seed(1))
    layers = [
        project_tokens(c, ReferenceTokens(cond, cond, "")).layers for c in (before, checkpoint)
    ]
    for name, (key, _) in layers[0].items():
        assert 0 < float((layers[1][name][0] - key).norm() / key.norm()) < near
    group, size = goldens.references(FOUR), {"image_size": goldens.IMAGE_SIZE}
    encoder = plan_encoder(checkpoint, MLLM).build()
    found = goldens.encode(encoder, tokenizer, group, goldens.user_prompt(FOUR), **size).cond
    wanted = goldens.expected()[f"full.{FOUR}.tokens"]
    assert float((found - wanted).norm() / wanted.norm()) < 4 * near


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_one_byte_weights_are_copied_with_their_scales(tmp_path: Path, dtype: str) -> None:
    first = convert(tmp_path / "a.safetensors", dtype=dtype)
    assert same(convert(tmp_path / "b.safetensors", first), first)
    kinds = {t.dtype for n, t in load_file(first).items() if n.endswith("to_k_ip.weight")}
    assert kinds == {{"fp8": torch.float8_e4m3fn, "int8": torch.int8}[dtype]}
    wide = load_file(convert(tmp_path / "c.safetensors", first, "float32"))
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert not any("scale" in name or "quant" in name for name in wide)


@pytest.mark.parametrize(("dtype", "most"), [("fp8", 0.04), ("int8", 0.5001 / 127)])
def test_each_row_has_a_scale_of_its_own(tmp_path: Path, dtype: str, most: float) -> None:
    tensors = goldens.adapter_tensors()
    name = next(n for n in tensors if n.endswith("to_k_ip.weight"))
    tensors[name][0] *= 1e4
    tensors[name][1] = 0
    source = goldens.write(tmp_path / "a.safetensors", tensors)
    made = convert(tmp_path / "b.safetensors", source, dtype)
    with load_checkpoint(made).file.open() as get:
        found = get(name)
    error = (found - tensors[name]).abs().amax(dim=1)
    assert (error <= tensors[name].abs().amax(dim=1) * most).all()


def test_metadata_stay(tmp_path: Path) -> None:
    source = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors(), image_size="112")
    assert load_checkpoint(convert(tmp_path / "b.safetensors", source, "fp8")).image_size == 112


def test_pools_of_layers_stay(tmp_path: Path) -> None:
    source = goldens.write(tmp_path / "a.safetensors", goldens.pooled_adapter("dla", "lap"))
    for dtype in (None, *DTYPES):
        made = load_checkpoint(convert(tmp_path / f"{dtype}.safetensors", source, dtype))
        assert made.aggregations == ("dla", "lap")
        plan_encoder(made, MLLM).build()


def test_a_weight_that_overflows_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    tensors = goldens.adapter_tensors()
    name = next(n for n in tensors if n.endswith("to_v_ip.weight"))
    tensors[name][0, 0] = 1e6
    source = goldens.write(tmp_path / "a.safetensors", tensors)
    with goldens.refused(name, "overflows in float16", "bfloat16"):
        convert(tmp_path / "b.safetensors", source, "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    convert(tmp_path / "b.safetensors", source, "bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "fp8", "int8"])
def test_a_weight_that_is_not_a_number_is_named(tmp_path: Path, dtype: str) -> None:
    tensors = goldens.adapter_tensors()
    name = "mllm_final_layer.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    source = goldens.write(tmp_path / "a.safetensors", tensors)
    with goldens.refused(name, "not numbers"):
        convert(tmp_path / "b.safetensors", source, dtype)


def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    source = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors())
    with goldens.refused("a.safetensors"):
        convert(source, source, overwrite=True)
    made = convert(tmp_path / "b.safetensors", source)
    with goldens.refused("b.safetensors exists", "--overwrite"):
        convert(made, source)
    convert(made, source, "bfloat16", overwrite=True)
    other = tmp_path / "c.safetensors"
    other.write_text("notes")
    with goldens.refused("something else than an EasyRef adapter"):
        convert(other, source, overwrite=True)
    with goldens.refused("no dtype 'int4'", ", ".join(DTYPES)):
        convert(tmp_path / "d.safetensors", source, "int4")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, whole = tmp_path / "small.safetensors", tmp_path / "whole.safetensors"
    arguments = ["convert", str(ADAPTER), "--without-mllm", "--dtype", "bfloat16"]
    assert main([*arguments, "--out", str(small)]) == 0
    assert capsys.readouterr().out == f"{small}\n"
    assert main(["convert", str(small), "--mllm", str(MLLM), "--out", str(whole)]) == 0
    assert load_checkpoint(whole).has_mllm
    assert main(["inspect", str(small)]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert main([*arguments, "--out", str(small)]) == 1
    assert "--overwrite" in capsys.readouterr().err
