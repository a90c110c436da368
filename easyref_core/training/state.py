"""The whole state of a run on disk: written whole or not at all, the newest few kept.

All chance comes from the seed and a sample's position, so weights, optimiser and step number are
the whole state. On DeepSpeed and FSDP accelerate writes its own sharded files beside them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from ..errors import EasyRefError
from .config import Settings, build, differences
from .disk import writing
from .ema import Average
from .export import official_state, write_whole
from .model import TrainedModel

_NAME = re.compile(r"^checkpoint-(\d+)$")
# Changing these does not change what the run computes; nor does the number of steps, unless the
# learning rate falls towards the last one.
_FREE = ("source", "output", "data.workers")
_WHOLE = "whole in each process"
_ANEW = "name its easyref.safetensors as model.adapter, and another output.folder"


class OtherSettings(EasyRefError):
    """A checkpoint that was made with other settings.

    Attributes:
        changed: each difference.
    """

    def __init__(self, folder: Path, changed: Sequence[str]) -> None:
        super().__init__(
            f"{folder} was made with other settings: {'; '.join(changed)}. Restore them, choose "
            "another output.folder, or resume all the same with --force."
        )
        self.changed = tuple(changed)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole state, so that accelerate must gather it."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def is_spread(accelerator: Accelerator) -> bool:
    """Whether no process holds all weights, not only not all of the optimiser's state."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return plugin.zero_stage >= 3
    return accelerator.distributed_type == DistributedType.FSDP


def strategy_of(accelerator: Accelerator) -> str:
    """How the state is shared out, for people; a checkpoint can only be resumed in the same way."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"DeepSpeed ZeRO-{plugin.zero_stage}"
    return "FSDP" if is_sharded(accelerator) else _WHOLE


def shares_of(accelerator: Accelerator) -> tuple[int, int]:
    """Among how many processes the weights, and the optimiser's state, are shared out."""
    processes = accelerator.num_processes
    weights = processes if is_spread(accelerator) else 1
    return weights, processes if is_sharded(accelerator) else 1


def gathered(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's whole state dict where it is sharded, else None. Every process must ask."""
    return accelerator.get_state_dict(model) if is_sharded(accelerator) else None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.match(p.name), p) for p in folder.iterdir() if p.is_dir())
    return sorted((int(m.group(1)), p) for m, p in found if m)


def save_state(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Average | None,
    settings: Settings,
    step: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, then drop the oldest.

    Raises:
        EasyRefError: the disk is full or not writable; earlier checkpoints are intact.
    """
    folder = Path(settings.output.folder)
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        with writing(final):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            whole = gathered(accelerator, model)
            if whole is not None:
                accelerator.save_state(str(temporary / "sharded"))
            if accelerator.is_main_process:
                own = accelerator.unwrap_model(model)
                size = settings.data.image_size
                weights = official_state(own, whole)
                write_whole(weights, temporary / "easyref.safetensors", size)
                if whole is None:
                    torch.save(optimiser.state_dict(), temporary / "optimiser.pt")
                if average is not None:
                    averaged = official_state(own, replaced=average.weights)
                    write_whole(averaged, temporary / "easyref_ema.safetensors", size)
                if accelerator.scaler is not None:
                    torch.save(accelerator.scaler.state_dict(), temporary / "scaler.pt")
                made_with = dataclasses.asdict(settings)
                state = {
                    "step": step,
                    "processes": accelerator.num_processes,
                    "strategy": strategy_of(accelerator),
                    "settings": made_with,
                }
                (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                for _, old in checkpoints(folder)[: -settings.output.keep]:
                    shutil.rmtree(old, ignore_errors=True)
    except EasyRefError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def forget(folder: Path) -> None:
    """Remove a run's checkpoints and losses, to start anew."""
    for _, checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / "losses.jsonl").unlink(missing_ok=True)


def find_resume(settings: Settings, processes: int, force: bool) -> tuple[int, Path] | None:
    """The newest checkpoint of this run; None to start anew.

    Raises:
        OtherSettings: it was made with other settings or by another number of processes, unless
            `force`.
        EasyRefError: it is damaged.
    """
    found = checkpoints(Path(settings.output.folder))
    if not found:
        return None
    step, folder = found[-1]
    state = _read_state(folder)
    try:
        saved = state["settings"]
        saved.pop("source")
        made = build(Settings, saved, "")  # with today's defaults for what it does not name
    except (KeyError, AttributeError, TypeError, EasyRefError) as error:
        raise _damaged(folder, error) from None
    fixed = settings.optimiser.learning_rate_schedule == "constant"
    free = (*_FREE, "optimiser.steps") if fixed else _FREE
    named = differences(dataclasses.asdict(made), dataclasses.asdict(settings))
    changed = [difference for difference in named if not _is_free(difference, free)]
    before = state.get("processes", processes)
    if before != processes:
        changed.append(f"processes: {before} -> {processes}")
    if changed and not force:
        raise OtherSettings(folder, changed)
    return step, folder


