"""Many mutations of one file in one child: each is refused with a sentence, or used rightly."""

from __future__ import annotations

import io
import json
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from corpus import check_sentence
from entry_points import python_encode
from goldens import ADAPTER, MLLM, expected
from homes import Home, replaced
from mutations import mutated_bytes, mutated_json, mutated_safetensors

from easyref_core.errors import EasyRefError


def fuzz(base: str, target: str, first: str, count: str) -> Any:
    """Mutations `first` to `first + count`; a number makes the same mutation each time.

    Returns:
        How many were refused and used, the slowest in seconds, and what went wrong.
    """
    home = Home(Path(base))
    write, read = TARGETS[target]
    refused, used, slowest, failures = 0, 0, 0.0, []
    for number in range(int(first), int(first) + int(count)):
        write(home, Random(f"{target} {number}"))
        (home.base / "number").write_text(str(number))  # in case this process dies
        start = time.process_time()
        try:
            read(home)
            used += 1
        except EasyRefError as error:
            refused += 1
            try:
                check_sentence(str(error))
            except AssertionError as wrong:
                failures.append(f"{number}: {wrong}")
        except Exception:
            failures.append(f"{number}: {traceback.format_exc()}")
        slowest = max(slowest, time.process_time() - start)
    return {"refused": refused, "used": used, "slowest": slowest, "failures": failures[:20]}


def _write_adapter(home: Home, random: Random) -> None:
    replaced(home.adapter, mutated_safetensors(ADAPTER.read_bytes(), random))


def _read_adapter(home: Home) -> None:
    from easyref_core import load_checkpoint, load_tokens, plan_encoder
    from easyref_core.adapter.key_values import (
        identity_lora_weights,
        lora_weights,
        project_tokens,
    )

    checkpoint = load_checkpoint(home.adapter)
    checkpoint.report()
    plan_encoder(checkpoint, home.mllm).build()
    lora_weights(checkpoint)
    identity_lora_weights(checkpoint)
    tokens = load_tokens(home.tokens)
    if tokens.cond.shape[1:] == (checkpoint.num_tokens, checkpoint.token_width):
        project_tokens(checkpoint, tokens)


def _write_tokens(home: Home, random: Random) -> None:
    healthy = home.base / "healthy.safetensors"
    if not healthy.exists():
        home.tokens.rename(healthy)
    replaced(home.tokens, mutated_safetensors(healthy.read_bytes(), random))


def _read_tokens(home: Home) -> None:
    from easyref_core import load_tokens

    tokens = load_tokens(home.tokens)
    assert tokens.cond.isfinite().all()
    assert tokens.uncond.isfinite().all()


def _write_pickle(home: Home, random: Random) -> None:
    golden = expected()
    tensors = {"cond": golden["unet.ref_tokens"], "uncond": golden["unet.uncond_ref_tokens"]}
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=bool(random.randrange(2)))
    replaced(home.adapter, mutated_bytes(buffer.getvalue(), random))


def _read_pickle(home: Home) -> None:
    from easyref_core.weight_file import open_weight_file

    file = open_weight_file(home.adapter)
    file.read({name: name for name in file.tensors})


def _write_config(home: Home, random: Random) -> None:
    content = (MLLM / "config.json").read_bytes()
    if random.randrange(5):
        changed = json.dumps(mutated_json(json.loads(content), random)).encode()
    else:
        changed = mutated_bytes(content, random)
    replaced(home.config, changed)


def _read_config(home: Home) -> None:
    """Where it is used, the tokens are those of the golden set, or say that they are others."""
    result = python_encode(str(home.base))
    same = result["difference"] < 1e-3
    assert same or result["adapter"] != _healthy_identity(), f"tokens differ: {result}"


@cache
def _healthy_identity() -> str:
    """Of the golden adapter with the golden MLLM."""
    from easyref_core import load_checkpoint, plan_encoder

    return plan_encoder(load_checkpoint(ADAPTER), MLLM).identity


def _write_index(home: Home, random: Random) -> None:
    part = home.mllm / "part.safetensors"
    if not part.exists():
        (home.mllm / "model.safetensors").rename(part)
    weight_map = {"model.norm.weight": part.name, "lm_head.weight": part.name}
    index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
    changed = json.dumps(mutated_json(index, random)).encode()
    replaced(home.mllm / "model.safetensors.index.json", changed)


def _read_index(home: Home) -> None:
    from easyref_core import load_checkpoint, plan_encoder

    plan_encoder(load_checkpoint(home.adapter), home.mllm)


def _write_gallery(home: Home, random: Random) -> None:
    picture = {"file": "a/b.png", "weight": 0.5, "crop": [0, 0.25, 1, 0.5]}
    text = json.dumps(mutated_json({"version": 1, "pictures": [picture, picture]}, random))
    if not random.randrange(4):
        text = mutated_bytes(text.encode(), random).decode("utf-8", "surrogateescape")
    (home.base / "gallery").write_text(text, encoding="utf-8", errors="surrogatepass")


def _read_gallery(home: Home) -> None:
    from easyref_core.pictures.gallery import parse_gallery

    parse_gallery((home.base / "gallery").read_text(encoding="utf-8", errors="surrogatepass"))


Write, Read = Callable[[Home, Random], None], Callable[[Home], None]
TARGETS: dict[str, tuple[Write, Read]] = {
    "adapter": (_write_adapter, _read_adapter),
    "tokens": (_write_tokens, _read_tokens),
    "pickle": (_write_pickle, _read_pickle),
    "config": (_write_config, _read_config),
    "index": (_write_index, _read_index),
    "gallery": (_write_gallery, _read_gallery),
}
