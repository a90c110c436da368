"""What a sampling run knows of itself: which conditionings are negative, where they act, and which
carry reference tokens of their own.

Wrappers write it into the run's own copy of the model options, so nothing is shared between
runs or threads. Conditionings are told apart by their uuid. ComfyUI copies a conditioning, uuid
included, to the end of the opposite list to give an area its counterpart; therefore the first
conditioning that is known decides a list's role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key

from ..host.key_value_cache import HeldKeyValues, in_use
from .carried import CarriedTokens, Use, carried_by, lent_to_negative, uses_of
from .frames import window_size

KEY = "easyref"
_RUN = "easyref_run"
_CALL = "easyref_call"

Area = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """One conditioning's share of a model call's rows.

    Attributes:
        negative: it gets the unconditional reference tokens.
        area: (height, width, top, left) in latent cells, None for the whole latent.
        uses: tokens that it gets instead of an Apply node's own, at most one of each adapter.
        lent: whose unconditional half it gets where no Apply node has tokens of its own.
    """

    negative: bool
    area: Area | None = None
    uses: tuple[Use, ...] = ()
    lent: tuple[CarriedTokens, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """What a run began with.

    Attributes:
        roles: uuid of a conditioning -> whether it is negative.
        lent: as `Chunk.lent` of the negative ones.
        held: keys and values that stay as long as the run does.
    """

    roles: Mapping[Any, bool] = field(default_factory=dict)
    lent: tuple[CarriedTokens, ...] = ()
    held: tuple[HeldKeyValues, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> RunInfo:
        return self  # nodes that copy a run's options at every step would copy all it holds


@dataclass(frozen=True)
class CallInfo:
    """What `calc_cond_batch` was called with.

    Attributes:
        negative: role of each of its lists.
        entries: (list number, uuid) -> that conditioning's share.
        lent: as `Chunk.lent` of the negative lists.
        latent: (height, width) of the whole latent.
        latents: of its batch.
    """

    negative: tuple[bool, ...]
    entries: Mapping[tuple[int, Any], Chunk]
    lent: tuple[CarriedTokens, ...]
    latent: tuple[int, int]
    latents: int

    def chunk(self, number: int, identity: Any) -> Chunk:
        """The share of one of a list's conditionings, which another node may have brought."""
        negative = self.negative[number]
        return self.entries.get((number, identity)) or Chunk(
            negative, lent=self.lent if negative else ()
        )


def watch_runs(model: ModelPatcher) -> None:
    """Add the three wrappers to a cloned model, once."""
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _note_run)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _load_key_values)
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
            chunks.append(call.chunk(number, identity))
        else:
            chunks.append(Chunk(number != 0))
    return chunks


