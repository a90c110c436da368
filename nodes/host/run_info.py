"""What a sampling run knows of itself: which conditionings are negative, and where they act.

Two wrappers write it into the run's own copy of the model options, so nothing is shared between
runs or threads. Conditionings are told apart by their uuid. ComfyUI copies a conditioning, uuid
included, to the end of the opposite list to give an area its counterpart; therefore the first
conditioning that is known decides a list's role.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

KEY = "easyref"
_ROLES = "easyref_roles"
_CALL = "easyref_call"

Area = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """One conditioning's share of a model call's rows.

    Attributes:
        negative: it gets the unconditional reference tokens.
        area: (height, width, top, left) in latent cells, None for the whole latent.
    """

    negative: bool
    area: Area | None = None


@dataclass(frozen=True)
class CallInfo:
    """What `calc_cond_batch` was called with.

    Attributes:
        negative: role of each of its lists.
        areas: (list number, uuid) -> area.
        latent: (height, width) of the whole latent.
    """

    negative: tuple[bool, ...]
    areas: Mapping[tuple[int, Any], Area]
    latent: tuple[int, int]


def watch_runs(model: ModelPatcher) -> None:
    """Add the two wrappers to a cloned model, once."""
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _note_roles)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _note_call)


def chunks_of_call(transformer_options: Mapping[str, Any]) -> list[Chunk]:
    """Role and area of each chunk of rows of a model call, in order.

    A caller that went around ComfyUI's sampling gets the usual convention: list 0 is positive.
    """
    lists: Sequence[int] = transformer_options.get("cond_or_uncond") or [0]
    uuids: Sequence[Any] = transformer_options.get("uuids") or ()
    if len(uuids) != len(lists):  # another node cut the call up and told only the lists
        uuids = [None] * len(lists)
    call: CallInfo | None = transformer_options.get(_CALL)
    chunks: list[Chunk] = []
    for number, identity in zip(lists, uuids, strict=True):
        if call is not None and number < len(call.negative):
            chunks.append(Chunk(call.negative[number], call.areas.get((number, identity))))
        else:
            chunks.append(Chunk(number != 0))
    return chunks


def whole_latent(transformer_options: Mapping[str, Any], x: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the latent that a model call's rows were cut from."""
    call: CallInfo | None = transformer_options.get(_CALL)
    return call.latent if call is not None else (x.shape[-2], x.shape[-1])


def _with_note(model_options: Mapping[str, Any] | None, name: str, note: Any) -> dict[str, Any]:
    """A copy of the model options with one more transformer option."""
    options = dict(model_options or {})
    options["transformer_options"] = {**options.get("transformer_options", {}), name: note}
    return options


def _note_roles(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: a guider names its conditionings ("positive", "negative", "middle", ...)."""
    guider = executor.class_obj
    roles = {
        conditioning["uuid"]: "negative" in name
        for name, conditionings in guider.conds.items()
        for conditioning in conditionings
        if "uuid" in conditioning
    }
    # The guider's options are this run's own copy; the patcher's are never touched.
    guider.model_options = _with_note(guider.model_options, _ROLES, roles)
    return executor(*args, **kwargs)


def _note_call(
    executor: Callable[..., Any],
    model: Any,
    conds: list[list[dict[str, Any]] | None],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> Any:
    """CALC_COND_BATCH: the lists of a call in their order, with areas resolved."""
    transformer_options = (model_options or {}).get("transformer_options", {})
    roles: Mapping[Any, bool] = transformer_options.get(_ROLES, {})
    info = CallInfo(
        negative=_roles_of_lists(conds, roles),
        areas={
            (number, c["uuid"]): tuple(c["area"])
            for number, conditionings in enumerate(conds)
            for c in conditionings or ()
            if "area" in c and "uuid" in c
        },
        latent=(x_in.shape[-2], x_in.shape[-1]),
    )
    return executor(model, conds, x_in, timestep, _with_note(model_options, _CALL, info))


def _roles_of_lists(
    conds: Sequence[Sequence[Mapping[str, Any]] | None], roles: Mapping[Any, bool]
) -> tuple[bool, ...]:
    result: list[bool] = []
    for number, conditionings in enumerate(conds):
        known = (roles[c["uuid"]] for c in conditionings or () if c.get("uuid") in roles)
        result.append(next(known, number != 0))
    return tuple(result)
