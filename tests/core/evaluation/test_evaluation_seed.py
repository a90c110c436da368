"""A run's seed reaches everything that is random."""

from __future__ import annotations

import pytest
import torch

from easyref_core.evaluation import run
from easyref_core.evaluation.methods import load
from easyref_core.evaluation.settings import make_bench_settings


def test_loras_are_trained_with_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(load, "load_methods", lambda settings, trials: given.append(settings) or {})
    settings = make_bench_settings({"groups": "a", "out": "b", "base": "c", "seed": 7})
    run._methods(settings, [], torch.device("cpu"))
    assert given[0].lora.seed == 7
