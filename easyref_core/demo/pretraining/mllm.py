"""The demo's MLLM: learns to name what one to four pictures have in common.

It stands for the pretraining that Qwen2-VL brings along. It reads EasyRef's own chat and answers in
words, with plain positions as EasyRef uses it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...config import MllmConfig, config_from_dict
from ...decoder import rope
from ...mllm import MllmBody
from ...prompt import IM_END, PromptTokenizer
from ..dataset.characters import ATTRIBUTES
from ..tiny_mllm import write_mllm_settings
from ..tiny_weights import write_tensors
from .captions import WORDS
from .references import DrawnGroups
from .steps import Schedule, run_steps

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "rope_theta": 10000.0,
    "torch_dtype": "float16",
}
VISION = {"depth": 4, "embed_dim": 128, "mlp_ratio": 4, "num_heads": 4}

_PICTURE_TOKENS = 16
_ALONE_FIRST = 0.35  # so large a share of the steps sees single pictures of one figure
_STYLE = ("pattern", "first", "second", "ground")


class NamingModel(nn.Module):
    """A whole small Qwen2-VL with plain positions; its output layer is the word embedding."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__()
        self.config = config
        self.body = MllmBody(config, config.num_layers, nn)

    def forward(self, ids: torch.Tensor, spans: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, words].

        Args:
            ids: [B, L].
            spans: [pictures * n] positions of the pictures' tokens, the same in every row.
            seen: [B, pictures * n, hidden] what stands there.
        """
        model = self.body.model
        x = model.embed_tokens(ids)
        x = x.index_copy(1, spans, seen.to(x))
        position = rope(self.config, x.shape[1], x.device, x.dtype)
        for layer in model.layers:
            x = layer(x, position)
        return F.linear(model.norm(x), model.embed_tokens.weight)


def train_mllm(groups: DrawnGroups, schedule: Schedule, folder: Path, device: torch.device) -> Path:
    """Train the MLLM and write its Qwen2-VL directory to `folder`/model, which is returned.

    Args:
        schedule: its batch counts pictures.
    """
    directory = folder / "model"
    config = config_from_dict(write_mllm_settings(directory, WORDS, SIZES, VISION), "the demo")
    torch.manual_seed(schedule.seed)
    model = NamingModel(config)
    _start(model)
    model.to(device)
    tokenizer = PromptTokenizer.from_directory(directory)
    alone = [n for n, kind in enumerate(groups.kinds) if kind != "crowded"]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(torch.randint(2**62, (), generator=generator).item())
        count = 1 if step < _ALONE_FIRST * schedule.steps else rng.randint(1, 4)
        rows = []
        for _ in range(max(1, schedule.batch // count)):
            group = rng.choice(alone) if count == 1 else rng.randrange(len(groups))
            # A crowd's target shows the character alone, which would give it away.
            first = 1 if count > 1 and groups.kinds[group] == "crowded" else 0
            places = rng.sample(range(first, groups.levels.shape[1]), count)
            rows.append((group, places))
        return _naming_loss(model, tokenizer, groups, rows, device)

    run_steps(model, loss, schedule, folder, device)
    weights = {n.removeprefix("body."): w.detach().cpu() for n, w in model.named_parameters()}
    vision, name = config.vision, "visual.patch_embed.proj.weight"
    patch = (vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
    weights[name] = weights[name].reshape(-1, *patch)
    write_tensors(directory / "model.safetensors", weights, torch.float16)
    return directory


def answer(facts: dict[str, str]) -> str:
    """What the MLLM shall say of a group."""
    return " ".join(facts[name] for name in _named(facts))


def _named(facts: dict[str, str]) -> tuple[str, ...]:
    return _STYLE if "ground" in facts else ATTRIBUTES


def name_groups(
    model: NamingModel,
    tokenizer: PromptTokenizer,
    groups: DrawnGroups,
    rows: list[tuple[int, list[int]]],
    device: torch.device,
) -> dict[str, float]:
    """Share of each attribute named right (teacher-forced), over rows of equally many pictures."""
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        logits, ids, start = _run(model, tokenizer, groups, rows, device)
    right: dict[str, list[bool]] = {}
    for row, (group, _) in enumerate(rows):
        facts, place = groups.facts[group], start
        for name in _named(facts):
            length = len(tokenizer.text_ids(" " + facts[name]))
            said = logits[row, place - 1 : place - 1 + length].argmax(-1)
            same = bool((said == ids[row, place : place + length]).all())
            right.setdefault(name, []).append(same)
            place += length
    return {name: sum(flags) / len(flags) for name, flags in right.items()}


def _naming_loss(
    model: NamingModel,
    tokenizer: PromptTokenizer,
    groups: DrawnGroups,
    rows: list[tuple[int, list[int]]],
    device: torch.device,
) -> torch.Tensor:
    logits, ids, start = _run(model, tokenizer, groups, rows, device)
    targets = ids.clone()
    targets[:, :start] = -100
    targets[ids < 0] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten())


def _run(
    model: NamingModel,
    tokenizer: PromptTokenizer,
    groups: DrawnGroups,
    rows: list[tuple[int, list[int]]],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(logits [B, L, words], ids [B, L] with -1 where a row has ended, where the answers start)"""
    count = len(rows[0][1])
    prompt = tokenizer.tokenize([_PICTURE_TOKENS] * count, "")
    end = prompt.ids[-1].new_tensor(tokenizer.special_id(IM_END))[None]
    sequences = []
    for group, _ in rows:
        words = torch.tensor(tokenizer.text_ids(" " + answer(groups.facts[group])))
        sequences.append(torch.cat((prompt.ids, words, end)))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(device)
    picks = [(group, place) for group, places in rows for place in places]
    seen = model.body.visual(groups.patches(picks).to(device), 8, 8)  # [pictures, 16, hidden]
    spans = torch.cat([torch.arange(*span) for span in prompt.image_spans]).to(device)
    logits = model(ids.clamp(min=0), spans, seen.reshape(len(rows), spans.numel(), -1))
    return logits, ids, len(prompt)


def _start(model: NamingModel) -> None:
    """Small residual branches, words of unit size."""
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "attn.proj.weight")):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
