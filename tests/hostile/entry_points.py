"""The ways in without ComfyUI, as functions that a child of the fork server runs on a home's files.

What they return is plain.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from goldens import ADAPTER, IMAGE_SIZE, MLLM, expected
from homes import PROMPT, Home

from easyref_core.errors import EasyRefError

SIZE = IMAGE_SIZE


def prepare(comfyui: str | None, base: str | None, training: bool) -> None:
    """Import what children need, once."""
    import easyref_core
    import easyref_core.cli
    import easyref_core.encode.passes

    torch.set_num_threads(1)
    # What is imported on first use: much of transformers, and of torch for tensors without data.
    easyref_core.PromptTokenizer.from_directory(MLLM)
    easyref_core.plan_encoder(easyref_core.load_checkpoint(ADAPTER), MLLM).build()
    if training:
        import bench_entry_points

        import easyref_core.training.loop

        bench_entry_points.prepare()
    if comfyui is not None:
        import comfy_entry_points

        comfy_entry_points.prepare(comfyui, base)


# Python


def python_encode(base: str) -> Any:
    """The adapter with the MLLM on the picture; tokens must be those of the golden set."""
    from easyref_core import encode_references

    plan, group = _planned(Home(Path(base)))
    return _summary(encode_references(plan.build(), group))


def _planned(home: Home) -> tuple[Any, Any]:
    """The plans of the home's encoder and of its picture as a group."""
    from easyref_core import (
        PromptTokenizer,
        Reference,
        load_checkpoint,
        open_picture,
        plan_encoder,
        plan_group,
    )

    plan = plan_encoder(load_checkpoint(home.adapter), home.mllm)
    tokenizer = PromptTokenizer.from_directory(home.mllm)
    references = [Reference(open_picture(home.picture))]
    return plan, plan_group(plan, tokenizer, references, PROMPT, image_size=SIZE)


def cut(path: Path) -> None:
    """Cut a file off after its first kilobyte, in place; reading what was mapped ends in SIGBUS."""
    with path.open("r+b") as file:
        file.truncate(1_000)


def python_cut(base: str, *parts: str) -> Any:
    """Cut a file of the home off while an encoder that was built from it is in use."""
    from easyref_core import encode_references

    home = Home(Path(base))
    plan, planned = _planned(home)
    encoder = plan.build()
    cut(home.base.joinpath(*parts))
    return _summary(encode_references(encoder, planned))


def python_layers(base: str) -> Any:
    """Keys, values and LoRA of the adapter."""
    from easyref_core import load_checkpoint, load_tokens
    from easyref_core.adapter.key_values import (
        identity_lora_weights,
        lora_weights,
        project_tokens,
    )

    home = Home(Path(base))
    checkpoint = load_checkpoint(home.adapter)
    project_tokens(checkpoint, load_tokens(home.tokens))
    return {
        "lora": len(lora_weights(checkpoint)),
        "identity_lora": len(identity_lora_weights(checkpoint)),
    }


def python_tokens(base: str) -> Any:
    from easyref_core import load_tokens

    tokens = load_tokens(Home(Path(base)).tokens)
    return {"finite": bool(tokens.cond.isfinite().all() and tokens.uncond.isfinite().all())}


def python_picture(base: str) -> Any:
    from easyref_core import open_picture

    picture = open_picture(Home(Path(base)).picture)
    return {"size": list(picture.size), "mode": picture.mode}


def _summary(tokens: Any) -> Any:
    """How far the tokens are from those of the golden adapter with its own MLLM, or without it."""
    wanted = (expected()[f"{tag}.one_ref_prompt.tokens"] for tag in ("full", "adapter_only"))
    difference = min(float((tokens.cond - golden).abs().max()) for golden in wanted)
    return {"difference": difference, "adapter": tokens.adapter}


# The command line


def command(base: str, *arguments: str) -> Any:
    """`easyref` with these arguments; BASE in them stands for the home."""
    from easyref_core.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([argument.replace("BASE", base) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
    if status == 1:
        raise EasyRefError(err.getvalue().strip().rpartition("easyref: ")[2])
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


def command_inspect(base: str) -> Any:
    return command(base, "inspect", str(Home(Path(base)).adapter))


def command_encode(base: str, *more: str) -> Any:
    home = Home(Path(base))
    given = ["encode", str(home.picture), "--adapter", str(home.adapter), "--mllm", str(home.mllm)]
    given += ["--image-size", str(SIZE), "--prompt", PROMPT]
    return command(base, *given, "--out", f"{base}/output/tokens.safetensors", *more)


def command_train(base: str, *more: str) -> Any:
    return command(base, "train", f"{base}/recipe.yaml", *more)
