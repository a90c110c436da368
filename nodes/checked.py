"""Every value that a node is given is checked against the node's own schema before it runs.

ComfyUI checks what is typed into a widget, but not what comes over a link: neither its range nor,
behind a link of any type, what it is; and a typed NaN passes every comparison.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.encode.group import Reference
from ..easyref_core.encode.mllm_layers import MllmLayerWeights
from ..easyref_core.errors import EasyRefError
from ..easyref_core.tokens.reference_tokens import ReferenceTokens
from ..easyref_core.untrusted import flag, number, shown, text, whole_number
from .link_types import (
    EasyRef,
    EasyRefCurve,
    EasyRefLayerWeightsLink,
    EasyRefMllmLayersLink,
    EasyRefModel,
    EasyRefReferenceGroup,
    EasyRefRegions,
    EasyRefTokens,
)
from .sampling.weights import Effect, Weight

_HINT = "Check what is connected to it."
_ROUNDING = 1e-6  # by which a sum of fractions, such as 0.3 - 0.1 * 3, may miss a border

# Types of links -> the class of their values, and what to connect. Pictures and masks are read, and
# refused, where they are used.
_VALUES: Mapping[str, tuple[type, str]] = {
    EasyRef.io_type: (EasyRefModel, "an adapter from EasyRef Loader"),
    EasyRefTokens.io_type: (ReferenceTokens, "reference tokens, as from EasyRef Encode"),
    EasyRefLayerWeightsLink.io_type: (LayerWeights, "weights from EasyRef Layer Weights"),
    EasyRefMllmLayersLink.io_type: (MllmLayerWeights, "weights from EasyRef MLLM Layers"),
    EasyRefCurve.io_type: (Weight, "a curve, as from EasyRef Weight Curve or EasyRef Stages"),
    io.Model.io_type: (ModelPatcher, "a diffusion model, as from Load Checkpoint"),
}
_GROUPS: Mapping[str, tuple[type, str]] = {
    EasyRefReferenceGroup.io_type: (Reference, "a group of pictures from EasyRef References"),
    EasyRefRegions.io_type: (Effect, "regions from EasyRef Region"),
}


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Let a node's `execute` check its inputs first; put before the class.

    Numbers of other kinds arrive as Python's own. An optional input that is given nothing counts as
    not connected.

    Raises:
        EasyRefError: from `execute`: an input is missing, of another type, or out of its range.
    """
    execute: Callable[..., io.NodeOutput] = node.execute.__func__
    parameters = list(inspect.signature(execute).parameters.values())[1:]
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}

    @wraps(execute)
    def checked_execute(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        given = {**{p.name: value for p, value in zip(parameters, args, strict=False)}, **kwargs}
        for declared in _inputs(node):
            name = declared.id
            if name not in given:
                if name in needed:
                    raise EasyRefError(f"{name} is missing. Connect it, or set it on the node.")
            elif given[name] is None and declared.optional:
                del given[name]
            else:
                given[name] = _checked_value(node, declared, name, given[name])
        return execute(cls, **given)

    node.execute = classmethod(checked_execute)
    return node


@cache
def _inputs(node: type[io.ComfyNode]) -> tuple[io.Input, ...]:
    """What a node's schema declares. Read once: a schema lists the files of folders anew."""
    return tuple(node.define_schema().inputs)


def _checked_value(node: type[io.ComfyNode], declared: io.Input, name: str, value: Any) -> Any:
    kind = declared.get_io_type()
    if isinstance(declared, io.Float.Input):
        return _number(value, name, declared.min, declared.max)
    if isinstance(declared, io.Int.Input):
        return whole_number(value, name, declared.min, declared.max, _HINT)
    if isinstance(declared, io.Boolean.Input):
        return _flag(value, name)
    if isinstance(declared, io.String.Input):
        return text(value, name, _HINT)
    if isinstance(declared, io.Combo.Input):
        return _choice(node, declared, name, value)
    if isinstance(declared, io.Autogrow.Input) and isinstance(value, Mapping):
        socket = declared.template.input
        return {
            name: _checked_value(node, socket, name, value[name])
            for name in declared.template.names
            if value.get(name) is not None
        }
    if kind in _VALUES:
        wanted, what = _VALUES[kind]
        if not isinstance(value, wanted):
            raise _unusable(name, value, what)
    if kind in _GROUPS:
        wanted, what = _GROUPS[kind]
        if not _is_list(value) or not all(isinstance(item, wanted) for item in value):
            raise _unusable(name, value, what)
        return tuple(value)
    if kind == io.Vae.io_type and not all(hasattr(value, way) for way in ("encode", "decode")):
        raise _unusable(name, value, "a VAE, as from Load Checkpoint or Load VAE")
    if kind == io.Conditioning.io_type and not (_is_list(value) and all(map(_is_prompt, value))):
        raise _unusable(name, value, "a conditioning, as from CLIP Text Encode")
    return value


def _number(value: Any, name: str, low: float, high: float) -> float:
    """A number within its range, or beyond it by a rounding error."""
    rounding = _ROUNDING * max(1.0, high - low)
    with contextlib.suppress(EasyRefError):
        return min(max(number(value, name, low - rounding, high + rounding), low), high)
    return number(value, name, low, high, _HINT)  # the error, with the range itself


def _flag(value: Any, name: str) -> bool:
    """True or false; numpy's and torch's too, and 0 and 1, which other packs give as such."""
    if getattr(value, "shape", None) == () and hasattr(value, "tolist"):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # a tensor without data
            value = value.tolist()
    return flag(bool(value) if type(value) is int and value in (0, 1) else value, name, _HINT)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_prompt(entry: Any) -> bool:
    """Whether it is an entry of a conditioning: text states and settings."""
    return _is_list(entry) and len(entry) >= 2 and isinstance(entry[1], Mapping)


def _choice(node: type[io.ComfyNode], declared: io.Input, name: str, value: Any) -> str:
    """One of a combo's options. Files come and go, so lists of them are left to the node: combos
    that `validate_inputs` names, and options that are more than a plain list."""
    chosen, options = text(value, name, _HINT), declared.options
    left_to_node = name in inspect.signature(node.validate_inputs).parameters
    if not left_to_node and type(options) is list and chosen not in options:
        raise _unusable(name, value, f"one of {', '.join(options)}")
    return chosen


def _unusable(name: str, value: Any, wanted: str) -> EasyRefError:
    return EasyRefError(f"{name} is {shown(value)}; it must be {wanted}. {_HINT}")