def _read_state(folder: Path) -> dict[str, Any]:
    """
    Raises:
        EasyRefError: it cannot be read.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    if not isinstance(state, dict):
        raise _damaged(folder, "state.json holds no section of keys")
    return state


def _damaged(folder: Path, why: object) -> EasyRefError:
    return EasyRefError(f"{folder} is damaged ({why}). Remove it to resume earlier.")


def check_resume(accelerator: Accelerator, found: tuple[int, Path] | None) -> None:
    """What can be told of a checkpoint only once the processes are joined. Every process must ask.

    Raises:
        EasyRefError: not every process found the same one, or it was made with the state shared out
            in another way.
    """
    steps = gather_object([0 if found is None else found[0]])
    if len(set(steps)) > 1:
        shown = ", ".join(f"step {step}" if step else "none" for step in steps)
        raise EasyRefError(
            f"The processes found different checkpoints ({shown}). output.folder must be on "
            "storage that every machine sees."
        )
    if found is None:
        return
    _, folder = found
    now = strategy_of(accelerator)
    before = _read_state(folder).get("strategy")
    if before is None:  # of before this was noted
        sharded = (folder / "sharded").is_dir()
        before = now if sharded == is_sharded(accelerator) else "sharded" if sharded else _WHOLE
    if before != now:
        raise EasyRefError(
            f"{folder} was made with its state {before}, which is now {now}, so it cannot be "
            f"resumed even with --force. Start it as before, or to train on from it {_ANEW}."
        )


def _is_free(difference: str, free: Sequence[str]) -> bool:
    name = difference.partition(":")[0]
    return any(name == f or name.startswith(f"{f}.") for f in free)


def restore(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Average | None,
    folder: Path,
) -> None:
    """Load a checkpoint into a prepared model and optimiser.

    What --force may have changed is taken from the settings: the optimiser's weight decay, and an
    average that the checkpoint does not have begins at its weights.

    Raises:
        EasyRefError: it is damaged or does not fit.
    """
    from safetensors.torch import load_file

    with _restoring(folder):
        decays = [group["weight_decay"] for group in optimiser.param_groups]
        own = accelerator.unwrap_model(model)
        if is_sharded(accelerator):
            accelerator.load_state(str(folder / "sharded"))
        else:
            _load_weights(own, load_file(folder / "easyref.safetensors"), folder)
            try:
                optimiser.load_state_dict(
                    torch.load(folder / "optimiser.pt", map_location="cpu", weights_only=True)
                )
            except (ValueError, KeyError) as error:
                raise EasyRefError(
                    f"{folder} was made with other parts or sizes than are trained now ({error}), "
                    f"so it cannot be resumed even with --force. To train on from it, {_ANEW}."
                ) from error
        for group, decay in zip(optimiser.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        if accelerator.scaler is not None and (folder / "scaler.pt").is_file():
            accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        if average is not None:
            kept = folder / "easyref_ema.safetensors"
            average.load(load_file(kept) if kept.is_file() else official_state(own))


@contextmanager
def _restoring(folder: Path) -> Iterator[None]:
    """
    Raises:
        EasyRefError: in place of whatever damaged files lead to.
    """
    try:
        yield
    except (EasyRefError, torch.cuda.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # truncated files raise anything; shards, what is no Exception
        raise EasyRefError(
            f"{folder} cannot be restored ({_in_a_line(error)}). It is damaged, or was "
            "made with other parts, sizes or processes than are trained now. Start it as before, "
            f"or remove it to resume earlier, or to train on from it {_ANEW}."
        ) from error


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {lines[0]}"
    return lines[-1]  # of shards' errors, which hold each process's traceback


@torch.no_grad()
def _load_weights(model: TrainedModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight: Any = state.get(model.official_name(name))
        if weight is None or weight.numel() != parameter.numel():
            raise EasyRefError(f"{folder} does not fit: {name} is missing or of another size.")
        parameter.copy_(weight.reshape(parameter.shape))
