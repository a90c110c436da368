"""Processes that share a run: who they are, what the first one does for all."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..devices import best_device, usable_device
from ..errors import EasyRefError
from ..untrusted import shown
from .store import SHARED, writing

_Value = TypeVar("_Value")

_TIMEOUT = timedelta(days=7)  # one may train or generate for long while the others are done
_SEEN_WITHIN = 10.0  # seconds, which network file systems may keep a folder's old state


@dataclass(frozen=True)
class Processes:
    """Those that the launcher has started.

    Attributes:
        count, index: how many, and which one this is.
        device: of this one.
    """

    count: int
    index: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def all_values(self, value: Any) -> list[Any]:
        """Each process's value, in their order; every process must call it."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def on_main(self, function: Callable[[], _Value]) -> _Value:
        """What a function returns in the first process; every process must call it.

        Raises:
            EasyRefError: in the first process, where it failed.
            SystemExit: in the others then, which need not say it again.
        """
        if self.count == 1:
            return function()
        message: list[Any] = [None, None]  # value, whether it failed
        if self.is_main:
            try:
                message = [function(), False]
            except BaseException:
                torch.distributed.broadcast_object_list([None, True])
                raise
        torch.distributed.broadcast_object_list(message)
        if message[1]:
            raise SystemExit(1)
        return message[0]

    def check_shared(self, folder: Path) -> None:
        """Every process must call it.

        Raises:
            EasyRefError: a process does not see the first one's folder.
        """
        if self.count == 1:
            return
        mark = folder / SHARED

        def write() -> str:
            token = uuid.uuid4().hex
            with writing(mark):
                mark.write_text(token)
            return token

        token = self.on_main(write)
        blind = [n for n, sees in enumerate(self.all_values(_holds(mark, token))) if not sees]
        if self.is_main:
            mark.unlink(missing_ok=True)
        if blind:
            if not self.is_main:
                raise SystemExit(1)
            raise EasyRefError(
                f"--out is {shown(folder, 300)}, but process {blind[0]} of {self.count} finds "
                "another folder there. Name a folder that all computers share."
            )


def _holds(file: Path, content: str) -> bool:
    """Whether a file has this content, now or in a moment."""
    end = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            if file.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def join(device: str) -> Processes:
    """Join the processes that the launcher has started.

    Args:
        device: of one process; empty for a GPU where there is one.

    Raises:
        EasyRefError: no such device.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(1, 0, usable_device(device or best_device()))
    from accelerate import PartialState

    cpu = torch.device(device).type == "cpu" if device else not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=_TIMEOUT)
    if state.num_processes != count:
        raise EasyRefError(
            f"{count} processes were started, but accelerate sees {state.num_processes}. Start "
            "them with accelerate launch, with a configuration for this computer."
        )
    return Processes(count, state.process_index, usable_device(str(state.device)))