def whole_latent(transformer_options: Mapping[str, Any], x: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the latent that a model call's rows were cut from."""
    call: CallInfo | None = transformer_options.get(_CALL)
    return call.latent if call is not None else (x.shape[-2], x.shape[-1])


def rows_of_each(transformer_options: Mapping[str, Any]) -> list[int]:
    """How many rows ComfyUI can have given each conditioning of a model call, most likely first.

    Those of a window of frames, which may have been cut behind the notes, and those of the notes;
    none where nothing is known.
    """
    call: CallInfo | None = transformer_options.get(_CALL)
    found = (window_size(transformer_options), call.latents if call is not None else None)
    return [rows for rows in found if rows]


def _with_note(model_options: Mapping[str, Any] | None, name: str, note: Any) -> dict[str, Any]:
    """A copy of the model options with one more transformer option."""
    options = dict(model_options or {})
    options["transformer_options"] = {**options.get("transformer_options", {}), name: note}
    return options


def _note_run(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE: a guider names its conditionings ("positive", "negative", "middle", ...)."""
    guider = executor.class_obj
    negative = {name: "negative" in name for name in guider.conds}
    roles = {
        conditioning["uuid"]: negative[name]
        for name, conditionings in guider.conds.items()
        for conditioning in conditionings
        if "uuid" in conditioning
    }
    _take_each_once(guider.model_options)
    _check_run(guider.model_options, guider.conds.values())
    held = _hold_key_values(guider)
    run = RunInfo(roles, lent_to_negative(guider.conds, negative), held)
    # The guider's options are this run's own copy; the patcher's are never touched.
    guider.model_options = _with_note(guider.model_options, _RUN, run)
    with in_use(held):
        for application in _applications(guider.model_options):
            application.key_values.leave_devices()
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
    run: RunInfo | None = transformer_options.get(_RUN)
    if run is None:  # a sampler of another kind
        _check_run(model_options, conds)
        run = RunInfo()
    negative = _roles_of_lists(conds, run.roles)
    info = CallInfo(
        negative=negative,
        entries={
            (number, c["uuid"]): Chunk(
                negative[number],
                tuple(c["area"]) if "area" in c else None,
                uses_of(c, negative[number], run.roles, conditionings),
                run.lent if negative[number] else (),
            )
            for number, conditionings in enumerate(conds)
            for c in conditionings or ()
            if "uuid" in c
        },
        lent=run.lent,
        latent=(x_in.shape[-2], x_in.shape[-1]),
        latents=x_in.shape[0],
    )
    return executor(model, conds, x_in, timestep, _with_note(model_options, _CALL, info))


def _hold_key_values(guider: Any) -> tuple[HeldKeyValues, ...]:
    """All keys and values that the run will use, for every device that the model runs on."""
    patcher: ModelPatcher = guider.model_patcher
    # As the model will compute; a node may have chosen another dtype, which is not set yet.
    dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    clones = patcher.get_additional_models_with_key("multigpu")
    devices = dict.fromkeys((patcher.load_device, *(clone.load_device for clone in clones)))
    carried = _carried(guider.conds.values())
    applications = _applications(guider.model_options)
    return tuple(
        application.key_values.get(tokens, device, dtype)
        for application in applications
        for tokens in application.tokens_of_run(carried, applications)
        for device in devices
    )


def _load_key_values(
    executor: Callable[..., tuple[Any, Any, list[Any]]],
    model: ModelPatcher,
    noise_shape: Any,
    conds: dict[str, list[dict[str, Any]]],
    model_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, list[Any]]:
    """PREPARE_SAMPLING: ComfyUI loads models that a conditioning names together with the model."""
    run: RunInfo | None = (model_options or {}).get("transformer_options", {}).get(_RUN)
    sets = list(dict.fromkeys(one.patcher for one in run.held)) if run is not None else []
    name = next((name for name, entries in conds.items() if entries), None)
    given = conds
    if sets and name is not None:  # in a copy: a guider may be kept beyond its run
        first, *rest = conds[name]
        models = first.get("additional_models", [])
        models = models if isinstance(models, list) else [models]
        given = {**conds, name: [{**first, "additional_models": [*models, *sets]}, *rest]}
    real, found, loaded = executor(model, noise_shape, given, model_options=model_options, **kwargs)
    return real, conds if found is given else found, loaded


def _check_run(
    model_options: Mapping[str, Any] | None, lists: Iterable[Sequence[Mapping[str, Any]] | None]
) -> None:
    """Let every Apply node refuse what it cannot do with these conditionings."""
    carried = _carried(lists)
    applications = _applications(model_options)
    for application in applications:
        application.check_run(carried, applications)


def _carried(
    lists: Iterable[Sequence[Mapping[str, Any]] | None],
) -> list[CarriedTokens]:
    return [one for entries in lists for entry in entries or () for one in carried_by(entry)]


def _applications(model_options: Mapping[str, Any] | None) -> Sequence[Any]:
    """The Apply nodes of a model."""
    return get_wrappers_with_key(
        WrappersMP.APPLY_MODEL, KEY, model_options or {}, is_model_options=True
    )


def _take_each_once(model_options: Mapping[str, Any]) -> None:
    """To a run inside a run, with the options of that run, ComfyUI adds the model's wrappers though
    they are there already; its references would act twice."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    applied = wrappers.get(WrappersMP.APPLY_MODEL, {})
    if KEY in applied:
        applied[KEY] = list(dict.fromkeys(applied[KEY]))


def _roles_of_lists(
    conds: Sequence[Sequence[Mapping[str, Any]] | None], roles: Mapping[Any, bool]
) -> tuple[bool, ...]:
    result: list[bool] = []
    for number, conditionings in enumerate(conds):
        known = (roles[c["uuid"]] for c in conditionings or () if c.get("uuid") in roles)
        result.append(next(known, number != 0))
    return tuple(result)
