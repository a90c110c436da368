"""`easyref train` with DeepSpeed or FSDP on the CPU, as one of several processes.

    torchrun ... sharded_on_cpu.py deepspeed|fsdp STOP RECIPE [key=value ...]

accelerate offers both on GPUs only, so its processes claim to have one. STOP: the step after which
the process dies, 0 for none. Environment variables FSDP_* have the effect of accelerate's
configuration.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def pass_off(kind: str) -> None:
    state = PartialState(cpu=True)
    if kind == "fsdp":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        state.distributed_type = DistributedType.MULTI_GPU
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        state.distributed_type = DistributedType.DEEPSPEED

    plain = accelerate.Accelerator.__init__

    def without_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **(kwargs | {"cpu": False}))
        assert self.distributed_type.value == kind.upper(), self.distributed_type

    accelerate.Accelerator.__init__ = without_cpu


def main(kind: str, stop: int, recipe: str, changes: list[str]) -> None:
    pass_off(kind)
    from easyref_core.training.config import load_settings
    from easyref_core.training.loop import train

    def die(step: int, loss: float) -> None:
        if step == stop:
            os._exit(7)

    train(load_settings(recipe, changes), on_step=die)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
