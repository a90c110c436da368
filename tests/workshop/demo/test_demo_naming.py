"""The loss of the demo's MLLM: naming what images have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from easyref_core.qwen2vl.prompt import PromptTokenizer
from workshop.demo.pretraining.captions import WORDS
from workshop.demo.pretraining.mllm import SIZES, VISION, answers, naming_loss
from workshop.demo.tiny_mllm import write_mllm_settings

FACTS = {
    "shape": "star",
    "colour": "red",
    "pattern": "dots",
    "eyes": "goggle",
    "accessory": "top hat",
    "place": "beach",
}
STYLE = {"shape": "star", "pattern": "rings", "first": "red", "second": "blue", "ground": "teal"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder: Path = tmp_path_factory.mktemp("mllm")
    write_mllm_settings(folder, WORDS, SIZES, VISION)
    return PromptTokenizer.from_directory(folder)


class FakeMllm:
    """Predicts every word after the first; at the first position, some words are likely."""

    def __init__(self, tokenizer: PromptTokenizer, likely: Sequence[str]) -> None:
        self._likely = [tokenizer.text_ids(" " + word)[0] for word in likely]
        self._end = len(tokenizer.tokenize([16, 16], "")) - 1
        self.body = SimpleNamespace(visual=lambda patches, *_: torch.zeros(len(patches), 16, 8))

    def __call__(
        self, ids: torch.Tensor, spans: torch.Tensor, features: torch.Tensor, first: int
    ) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 4096)
        following = ids.roll(-1, dims=1)
        logits.scatter_(2, following[..., None], 40.0)
        logits[:, self._end] = 0
        logits[:, self._end, self._likely] = 40.0
        return logits[:, first:]


def test_only_shared_attributes_are_named() -> None:
    assert sorted(answers(FACTS)) == sorted(["star", "red", "dots", "goggle", "top hat"])
    assert sorted(answers(STYLE)) == sorted(["rings", "red", "blue", "teal"])


def test_all_words_must_be_known_at_the_first_position(tokenizer: PromptTokenizer) -> None:
    words = answers(FACTS)

    def loss(likely: Sequence[str]) -> float:
        model = FakeMllm(tokenizer, likely)
        value = naming_loss(
            model, tokenizer, torch.zeros(2, 64, 1176), [words], torch.device("cpu")
        )
        return float(value)

    tokens = sum(len(tokenizer.text_ids(" " + word)) for word in words) + 1  # and the end
    assert loss(words) == pytest.approx(math.log(5) * (2 + 1 / tokens), rel=1e-3)
    assert loss(words[:1]) > loss(words) + 10  # though all five follow correctly
