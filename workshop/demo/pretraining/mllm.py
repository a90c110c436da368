"""The demo's MLLM: learns to name what one to four pictures have in common.

It stands for the pretraining that Qwen2-VL brings along. It reads EasyRef's own chat and answers in
words, with plain positions as EasyRef uses it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from easyref_core.qwen2vl.body import MllmBody
from easyref_core.qwen2vl.config import MllmConfig, config_from_dict
from easyref_core.qwen2vl.decoder import rope
from easyref_core.qwen2vl.prompt import IM_END, PromptTokenizer

from ..dataset.characters import ATTRIBUTES
from ..tiny_mllm import write_mllm_settings
from ..tiny_weights import write_tensors
from .captions import WORDS
from .composed import Composer
from .references import DrawnGroups, patches_of
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
_PADDING = -1
_FIRST = 2.0  # what the first word counts, beside all of them
_COMPOSED = 0.6  # so large a share of a step's groups is put together for it
_ALONE_FIRST = 0.35  # so large a share of the steps sees single pictures of one figure
_STYLE = ("pattern", "first", "second", "ground")


class NamingModel(nn.Module):
    """A whole small Qwen2-VL with plain positions; its output layer is the word embedding."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__()
        self.config = config
        self.body = MllmBody(config, config.num_layers, nn)

    def forward(
        self, ids: torch.Tensor, spans: torch.Tensor, seen: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Logits [B, L - first, words] of the words that follow the positions from `first` on.

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
        return F.linear(model.norm(x[:, first:]), model.embed_tokens.weight)


def train_mllm(
    groups: DrawnGroups,
    composer: Composer,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> Path:
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
        rows = max(1, schedule.batch // count)
        composed = round(rows * _COMPOSED)
        levels, facts = composer.groups(rng, composed, count)
        picks = []
        for _ in range(rows - composed):
            group = rng.choice(alone) if count == 1 else rng.randrange(len(groups))
            # A crowd's target shows the character alone, which would give it away.
            first = 1 if count > 1 and groups.kinds[group] == "crowded" else 0
            places = rng.sample(range(first, groups.levels.shape[1]), count)
            picks += [(group, place) for place in places]
            facts.append(groups.facts[group])
        if picks:
            levels = torch.cat((levels, groups.pictures(picks)))
        said = [rng.sample(words, len(words)) for words in map(answers, facts)]
        return _naming_loss(model, tokenizer, patches_of(levels), said, device)

    run_steps(model, loss, schedule, folder, device)
    weights = {n.removeprefix("body."): w.detach().cpu() for n, w in model.named_parameters()}
    vision, name = config.vision, "visual.patch_embed.proj.weight"
    patch = (vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
    weights[name] = weights[name].reshape(-1, *patch)
    write_tensors(directory / "model.safetensors", weights, torch.float16)
    return directory


def answers(facts: Mapping[str, str]) -> list[str]:
    """What the MLLM shall say of a group, in any order."""
    return [facts[name] for name in (_STYLE if "ground" in facts else ATTRIBUTES)]


def _naming_loss(
    model: NamingModel,
    tokenizer: PromptTokenizer,
    patches: torch.Tensor,
    said: Sequence[Sequence[str]],
    device: torch.device,
) -> torch.Tensor:
    """Of the words said, and of any of them being the first.

    A word that follows others is found with their help. Reference tokens have no such help, so
    everything must be known before the first one is said.

    Args:
        patches: [groups * n, 64, 1176], n pictures of each group.
        said: of each group, in the order in which it is said.
    """
    prompt = tokenizer.tokenize([_PICTURE_TOKENS] * (len(patches) // len(said)), "")
    end = prompt.ids.new_tensor([tokenizer.special_ids[IM_END]])
    words = [[tokenizer.text_ids(" " + word) for word in of_group] for of_group in said]
    sequences = [
        torch.cat((prompt.ids, torch.tensor([*chain.from_iterable(of_group)]), end))
        for of_group in words
    ]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=_PADDING).to(device)
    seen = model.body.visual(patches.to(device), 8, 8)  # [pictures, 16, hidden]
    spans = torch.cat([torch.arange(*span) for span in prompt.image_spans]).to(device)
    seen = seen.reshape(len(said), spans.numel(), -1)
    # Only of what is said: the prompt is many times longer.
    logits = model(ids.clamp(min=0), spans, seen, len(prompt) - 1).float()
    targets = ids[:, len(prompt) :]
    following = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=_PADDING
    )
    first = logits[:, 0].log_softmax(-1)
    begun = [
        row[torch.tensor([word[0] for word in of_group], device=device)].mean()
        for row, of_group in zip(first, words, strict=True)
    ]
    return following - _FIRST * torch.stack(begun).mean()


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
