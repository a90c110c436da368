"""Checks of the processes that train together, without starting any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from easyref_core.errors import EasyRefError
from easyref_core.training import processes
from easyref_core.training.checkpoints import Checkpoints
from easyref_core.training.config import Settings
from easyref_core.training.disk import writing

Make = Callable[..., Settings]
WRAPPED = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def accelerator(kind: DistributedType, **plugins: Any) -> Any:
    """Of two processes."""
    return SimpleNamespace(
        num_processes=2,
        device=torch.device("cpu"),
        distributed_type=kind,
        state=SimpleNamespace(**({"deepspeed_plugin": None} | plugins)),
    )


@pytest.fixture
def joined(settings: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Joins two FSDP processes with an accelerate configuration; returns the accelerator."""

    def join(configured: dict[str, str], **changes: Any) -> Any:
        for name, value in (WRAPPED | configured).items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision("bf16")
        found = accelerator(DistributedType.FSDP, fsdp_plugin=plugin)
        monkeypatch.setattr(processes, "Accelerator", lambda **_: found)
        monkeypatch.setenv("WORLD_SIZE", "2")
        return processes.join_processes(settings(**changes), cpu=True, validates=False)

    return join


@pytest.mark.parametrize(
    ("configured", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, "Set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "Set fsdp_auto_wrap_policy: TRANSFORMER_"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "DecoderLayer,VisionBlock"}, "to wrap VisionBlock; only"),
    ],
)
def test_unusable_fsdp_configurations_are_refused(
    joined: Callable[..., Any], configured: dict[str, str], sentence: str
) -> None:
    with pytest.raises(EasyRefError, match=sentence):
        joined(configured)


@pytest.mark.parametrize(
    "configured",
    [
        {},
        {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
        {"FSDP_TRANSFORMER_CLS_TO_WRAP": "DecoderLayer"},
    ],
)
def test_fsdp_does_not_round_the_loss(
    joined: Callable[..., Any], configured: dict[str, str]
) -> None:
    policy = joined(configured).state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)


def test_batches_of_several_target_sizes_are_refused_with_sharded_weights(
    joined: Callable[..., Any],
) -> None:
    with pytest.raises(EasyRefError, match=r"batch_size=1 and optimiser\.accumulation=2"):
        joined({}, data_crop="aspect")
    joined({}, data_crop="aspect", optimiser_batch_size=1)


def test_deepspeed_with_sharded_weights_is_refused(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = SimpleNamespace(zero_stage=3)
    found = accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: found)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EasyRefError, match="Use ZeRO-2, or FSDP"):
        processes.join_processes(settings(), cpu=True, validates=False)
    plugin.zero_stage = 2
    assert processes.join_processes(settings(), cpu=True, validates=False) is found


def test_identity_with_sharded_weights_is_refused(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accelerator(DistributedType.FSDP)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: found)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EasyRefError, match="identity_references calls the UNet another number"):
        processes.join_processes(settings(model_identity_references=1), cpu=True, validates=False)


def test_the_open_file_limit_is_raised_to_the_systems() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        processes.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def shards_fail(*_: Any) -> None:
    try:
        raise OSError("the shard ends too early")
    except OSError as error:
        raise CheckpointException("reading", {1: _wrap_exception(error)}) from error


def test_errors_of_shards_become_one_sentence(tmp_path: Path) -> None:
    found = accelerator(DistributedType.FSDP)
    found.unwrap_model, found.load_state = lambda model: model, shards_fail
    optimiser = SimpleNamespace(param_groups=[])
    with pytest.raises(EasyRefError, match=r"checkpoint-4 cannot be restored \(OSError: the shard"):
        Checkpoints(tmp_path, None, 1, "", "").restore(
            found, None, optimiser, None, tmp_path / "checkpoint-4"
        )
    with (
        pytest.raises(EasyRefError, match="checkpoint-6 could not be written"),
        writing(tmp_path / "checkpoint-6"),
    ):
        shards_fail()
