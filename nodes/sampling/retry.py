"""A sampling run that lacks memory is tried once more with all of it free, then refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...easyref_core.errors import EasyRefError
from ..host.out_of_memory import lack_of_memory

RETRY_KEY = "easyref_retry"


def retry_runs(model: ModelPatcher) -> None:
    """Add the wrapper to a cloned model, once; before those that it tries again."""
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, RETRY_KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, RETRY_KEY, _outer_sample)


def _outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE, called once a run.

    Raises:
        EasyRefError: memory ran out again.
    """
    guider = executor.class_obj
    # A run replaces them, and changes the entries of its conditionings.
    conds, options = guider.conds, guider.model_options
    for _ in range(2):
        guider.conds = {name: [dict(entry) for entry in conds[name] or ()] for name in conds}
        guider.model_options = options
        try:
            return executor(*args, **kwargs)
        except Exception as error:
            reason = lack_of_memory(error)
            if reason is None:
                raise
        # Outside the except block, where the traceback no longer holds the tensors.
        logging.warning(
            "EasyRef: sampling ran out of memory (%s); all models are unloaded.", reason
        )
        mm.unload_all_models()
        mm.soft_empty_cache()
    raise EasyRefError(
        f"Not enough memory to sample with references ({reason}). Everything was unloaded; the "
        "graph can be queued again. Use a smaller picture or batch, or fewer reference groups at "
        "once."
    )
