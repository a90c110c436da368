"""The demo's MLLM: learns to name what one to four images have in common.

It stands for Qwen2-VL's pretraining. It gets EasyRef's own prompt and answers in words, with the
one-dimensional positions that EasyRef uses.
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
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.config_file import config_from_dict
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

_IMAGE_TOKENS = 16
_PADDING = -1
_FIRST_WEIGHT = 2.0  # loss weight of the first word, relative to that of all
_COMPOSED = 0.6  # share of a step's groups that are composed for it
_SINGLE_FIRST = 0.35  # share of the steps, at first, with single images of one figure
_STYLE = ("pattern", "first", "second", "ground")


class NamingModel(nn.Module):
    """A small Qwen2-VL with one-dimensional positions and tied embeddings."""

    def __init__(self, config: MllmConfig) -> None:
        super().__init__()
        self.config = config
        self.body = MllmBody(config, config.num_layers, nn)

    def forward(
        self, ids: torch.Tensor, spans: torch.Tensor, features: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Logits [B, L - first, vocabulary] of the next token, at positions from `first` on.

        Args:
            ids: [B, L].
            spans: [images * n] positions of the image tokens, the same in every row.
            features: [B, images * n, hidden] image features for these positions.
        """
        model = self.body.model
        x = model.embed_tokens(ids)
        x = x.index_copy(1, spans, features.to(x))
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
    """Train the MLLM; writes and returns its Qwen2-VL directory `folder`/model.

    Args:
        schedule: its batch counts images.
    """
    directory = folder / "model"
    config = config_from_dict(write_mllm_settings(directory, WORDS, SIZES, VISION), "the demo")
    torch.manual_seed(schedule.seed)
    model = NamingModel(config)
    _initialise(model)
    model.to(device)
    tokenizer = PromptTokenizer.from_directory(directory)
    alone = [n for n, kind in enumerate(groups.kinds) if kind != "crowded"]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = random.Random(torch.randint(2**62, (), generator=generator).item())
        count = 1 if step < _SINGLE_FIRST * schedule.steps else rng.randint(1, 4)
        rows = max(1, schedule.batch // count)
        composed = round(rows * _COMPOSED)
        levels, facts = composer.groups(rng, composed, count)
        picks = []
        for _ in range(rows - composed):
            group = rng.choice(alone) if count == 1 else rng.randrange(len(groups))
            # A crowded group's target shows the character alone, which would reveal it.
            first = 1 if count > 1 and groups.kinds[group] == "crowded" else 0
            places = rng.sample(range(first, groups.levels.shape[1]), count)
            picks += [(group, place) for place in places]
            facts.append(groups.facts[group])
        if picks:
            levels = torch.cat((levels, groups.pictures(picks)))
        words = [rng.sample(of_group, len(of_group)) for of_group in map(answers, facts)]
        return naming_loss(model, tokenizer, patches_of(levels), words, device)

    run_steps(model, loss, schedule, folder, device)
    weights = {n.removeprefix("body."): w.detach().cpu() for n, w in model.named_parameters()}
    vision, name = config.vision, "visual.patch_embed.proj.weight"
    patch = (vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
    weights[name] = weights[name].reshape(-1, *patch)
    write_tensors(directory / "model.safetensors", weights, torch.float16)
    return directory


def answers(facts: Mapping[str, str]) -> list[str]:
    """The words to name for a group, in any order."""
    return [facts[name] for name in (_STYLE if "ground" in facts else ATTRIBUTES)]


def naming_loss(
    model: NamingModel,
    tokenizer: PromptTokenizer,
    patches: torch.Tensor,
    words: Sequence[Sequence[str]],
    device: torch.device,
) -> torch.Tensor:
    """Cross-entropy of the answer, plus a loss for all its words at its first position.

    Later words are predicted with the help of earlier ones. Reference tokens have no such help, so
    everything must be known before the first word.

    Args:
        patches: [groups * n, 64, 1176], n images of each group.
        words: of each group, in the order of its answer.
    """
    prompt = tokenizer.tokenize([_IMAGE_TOKENS] * (len(patches) // len(words)), "")
    end = prompt.ids.new_tensor([tokenizer.special_ids[IM_END]])
    word_ids = [[tokenizer.text_ids(" " + word) for word in of_group] for of_group in words]
    sequences = [
        torch.cat((prompt.ids, torch.tensor([*chain.from_iterable(of_group)]), end))
        for of_group in word_ids
    ]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=_PADDING).to(device)
    grids = [(8, 8)] * len(patches)
    features = model.body.visual(patches.to(device).flatten(0, 1), grids)  # [images * 16, hidden]
    spans = torch.cat([torch.arange(*span) for span in prompt.image_spans]).to(device)
    features = features.reshape(len(words), spans.numel(), -1)
    # Logits of the answer only: the prompt is many times longer.
    logits = model(ids.clamp(min=0), spans, features, len(prompt) - 1).float()
    targets = ids[:, len(prompt) :]
    following = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=_PADDING
    )
    first = logits[:, 0].log_softmax(-1)
    first_words = [
        row[torch.tensor([word[0] for word in of_group], device=device)].mean()
        for row, of_group in zip(first, word_ids, strict=True)
    ]
    return following - _FIRST_WEIGHT * torch.stack(first_words).mean()


def _initialise(model: NamingModel) -> None:
    """Small weights at the end of residual branches, and small word embeddings."""
    for name, parameter in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight", "attn.proj.weight")):
            nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
