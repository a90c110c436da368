"""Encoding as the official EasyRef does it, timed beside ours on the same sizes and pictures.

    pip install --target FOLDER transformers==4.45.2
    python -m benchmarks.speed --official FOLDER

The steps are those that its code takes with Qwen2-VL of transformers: one picture a call of the
vision tower, the language model with its head, then the last layer, built as a model of its own.
The weights are random, so only times compare. `main` runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.passes import encode_references

from .encoding import PROMPT
from .models import NUM_TOKENS, TOKEN_WIDTH, Sizes, pictures, plan
from .processes import in_process
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
    with FlopCounterMode(display=False) as counter:
        encode_references(encoder, plans[0])
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
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    found = in_process("official", json.dumps(given), environment={"PYTHONPATH": path})
    theirs = statistics.median(found["seconds"])
    shares = [own / theirs for own in ours]
    counted = counter.get_total_flops() / found["operations"]
    name = "8 references, of the official procedure"
    return [amount(f"{name}'s time", shares, "", _BAR), Amount(f"{name}'s work", counted, "")]


@torch.no_grad()
def main() -> None:
    """Read sizes and chats, and write seconds and the operations of a run, as JSON."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    real = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    vision = {"depth": given["depth"], "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}
    shared: dict[str, Any] = {
        **real,
        "num_key_value_heads": 2,
        "vocab_size": given["words"],
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "attn_implementation": "sdpa",
    }

    def model(layers: int) -> Any:
        config = Qwen2VLConfig(**shared, num_hidden_layers=layers)
        return Qwen2VLForConditionalGeneration(config).eval()

    body, last = model(given["layers"] - 1), model(1).model
    width = real["hidden_size"]
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
    with FlopCounterMode(display=False) as counter:
        for chat in given["chats"]:
            encode(chat)
    print(json.dumps({"seconds": taken, "operations": counter.get_total_flops()}))


if __name__ == "__main__":
    main()
