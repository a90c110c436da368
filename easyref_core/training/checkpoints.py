"""Checkpoints of a run: written whole or not at all, the newest few kept.

All randomness comes from the seed and a sample's position, so weights, optimiser and step number
are the whole state. On DeepSpeed and FSDP accelerate writes its own sharded files beside them.

    checkpoint-STEP/NAME.safetensors        trained weights, by checkpoint name
    checkpoint-STEP/NAME_ema.safetensors    their averages, where there are any
    checkpoint-STEP/optimiser.pt            (scaler.pt in fp16)
    checkpoint-STEP/state.json              step, processes, how the state is sharded, settings
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import EasyRefError
from .disk import save_weights, writing
from .engine import Ema, TrainableModule
from .processes import WHOLE_STATE, is_sharded, sharding_name
from .recipe import differences, parse_settings

_FOLDER = re.compile(r"^checkpoint-(\d+)$")


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


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint in a run's folder, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_FOLDER.match(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def gathered_state(
    accelerator: Accelerator, model: torch.nn.Module
) -> dict[str, torch.Tensor] | None:
    """The model's whole state dict where it is sharded, else None. A collective call."""
    return accelerator.get_state_dict(model) if is_sharded(accelerator) else None


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: of the run.
        settings: dataclass that a checkpoint must agree with to be resumed.
        free: settings that may differ, because they do not change what is computed.
        keep: newest checkpoints kept.
        name: of the weights' files.
        metadata: of the weights' files.
        fresh_start: how to train on from weights that cannot be resumed, for error messages.
    """

    folder: Path
    settings: Any
    keep: int
    fresh_start: str
    free: Sequence[str] = ()
    name: str = "easyref"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def newest(self, processes: int, force: bool = False) -> tuple[int, Path] | None:
        """(step, folder) of the checkpoint to resume; None to start from step 0.

        Raises:
            OtherSettings: it was made with other settings or by another number of processes,
                unless `force`.
            EasyRefError: it is damaged.
        """
        existing = list_checkpoints(self.folder)
        if not existing:
            return None
        step, folder = existing[-1]
        state = _read_state(folder)
        try:
            state["settings"].pop("source", None)  # older checkpoints name their recipe
            # Settings that did not exist then have today's defaults.
            saved = parse_settings(type(self.settings), state["settings"])
        except (KeyError, AttributeError, TypeError, EasyRefError) as error:
            raise _damaged(folder, error) from None
        named = differences(dataclasses.asdict(saved), dataclasses.asdict(self.settings))
        changed = [difference for difference in named if not self._is_free(difference)]
        before = state.get("processes", processes)
        if before != processes:
            changed.append(f"processes: {before} -> {processes}")
        if changed and not force:
            raise OtherSettings(folder, changed)
        return step, folder

    def _is_free(self, difference: str) -> bool:
        name = difference.partition(":")[0]
        return any(name == free or name.startswith(f"{free}.") for free in self.free)

    def check(self, accelerator: Accelerator, checkpoint: tuple[int, Path] | None) -> None:
        """Check the checkpoint of `newest` against the joined processes. A collective call.

        Raises:
            EasyRefError: the processes found different ones, or it was made with its state sharded
                in another way.
        """
        steps = gather_object([0 if checkpoint is None else checkpoint[0]])
        if len(set(steps)) > 1:
            shown = ", ".join(f"step {step}" if step else "none" for step in steps)
            raise EasyRefError(
                f"The processes found different checkpoints ({shown}). output.folder must be on "
                "storage that every machine sees."
            )
        if checkpoint is None:
            return
        _, folder = checkpoint
        now = sharding_name(accelerator)
        before = _read_state(folder).get("strategy")
        if before is None:  # older checkpoints do not name it
            sharded = (folder / "sharded").is_dir()
            same = sharded == is_sharded(accelerator)
            before = now if same else "sharded" if sharded else WHOLE_STATE
        if before != now:
            raise EasyRefError(
                f"{folder} was made with its state {before}, which is now {now}, so it cannot be "
                f"resumed even with --force. Start it as before, or {self.fresh_start}."
            )

    def save(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        ema: Ema | None,
        step: int,
    ) -> None:
        """Write a checkpoint under a temporary name, rename it, then remove the oldest.

        A collective call.

        Raises:
            EasyRefError: the disk is full or not writable; earlier checkpoints are intact.
        """
        final = self.folder / f"checkpoint-{step}"
        temporary = self.folder / f".checkpoint-{step}.tmp"
        try:
            with writing(final):
                if accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                accelerator.wait_for_everyone()
                whole = gathered_state(accelerator, model)
                if whole is not None:
                    accelerator.save_state(str(temporary / "sharded"))
                if accelerator.is_main_process:
                    self._write(temporary, accelerator, model, optimiser, whole, ema, step)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    shutil.rmtree(final, ignore_errors=True)
                    temporary.rename(final)
                    for _, old in list_checkpoints(self.folder)[: -self.keep]:
                        shutil.rmtree(old, ignore_errors=True)
        except EasyRefError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        whole: dict[str, torch.Tensor] | None,
        ema: Ema | None,
        step: int,
    ) -> None:
        self.save_weights(accelerator.unwrap_model(model), whole, ema, folder)
        if whole is None:
            torch.save(optimiser.state_dict(), folder / "optimiser.pt")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")
        state = {
            "step": step,
            "processes": accelerator.num_processes,
            "strategy": sharding_name(accelerator),
            "settings": dataclasses.asdict(self.settings),
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    def save_weights(
        self,
        model: TrainableModule,
        whole: dict[str, torch.Tensor] | None,
        ema: Ema | None,
        folder: Path,
    ) -> Path:
        """Write the weights, and their averages, into a folder; returns the weights' file.

        Args:
            whole: of `gathered_state`.
        """
        path = folder / f"{self.name}.safetensors"
        save_weights(model.checkpoint_state(whole), path, self.metadata)
        if ema is not None:
            averaged = model.checkpoint_state(replaced=ema.weights)
            save_weights(averaged, folder / f"{self.name}_ema.safetensors", self.metadata)
        return path

    def remove(self) -> None:
        """Remove the checkpoints and the losses of the run before."""
        for _, checkpoint in list_checkpoints(self.folder):
            shutil.rmtree(checkpoint)
        (self.folder / "losses.jsonl").unlink(missing_ok=True)

    def restore(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        ema: Ema | None,
        folder: Path,
    ) -> None:
        """Load a checkpoint into a prepared model and optimiser.

        What --force may have changed follows the settings: the optimiser's weight decay, and
        averages that the checkpoint lacks start at its weights.

        Raises:
            EasyRefError: it is damaged or does not fit.
        """
        from safetensors.torch import load_file

        with self._restoring(folder):
            decays = [group["weight_decay"] for group in optimiser.param_groups]
            own = accelerator.unwrap_model(model)
            if is_sharded(accelerator):
                accelerator.load_state(str(folder / "sharded"))
            else:
                _load_weights(own, load_file(folder / f"{self.name}.safetensors"), folder)
                path = folder / "optimiser.pt"
                state = torch.load(path, map_location="cpu", weights_only=True)
                try:
                    optimiser.load_state_dict(state)
                except (ValueError, KeyError) as error:
                    raise EasyRefError(
                        f"{folder} was made with other parts or sizes than are trained now "
                        f"({error}), so it cannot be resumed even with --force. Instead, "
                        f"{self.fresh_start}."
                    ) from error
            for group, decay in zip(optimiser.param_groups, decays, strict=True):
                group["weight_decay"] = decay
            scaler = folder / "scaler.pt"
            if accelerator.scaler is not None and scaler.is_file():
                accelerator.scaler.load_state_dict(torch.load(scaler, weights_only=True))
            if ema is not None:
                averages = folder / f"{self.name}_ema.safetensors"
                ema.load(load_file(averages) if averages.is_file() else own.checkpoint_state())

    @contextmanager
    def _restoring(self, folder: Path) -> Iterator[None]:
        """
        Raises:
            EasyRefError: in place of whatever damaged files lead to.
        """
        try:
            yield
        except (EasyRefError, torch.cuda.OutOfMemoryError, KeyboardInterrupt, SystemExit):
            raise
        # Truncated files raise anything; shards, what is not an Exception.
        except BaseException as error:
            raise EasyRefError(
                f"{folder} cannot be restored ({_one_line(error)}). It is damaged, or was made "
                "with other parts, sizes or processes than are trained now. Start it as before, "
                f"remove it to resume earlier, or {self.fresh_start}."
            ) from error


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


def _damaged(folder: Path, reason: object) -> EasyRefError:
    return EasyRefError(f"{folder} is damaged ({reason}). Remove it to resume earlier.")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {lines[0]}"
    return lines[-1]  # errors of shards hold each process's traceback


@torch.no_grad()
def _load_weights(model: TrainableModule, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    for name, parameter in model.trained_parameters().items():
        weight = state.get(name)
        if weight is None or weight.numel() != parameter.numel():
            raise EasyRefError(f"{folder} does not fit: {name} is missing or of another size.")
        parameter.copy_(weight.reshape(parameter.shape))
