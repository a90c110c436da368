"""A weight file: its names and shapes, then its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

from ..errors import EasyRefError
from ..untrusted import escaped, open_regular, shown
from .dtypes import WEIGHTS
from .layout import is_index, places_and_metadata
from .pytorch_index import read_index
from .safetensors_header import read_header
from .scales import Scale, scaled_bytes, split_scales
from .shards import MAX_SHARDS, SET
from .stamp import FileStamp, file_state
from .stored import TensorInfo, read_bytes

if TYPE_CHECKING:
    import torch

_WHAT = "weight file"
_Content = TypeVar("_Content", covariant=True)


class _Get(Protocol[_Content]):
    """Reads a tensor by name; only its first `rows` where they are given."""

    def __call__(self, name: str, rows: int | None = None) -> _Content: ...


GetTensor = _Get["torch.Tensor"]
"""Reads onto the CPU."""


@dataclass(frozen=True, eq=False)
class WeightFile:
    """A weight file whose header has been read, not its weights.

    Attributes:
        path: of the file, or of the index of its shards.
        tensors: by name, without the scales of scaled fp8 and int8 and what marks them.
        scales: name of a scaled weight -> its scale.
        metadata: of the safetensors header; of shards, what their headers and the index say.
        stamp: to notice when the file is replaced or changed; of shards together.
        shards: the files in which the weights of an index lie, each with all its tensors.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, Scale]
    metadata: Mapping[str, str]
    stamp: FileStamp
    is_safetensors: bool
    shards: tuple[WeightFile, ...] = ()

    @contextmanager
    def open(self, scaled: bool = True) -> Iterator[GetTensor]:
        """Yield a function that reads one tensor by name; scaled ones are float32 and whole again.

        Args:
            scaled: False gives them as they are in the file, without their scales.

        Raises:
            EasyRefError: the file is gone, has changed since its header was read, or changes
                while it is read.
        """
        from .tensors import apply_scale  # PyTorch is needed here and in `_tensors` only

        with self._each(lambda file: file._tensors()) as stored:

            def get(name: str, rows: int | None = None) -> torch.Tensor:
                weight = stored(name, rows)
                scale = self.scales.get(name) if scaled else None
                return weight if scale is None else apply_scale(weight, scale)

            yield get

    @contextmanager
    def open_bytes(self) -> Iterator[_Get[bytes]]:
        """Yield a function that reads the bytes of what `open` gives, without PyTorch.

        Raises:
            EasyRefError: see `open`.
        """
        with self._each(lambda file: file._read_by(read_bytes)) as stored:

            def get(name: str, rows: int | None = None) -> bytes:
                content = stored(name, rows)
                scale = self.scales.get(name)
                if scale is None:
                    return content
                return scaled_bytes(content, self.tensors[name].first(rows), scale)

            yield get

    @contextmanager
    def _each(
        self, opened: Callable[[WeightFile], AbstractContextManager[_Get[_Content]]]
    ) -> Iterator[_Get[_Content]]:
        """Yield a function that reads from whichever of its files a tensor lies in."""
        with ExitStack() as stack:
            readers: dict[str, _Get[_Content]] = {}
            for file in self.shards or (self,):
                readers |= dict.fromkeys(file.tensors, stack.enter_context(opened(file)))
            yield lambda name, rows=None: readers[name](name, rows)

    @contextmanager
    def _tensors(self) -> Iterator[GetTensor]:
        """Yield a function that reads one tensor as it is in this one file."""
        from .tensors import read_tensor

        with self._read_by(read_tensor) as get:
            yield get

    @contextmanager
    def _read_by(
        self, read: Callable[[BinaryIO, Path, str, TensorInfo], _Content]
    ) -> Iterator[_Get[_Content]]:
        """Yield a function that reads one tensor in this way from this one file."""
        with self._unchanged() as file:
            state = file_state(file)
            yield lambda name, rows=None: read(
                file, self.path, name, self.tensors[name].first(rows)
            )
            if file_state(file) != state:
                raise self._changed()

    @contextmanager
    def _unchanged(self) -> Iterator[BinaryIO]:
        with open_regular(self.path, _WHAT) as file:
            if FileStamp.of(file) != self.stamp:
                raise self._changed()
            yield file

    def check_unchanged(self) -> None:
        """Raise EasyRefError where the file has changed since its header was read."""
        for file in self.shards or (self,):
            with file._unchanged():
                pass

    def _changed(self) -> EasyRefError:
        return EasyRefError(
            f"{escaped(str(self.path))} has changed since it was loaded. Queue the prompt again "
            "(or run the command again) so that it is read anew."
        )

    def check_weights(self, names: Iterable[str]) -> None:
        """Raise EasyRefError unless these tensors are weights: numbers with a fraction, or with a
        scale."""
        for name in names:
            dtype = self.tensors[name].dtype
            if dtype not in WEIGHTS and name not in self.scales:
                raise EasyRefError(
                    f"{escaped(str(self.path))}: {escaped(name)} is {escaped(dtype)}; weights are "
                    "float32, float16, bfloat16 or fp8, plain or with a scale, or ComfyUI's "
                    "int8_tensorwise. Get the file in one of these: other quantised forms cannot "
                    "be read, and the precision int8 rounds full weights itself."
                )

    def read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Read several tensors: `names` maps the wanted name to the name in the file."""
        with self.open() as get:
            return {wanted: get(name) for wanted, name in names.items()}


def open_weight_file(path: str | Path) -> WeightFile:
    """Read the header of a safetensors file, or of a PyTorch file of tensors only; or those of
    all shards that an index (`*.index.json`) names.

    Raises:
        EasyRefError: missing, empty, truncated, foreign, or a pickle that carries code; an index
            that names what is missing, lies outside its folder, does not fit it or contradicts it.
    """
    path = Path(path)
    file = _open_shards(path) if is_index(path) else _open_file(path)
    with file.open_bytes() as read:
        tensors, scales = split_scales(file.tensors, read)
    return replace(file, tensors=tensors, scales=scales)


def _open_shards(index: Path) -> WeightFile:
    places, metadata = places_and_metadata(index, MAX_SHARDS)
    wanted: dict[Path, set[str]] = {}
    for name, path in places.items():
        wanted.setdefault(path, set()).add(name)
    shards: list[WeightFile] = []
    for path, names in wanted.items():
        shard = _open_file(path)
        odd = min(shard.tensors.keys() ^ names, default=None)
        if odd is not None:
            reason = f"{shown(odd, 200)} is {'missing' if odd in names else 'too much'} in it"
        elif shards and shard.metadata != shards[0].metadata:
            reason = f"it was not written together with {escaped(shards[0].path.name)}"
        else:
            shards.append(shard)
            continue
        raise EasyRefError(
            f"{escaped(str(path))} is no shard of {escaped(index.name)}: {reason}. Get the index "
            "and all shards again, from one place."
        )
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    own = shards[0].metadata
    for name, text in metadata.items():
        if own.get(name, text) != text:
            raise EasyRefError(
                f"{escaped(str(index))} does not fit its shards: it says that {shown(name)} is "
                f"{shown(text)}, they say {shown(own[name])}. Get the index and all shards again, "
                "from one place."
            )
    metadata = {name: text for name, text in (metadata | own).items() if name != SET}
    return WeightFile(
        index,
        {name: tensors[name] for name in places},  # in the order of the whole file
        {},
        metadata,
        FileStamp.together(shard.stamp for shard in shards),
        all(shard.is_safetensors for shard in shards),
        tuple(shards),
    )


def _open_file(path: Path) -> WeightFile:
    """With all its tensors, none of which is taken for a scale."""
    name = escaped(str(path))
    with open_regular(path, _WHAT) as file:
        stamp = FileStamp.of(file)
        file.seek(0)
        head = file.read(9)
        if not head:
            raise EasyRefError(f"{name} is empty (0 bytes). Download it again.")
        metadata: dict[str, str] = {}
        # A header length below 4 GB, then JSON: no pickle starts so.
        is_safetensors = head[4:8] == bytes(4) and head[8:9] == b"{"
        if is_safetensors:
            stored, metadata = read_header(file, path, stamp.size)
        elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
            stored = read_index(file, path, stamp.size)
        else:
            raise EasyRefError(
                f"{name} is neither a safetensors nor a PyTorch file (it starts with {head[:8]!r})."
                " If it was downloaded with git, the file itself may be missing and only its "
                "pointer here."
            )
    return WeightFile(path, stored, {}, metadata, stamp, is_safetensors)
