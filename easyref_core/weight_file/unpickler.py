"""What a pickle of tensors says, without running it.

A pickle names functions and calls them. Here each name stands for one of this file's own functions,
which only note what they are given; any other name is refused, and no object is ever built by its
class. Sources: `torch._utils` (how tensors are pickled) and `torch.serialization` (storages).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple

from .dtypes import SIZES
from .stored import MAX_DIMENSIONS

MAX_CONTAINERS = 150_000  # an adapter with SDXL has 25,000


class Storage(NamedTuple):
    """Numbers in the file, of which tensors are made."""

    dtype: str
    key: str
    count: int


class View(NamedTuple):
    """A tensor over a storage; offset and strides in numbers of its dtype."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unreadable(NamedTuple):
    """A tensor of another kind, or a value that is none."""

    kind: str


class ForeignName(Exception):
    """The pickle names something that has no place among tensors."""


def _storage(dtype: str, key: Any, _location: Any, count: Any, view: Any = None) -> Storage:
    if not isinstance(dtype, str) or view is not None:
        raise ValueError("a storage of an unknown kind")
    return Storage(dtype, str(key), _size(count))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """`torch._utils._rebuild_tensor` and `_v2`; `_v3` gives the dtype as the third of the rest."""
    if not isinstance(storage, Storage) or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise ValueError("a tensor of an unknown kind")
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else storage.dtype
    sizes, steps = tuple(map(_size, shape)), tuple(map(_size, strides))
    return View(storage, dtype, _size(offset), sizes, steps)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a size that is no whole number")
    return value


def _first(value: Any, *_: Any) -> Any:
    return value


def _call(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes of its own."""
    return function(*arguments)


def _ordered(items: Any = ()) -> dict[str, Any]:
    return _named(items)


def _named(items: Iterable[Any]) -> dict[str, Any]:
    """Other keys can be chosen so that a dict takes minutes to fill."""
    return {key: value for key, value in items if isinstance(key, str)}


def _other(kind: str, *_: Any) -> Unreadable:
    return Unreadable(kind)


_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
}
_TENSORS = "torch._utils"
_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    (_TENSORS, "_rebuild_tensor"): _tensor,
    (_TENSORS, "_rebuild_tensor_v2"): _tensor,
    (_TENSORS, "_rebuild_tensor_v3"): _tensor,
    (_TENSORS, "_rebuild_parameter"): _first,
    (_TENSORS, "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _call,
    # Values that stand beside tensors, and are not used.
    **{
        name: partial(_other, name[1])
        for name in (
            ("_codecs", "encode"),
            *(("builtins", kind) for kind in ("bytearray", "complex", "set")),
            *(("__builtin__", kind) for kind in ("bytearray", "complex", "set")),
            ("collections", "Counter"),
            *(("torch", kind) for kind in ("Size", "Tensor", "device")),
            ("torch._tensor", "Tensor"),
            ("torch.nn.parameter", "Parameter"),
            ("torch.serialization", "_get_layout"),
        )
    },
}
_OTHER_TENSORS = {  # as `_rebuild_sparse_tensor`
    "sparse": "sparse",
    "sparse_csr": "sparse",
    "qtensor": "quantised",
    "meta_tensor_no_storage": "meta",
    "nested_tensor": "nested",
    "wrapper_subclass": "of another class",
    "device_tensor_from_numpy": "of another device",
    "device_tensor_from_cpu_tensor": "of another device",
}


def _function(module: str, name: str) -> Any:
    """What a name in a pickle stands for here."""
    if (module, name) in _NAMES:
        return _NAMES[module, name]
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        kind = name.removesuffix("Storage")
        return _STORAGES.get(kind, f"of {name}")
    if module == "torch" and name in SIZES:
        return name
    if module == "torch" and name in ("strided", "per_tensor_affine", "per_channel_affine"):
        return name
    if module == _TENSORS and name.startswith("_rebuild_"):
        kind = name.removeprefix("_rebuild_").removesuffix("_tensor")
        found = _OTHER_TENSORS.get(kind) or _OTHER_TENSORS.get(name.removeprefix("_rebuild_"))
        if found:
            return partial(_other, found)
    raise ForeignName(f"{module}.{name}")


# What `torch.save` writes; text forms of numbers and buffers of any size are not in it.
_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.POP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)
_OF_CONTAINERS = (
    *(pickle.MARK, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.REDUCE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
)
_OF_OBJECTS = (pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ)


def _counted(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    """Millions of lists would take more time and memory than their bytes in the file promise."""

    def counted(unpickler: TensorUnpickler) -> None:
        unpickler.containers += 1
        if unpickler.containers > MAX_CONTAINERS:
            raise ValueError(f"it is made of more than {MAX_CONTAINERS:,} parts")
        instruction(unpickler)

    return counted


class TensorUnpickler(pickle._Unpickler):  # the one in Python: its instructions can be chosen
    """Reads values whose tensors are `View`. Of dicts only the entries that have a name are kept.

    Attributes:
        storages: by key, all that tensors were made of.
        containers: how many lists, tuples and dicts were built.
    """

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.containers = 0

    def load(self) -> Any:
        self.memo = {}
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        return _function(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or not pid or pid[0] != "storage":
            raise ValueError("a reference to something that is no storage")
        found = _storage(*pid[1:])
        self.storages[found.key] = found
        return found

    def _set_items(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_named(zip(items[::2], items[1::2], strict=True)))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_named([(key, value)]))

    def _ignore_state(self) -> None:
        """An OrderedDict's attributes, such as a state dict's versions."""
        self.stack.pop()

    def _set(self) -> None:
        self.append(Unreadable("set"))

    def _ignore_items(self) -> None:
        """What is put into a set, which is not used."""
        self.pop_mark()

    def _refuse(self) -> None:
        raise ForeignName("an object")

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS},
        **{code[0]: _counted(pickle._Unpickler.dispatch[code[0]]) for code in _OF_CONTAINERS},
        **dict.fromkeys((code[0] for code in _OF_OBJECTS), _refuse),
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _ignore_state,
        pickle.EMPTY_SET[0]: _counted(_set),
        pickle.ADDITEMS[0]: _ignore_items,
    }


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of numbers that lie one after another."""
    return tuple(math.prod(max(size, 1) for size in shape[n + 1 :]) for n in range(len(shape)))
