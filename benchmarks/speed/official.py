"""Encoding as the official EasyRef does it, timed beside ours on the same sizes and pictures.

    pip install --target FOLDER transformers==4.45.2
    python -m benchmarks.speed --official FOLDER

The steps are those that its code takes with Qwen2-VL of transformers: one picture a call of the
vision tower, the language model with its head, then the last layer, built as a model of its own.
The weights are random, so only times compare. `main` runs in a process of its own,
which at real size also tells its peak of memory: there the MLLM is read from a folder twice, as
that code does.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.passes import encode_references

from .counting import operations
from .encoding import PROMPT
from .models import NUM_TOKENS, TOKEN_WIDTH, Sizes, pictures, plan
from .processes import in_process, peak_bytes, reset_peak
from .timing import Amount, amount, seconds

_BAR = 0.60
_COUNT = 8
_WORDS = 151_936  # Qwen2-VL's; a share of them beside that share of its layers
_PIXELS = (11**2 * 28**2, (12**2 + 1) * 28**2)  # of a picture, as the official code asks for


def compared(folder: Path, encoder: EasyRefEncoder, sizes: Sizes, repeats: int) -> list[Amount]:
    """The first encoding of eight references and the black picture, as a share of the official
    procedure's time, on one thread, and of its multiplications.

    Args:
        folder: of transformers 4.45.2.
    """
    device = torch.device("cpu")
    plans = [plan(encoder, pictures(_COUNT, 500 + 10 * n), PROMPT) for n in range(repeats)]
    ours = [
        seconds(lambda planned=planned: encode_references(encoder, planned), device)
        for planned in plans
    ]
    given = {
        "layers": sizes.layers,
        "depth": sizes.depth,
        "words": _WORDS * sizes.layers // 28,
        "repeats": repeats,
        "chats": [
            {"ids": p.chat.ids.tolist(), "spans": p.chat.image_spans}
            for p in (*plans[0].passes, plans[0].unconditional)
        ],
    }
    found = _run(folder, given)
    theirs = statistics.median(found["seconds"])
    shares = [own / theirs for own in ours]
    counted = operations(lambda: encode_references(encoder, plans[0])) / found["operations"]
    name = "8 references, of the official procedure"
    return [amount(f"{name}'s time", shares, "", _BAR), Amount(f"{name}'s work", counted, "")]


def at_real_size(folder: Path, mllm: Path) -> dict[str, Any]:
    """What encoding eight references takes; see `main`.

    Args:
        folder: of transformers 4.45.2.
        mllm: a folder of Qwen2-VL-2B's size.
    """
    chat, image = 20, 144  # tokens before the pictures, and of a picture between its two marks
    starts = [chat + 1 + n * (image + 2) for n in range(_COUNT)]
    length = starts[-1] + image + 60
    spans = [(start, start + image) for start in starts]
    black = {"ids": [1] * (chat + image + 60), "spans": spans[:1]}
    chats = [{"ids": [1] * length, "spans": spans}, black]
    return _run(folder, {"folder": str(mllm), "repeats": 1, "words": _WORDS, "chats": chats})


def _run(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return in_process("official", json.dumps(given), environment={"PYTHONPATH": path})


@torch.no_grad()
def main() -> None:
    """Read sizes and chats, and write seconds, and the operations of a run, or at real size the
    peaks of memory, as JSON."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    given = json.loads(sys.argv[1])
    loading = 0
    if "folder" in given:
        last, body = _read(given["folder"])
        loading = peak_bytes()
        reset_peak()
    else:
        torch.set_num_threads(1)
        last, body = _random(given)
    width = body.config.hidden_size
    project = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, TOKEN_WIDTH),
        torch.nn.LayerNorm(TOKEN_WIDTH),
    )  # fmt: skip
    tokens = torch.randn(NUM_TOKENS, width)
    least, most = _PIXELS
    processor = Qwen2VLImageProcessor(min_pixels=least, max_pixels=most)

    def encode(chat: Any) -> torch.Tensor:
        seen = [Image.new("RGB", (336, 336), (n, 0, 0)) for n in range(len(chat["spans"]))]
        inputs = processor(images=seen, return_tensors="pt")
        counts = inputs["image_grid_thw"].prod(dim=1).tolist()
        embeds = body.model.embed_tokens(torch.tensor(chat["ids"])[None] % given["words"])
        patches = inputs["pixel_values"].split(counts)
        for number, (part, (first, end)) in enumerate(zip(patches, chat["spans"], strict=True)):
            grid = inputs["image_grid_thw"][number : number + 1]
            embeds[0, first:end] = body.visual(part, grid_thw=grid)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        kept = {"output_hidden_states": True}
        states = body(attention_mask=mask, inputs_embeds=embeds, **kept).hidden_states[-1]
        states = torch.cat((states, tokens[None]), dim=1)
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        states = last(attention_mask=mask, inputs_embeds=states, **kept).hidden_states[-1]
        return project(states[:, -NUM_TOKENS:])

    taken = []
    for _ in range(given["repeats"]):
        start = time.process_time()
        for chat in given["chats"]:
            encode(chat)
        taken.append(time.process_time() - start)
    found: dict[str, Any] = {"seconds": taken}
    if "folder" in given:
        found |= {"loading": loading, "encoding": peak_bytes()}
    else:
        found["operations"] = operations(lambda: [encode(chat) for chat in given["chats"]])
    print(json.dumps(found))


def _random(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the last layer, with its embedding and norm; the MLLM without it), of Qwen2-VL-2B's
    widths."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": given["depth"], "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}
    shared: dict[str, Any] = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": given["words"],
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "attn_implementation": "sdpa",
    }

    def model(layers: int) -> Any:
        config = Qwen2VLConfig(**shared, num_hidden_layers=layers)
        return Qwen2VLForConditionalGeneration(config).eval()

    return model(1).model, model(given["layers"] - 1)


def _read(folder: str) -> tuple[Any, Any]:
    """As `_random`, both out of a folder, one after the other."""
    from transformers import Qwen2VLForConditionalGeneration

    def model() -> Any:
        return Qwen2VLForConditionalGeneration.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    last = model().model
    last.layers = last.layers[-1:]
    last.embed_tokens = torch.nn.Identity()
    body = model()
    body.model.layers = body.model.layers[:-1]
    return last, body


if __name__ == "__main__":
    main()
