"""Checkpoints of a run: written whole or not at all, checked when resumed, the newest few kept.

All randomness comes from the seed and a sample's position, so weights, optimiser and step number
are the whole state. On DeepSpeed and FSDP accelerate writes its own sharded files beside them.

    checkpoint-STEP/NAME.safetensors        trained weights, by checkpoint name
    checkpoint-STEP/NAME_ema.safetensors    their averages, where there are any
    checkpoint-STEP/optimiser.pt            (scaler.pt in fp16)
    checkpoint-STEP/state.json              step, processes, how the state is sharded, settings,
                                            and the checksums of all files
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import EasyRefError
from ..files import make_folder, sweep, sync, sync_tree
from ..untrusted import escaped
from .disk import save_weights, writing
from .engine import Ema, TrainableModule
from .processes import WHOLE_STATE, is_main_process, is_sharded, sharding_name
from .progress import LOSSES
from .recipe import differences, parse_settings
from .restoring import load_weights, restoring
from .state_file import STATE_FILE, check_files, read_state, write_state

_FOLDER = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = re.compile(r"\.checkpoint-\d+\.tmp")


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
    """(step, folder) of every checkpoint in a run's folder, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
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
        anew: how to begin the run anew, for error messages.
    """

    folder: Path
    settings: Any
    keep: int
    fresh_start: str
    anew: str
    free: Sequence[str] = ()
    name: str = "easyref"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def newest(self, processes: int, force: bool = False) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint that is not damaged; None to start from step 0.

        Damaged ones are named on standard error.

        Raises:
            OtherSettings: it was made with other settings or by another number of processes,
                unless `force`.
            EasyRefError: all are damaged, or not of this program.
        """
        self.check_own()
        damage = None
        for step, folder in reversed(list_checkpoints(self.folder)):
            try:
                state = read_state(folder)
                check_files(folder, state)
                state["settings"].pop("source", None)  # older checkpoints name their recipe
                # Settings that did not exist then have today's defaults.
                saved = parse_settings(type(self.settings), state["settings"])
            except EasyRefError as error:
                damage = damage or f"{folder} is damaged: {error}"
                if is_main_process():
                    print(f"{escaped(str(folder))} is damaged: {error}", file=sys.stderr)
                continue
            if damage is not None and is_main_process():
                print(f"resuming {escaped(str(folder))} instead", file=sys.stderr)
            self._check_settings(folder, state, saved, processes, force)
            return step, folder
        if damage is not None:
            raise EasyRefError(
                f"{damage} There is no other checkpoint to resume. Put back a copy of it, or "
                f"{self.anew}."
            )
        return None

    def _check_settings(
        self, folder: Path, state: Mapping[str, Any], saved: Any, processes: int, force: bool
    ) -> None:
        named = differences(dataclasses.asdict(saved), dataclasses.asdict(self.settings))
        changed = [difference for difference in named if not self._is_free(difference)]
        before = state.get("processes", processes)
        if before != processes:
            changed.append(f"processes: {before} -> {processes}")
        if changed and not force:
            raise OtherSettings(folder, changed)

    def check_own(self) -> None:
        """Check that all folders named like checkpoints are: those of a run are removed in time.

        Raises:
            EasyRefError: one is something else.
        """
        own = (STATE_FILE, "optimiser.pt", f"{self.name}.safetensors")
        for _, folder in list_checkpoints(self.folder):
            if not any((folder / name).is_file() for name in own):
                raise EasyRefError(
                    f"{escaped(str(folder))} is no checkpoint of this program, as it has neither "
                    f"{' nor '.join(own)}. Move it away, or choose another folder for the run."
                )

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
        before = read_state(folder).get("strategy")
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
                    make_folder(temporary)
                accelerator.wait_for_everyone()
                whole = gathered_state(accelerator, model)
                if whole is not None:
                    accelerator.save_state(str(temporary / "sharded"))
                if accelerator.is_main_process:
                    self._write(temporary, accelerator, model, optimiser, whole, ema, step)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    sync_tree(temporary)
                    if (self.folder / LOSSES).is_file():  # its lines up to this step
                        sync(self.folder / LOSSES)
                    shutil.rmtree(final, ignore_errors=True)  # a damaged one
                    os.rename(temporary, final)
                    sync(self.folder)
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
        write_state(folder, state)

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

    def clear(self, overwrite: bool) -> None:
        """Remove what a killed run has left half written. For one process, before the first step.

        Args:
            overwrite: remove the checkpoints and the losses of the run before, too.

        Raises:
            EasyRefError: they cannot be removed.
        """
        with writing(self.folder):
            sweep(self.folder)
            for path in self.folder.glob(".checkpoint-*.tmp"):
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
            if overwrite:
                for _, checkpoint in list_checkpoints(self.folder):
                    shutil.rmtree(checkpoint)
                (self.folder / LOSSES).unlink(missing_ok=True)

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

        with restoring(folder, self.fresh_start):
            decays = [group["weight_decay"] for group in optimiser.param_groups]
            own = accelerator.unwrap_model(model)
            if is_sharded(accelerator):
                accelerator.load_state(str(folder / "sharded"))
            else:
                load_weights(own, load_file(folder / f"{self.name}.safetensors"), folder)
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
