"""A sampling run: its conditionings are checked and noted, its keys and values computed and loaded.

The wrappers write into the run's own copy of the model options, so nothing is shared between runs
or threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key

from ..host.key_value_cache import HeldKeyValues, in_use
from .batch_index import batch_index
from .conditionings import COND_BATCH, RUN, CondBatch, Entry, Run, carried_by_all, start_run
from .retry import RETRY_KEY, retry_runs

if TYPE_CHECKING:
    from .patch import ReferencePatch

KEY = "easyref"
IDENTITY_KEY = "easyref_identity"
COMPILED_KEY = "easyref_compiled"

OUTER_SAMPLE = (
    "noise",
    "latent_image",
    "sampler",
    "sigmas",
    "denoise_mask",
    "callback",
    "disable_pbar",
    "seed",
)
"""Arguments of a guider's `outer_sample`, in order."""


def watch_runs(model: ModelPatcher) -> None:
    """Add the three wrappers to a cloned model, once, and that of another try."""
    retry_runs(model)
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)


def patches_of(model_options: Mapping[str, Any] | None) -> Sequence[ReferencePatch]:
    """The Apply nodes of a model, in order."""
    return get_wrappers_with_key(
        WrappersMP.APPLY_MODEL, KEY, model_options or {}, is_model_options=True
    )


def _outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE, called once a run."""
    guider = executor.class_obj
    _arrange_wrappers(guider.model_options)
    _check_run(guider.model_options, guider.conds.values())
    held = key_values_of_run(guider)
    given = dict(zip(OUTER_SAMPLE, args, strict=False)) | kwargs
    origins = _origins(guider, given.get("noise"), given.get("seed"))
    run = start_run(guider.conds, held, origins)
    # The guider's options are this run's own copy; the patcher's are never touched.
    guider.model_options = with_option(guider.model_options, RUN, run)
    with in_use(held):
        for patch in patches_of(guider.model_options):
            patch.key_values.leave_devices()
        return executor(*args, **kwargs)


def _origins(guider: Any, noise: Any, seed: Any) -> tuple[int, ...] | None:
    """Where the run's latents were in their batch, if it matters; see `batch_index`."""
    identities = get_wrappers_with_key(
        WrappersMP.APPLY_MODEL, IDENTITY_KEY, guider.model_options, is_model_options=True
    )
    patches = patches_of(guider.model_options)
    sources = (*patches, *identities, *carried_by_all(guider.conds.values()))
    most = max((source.batch for source in sources), default=1)
    places = batch_index(noise, seed, most) if most > 1 else None
    if places is not None and len(places) != most:
        logging.info(
            "EasyRef: of masks or tokens for each latent of a batch of %d, those of latents %s are "
            "used, whose noise it is.",
            most,
            ", ".join(str(place + 1) for place in places),
        )
    return places


def _prepare_sampling(
    executor: Callable[..., tuple[Any, Any, list[Any]]],
    model: ModelPatcher,
    noise_shape: Any,
    conds: dict[str, list[dict[str, Any]]],
    model_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, list[Any]]:
    """PREPARE_SAMPLING: ComfyUI loads models that a conditioning names together with the model."""
    run: Run = (model_options or {}).get("transformer_options", {}).get(RUN, Run())
    patchers = list(dict.fromkeys(held.patcher for held in run.key_values))
    name = next((name for name, entries in conds.items() if entries), None)
    given = conds
    if patchers and name is not None:  # in a copy: a guider may be kept beyond its run
        first, *rest = conds[name]
        models = first.get("additional_models", [])
        models = models if isinstance(models, list) else [models]
        given = {**conds, name: [{**first, "additional_models": [*models, *patchers]}, *rest]}
    real, found, loaded = executor(model, noise_shape, given, model_options=model_options, **kwargs)
    return real, conds if found is given else found, loaded


def _calc_cond_batch(
    executor: Callable[..., Any],
    model: Any,
    conds: list[list[dict[str, Any]] | None],
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> Any:
    """CALC_COND_BATCH, called once a step."""
    run: Run | None = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is None:  # a sampler of another kind
        _check_run(model_options, conds)
        run = Run()
    batch = CondBatch.of(run, conds, x_in)
    return executor(model, conds, x_in, timestep, with_option(model_options, COND_BATCH, batch))


def key_values_of_run(guider: Any) -> tuple[HeldKeyValues, ...]:
    """All keys and values that a run will use, for every device that its model runs on."""
    patcher: ModelPatcher = guider.model_patcher
    # As the model will compute; a node may have chosen another dtype, which is not set yet.
    dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    clones = patcher.get_additional_models_with_key("multigpu")
    devices = dict.fromkeys((patcher.load_device, *(clone.load_device for clone in clones)))
    carried = list(carried_by_all(guider.conds.values()))
    patches = patches_of(guider.model_options)
    return tuple(
        patch.key_values.get(tokens, device, dtype)
        for patch in patches
        for tokens in patch.tokens_of_run(carried, patches)
        for device in devices
    )


def _check_run(
    model_options: Mapping[str, Any] | None, lists: Iterable[Sequence[Entry] | None]
) -> None:
    """Let every Apply node refuse what it cannot do with these conditionings."""
    carried = list(carried_by_all(lists))
    patches = patches_of(model_options)
    for patch in patches:
        patch.check_run(carried, patches)


def with_option(model_options: Mapping[str, Any] | None, name: str, value: Any) -> dict[str, Any]:
    """A copy of the model options with one more transformer option."""
    options = dict(model_options or {})
    options["transformer_options"] = {**options.get("transformer_options", {}), name: value}
    return options


def _arrange_wrappers(model_options: Mapping[str, Any]) -> None:
    """For a run inside a run, with that run's options, ComfyUI adds the model's wrappers though
    they are there already; references would be added twice. `run_compiled` comes last."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    for applied in wrappers.values():
        for key in (KEY, IDENTITY_KEY, RETRY_KEY, COMPILED_KEY):
            if key in applied:
                applied[key] = list(dict.fromkeys(applied[key]))
        if COMPILED_KEY in applied:
            applied[COMPILED_KEY] = applied.pop(COMPILED_KEY)
