"""ComfyUI's dynamic VRAM without a GPU: its real `ModelPatcherDynamic` on torch's `meta` device.

The `meta` device stands for the GPU: tensors there have shapes and dtypes but no data. What
`comfy_aimdo` does in native code (a model's range of GPU memory, page faults, pinned buffers) is
played by the few lines below. Everything else is ComfyUI's own code, so a test sees what happens
on a card: which weights are managed, what is moved, in which dtype, and where the host would wait.

    def test_x(pack: Pack, gpu: Gpu) -> None:   # skips on a core without ModelPatcherDynamic
        model = comfyhost.golden_unet(pack)     # built after `gpu`, so it is dynamic
        with gpu.watch() as seen:
            ...                                 # raises DevicesMixed, HostWaits
        assert not seen.uploads

- Operations on tensors of both devices raise `DevicesMixed` (or torch's own RuntimeError), also
  those that `meta` itself lets pass. Numbers on the CPU (tensors without dimensions) may take
  part, as on a GPU.
- `.item()`, `bool()`, `.cpu()`, `nonzero()` and the like raise `HostWaits`. Inside
  `gpu.waiting_allowed()` they are noted and answered with something made up: tensors with zeros
  (truth values: True), numbers with 1.
- `gpu.full = True`: no weight finds room; each is moved anew for every use.
- `dynamic_vram(dynamic=False)`, the fixture `plain_gpu`: the same GPU with ComfyUI's plain patcher,
  as on older cores; there `gpu.full = True` means that all layers that can stay on the CPU do.
- `sample` runs a guider with a sampler that itself never waits, and records each model call.

The fixture puts everything back; models built under it must not be used after it. Only the test's
own thread is watched, though `meta` itself raises in all.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TOO_OLD = "this ComfyUI is from before dynamic VRAM"
META = torch.device("meta")
MEMORY = 24 * 2**30
_DEPEND_ON_DATA = ("nonzero", "masked_select", "equal", "_unique2", "unique_dim")
_SMALL_MODULE = 16 * 1024  # bytes up to which ComfyUI keeps a module whole on the GPU


class DevicesMixed(AssertionError):
    """An operation was given tensors of both devices; on a GPU it fails."""


class HostWaits(AssertionError):
    """The host read data that the GPU has not computed yet."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A tensor that was moved to the GPU, with its dtype on the way."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass
class Record:
    """What happened in a stretch of code.

    Attributes:
        uploads: data that went to the GPU from memory, in order.
        file_reads: bytes of each weight that ComfyUI read from its file straight to the GPU.
        waits: name of each operation for which the host waited.
    """

    uploads: list[Transfer] = dataclasses.field(default_factory=list)
    file_reads: list[int] = dataclasses.field(default_factory=list)
    waits: list[str] = dataclasses.field(default_factory=list)

    @property
    def moved(self) -> int:
        """Bytes moved to the GPU."""
        return sum(one.nbytes for one in self.uploads) + sum(self.file_reads)


class Gpu:
    """The GPU's stand-in, as the fixture gives it.

    Attributes:
        device: where models are loaded to.
        full: nothing more fits, so weights are streamed for each use.
    """

    device = META

    def __init__(self) -> None:
        self.full = False
        self._records: list[Record] = []
        self._lenient = False

    @contextmanager
    def watch(self) -> Iterator[Record]:
        """Record what the code inside moves and waits for."""
        record = Record()
        self._records.append(record)
        try:
            yield record
        finally:
            self._records = [other for other in self._records if other is not record]

    @contextmanager
    def waiting_allowed(self, allowed: bool = True) -> Iterator[None]:
        """The host may (or, inside, may not) wait for the GPU; what it reads is made up."""
        before, self._lenient = self._lenient, allowed
        try:
            yield
        finally:
            self._lenient = before

    def uploaded(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        moved = Transfer(dtype, tuple(shape), math.prod(shape) * dtype.itemsize)
        for record in self._records:
            record.uploads.append(moved)

    def read_from_file(self, nbytes: int) -> None:
        for record in self._records:
            record.file_reads.append(nbytes)

    def waited(self, operation: str) -> None:
        if not self._lenient:
            raise HostWaits(f"{operation}: the host waits for the GPU here.")
        for record in self._records:
            record.waits.append(operation)


class _Operations(TorchDispatchMode):
    """Checks every operation for its devices."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name, composite = _describe(func)
        if composite:  # in inference mode, composite operations arrive undivided
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        meta = [x for x in tensors if x.is_meta]
        host = [x for x in tensors if not x.is_meta]
        if name == "_to_copy":
            return self._to_copy(func, args, kwargs)
        if name == "copy_":
            return self._copy(func, args, kwargs)
        if meta and any(x.ndim for x in host):
            shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
            raise DevicesMixed(f"{name} of tensors on different devices: {shapes}.")
        if meta and name == "_local_scalar_dense":
            self._gpu.waited(name)
            return torch.ones((), dtype=meta[0].dtype).item()
        masked = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in meta[1:])
        if meta and (masked or name in _DEPEND_ON_DATA):
            self._gpu.waited(name)
        return func(*args, **kwargs)

    def _to_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        source: torch.Tensor = args[0]
        target = torch.device(kwargs.get("device") or source.device)
        if source.is_meta and target.type == "cpu":
            self._gpu.waited("copy to the CPU")
            return _made_up(source, kwargs.get("dtype") or source.dtype)
        if not source.is_meta and target == META:
            # torch changes the dtype on the CPU, before the move.
            self._gpu.uploaded(source.shape, kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        destination, source = args[:2]
        if source.is_meta and not destination.is_meta:
            self._gpu.waited("copy to the CPU")
            destination.copy_(_made_up(source, destination.dtype).expand(destination.shape))
            return destination
        if destination.is_meta and not source.is_meta and source.ndim:
            self._gpu.uploaded(source.shape, destination.dtype)
        return func(*args, **kwargs)


@cache
def _describe(func: Any) -> tuple[str, bool]:
    """An operation's name, and whether it is composite."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )
    return func.overloadpacket._qualified_op_name.removeprefix("aten::"), composite


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (x for x in value if isinstance(x, torch.Tensor))


class _Literals(TorchFunctionMode):
    """Notes tensors built on the GPU from Python numbers: a hidden copy."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        literal = func in (torch.tensor, torch.as_tensor, torch.asarray) and args
        if literal and result.is_meta and not isinstance(args[0], torch.Tensor):
            self._gpu.uploaded(result.shape, result.dtype)
        return result


def _made_up(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the CPU gets where a GPU would send data."""
    fill = torch.ones if dtype == torch.bool else torch.zeros
    return fill(source.shape, dtype=dtype)


class _Range:
    """`ModelVBAR`: GPU memory of a model, in which weights stay until it is needed."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._life = 0
        self._resident: dict[int, int] = {}  # offset -> bytes
        self._end = 0

    def prioritize(self, *_: Any) -> None:
        pass

    def alloc(self, size: int) -> tuple[_Range, int, int]:
        self._end += size
        return self, self._end - size, size

    def fault(self, offset: int, size: int) -> bytes | None:
        """A signature that changes whenever the weights are to be moved again."""
        if self._gpu.full:
            return None
        self._resident[offset] = size
        return self._life.to_bytes(8, "little")

    def loaded_size(self) -> int:
        return sum(self._resident.values())

    def free_memory(self, size: float) -> int:
        if size <= 0:
            return 0
        freed = self.loaded_size()
        self._life += 1
        self._resident.clear()
        return freed


class _HostBuffer:
    """`HostBuffer`: empty, since nothing is pinned."""

    size = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def truncate(self, *_: Any, **__: Any) -> None:
        pass


class _MappedFile:
    """`ModelMMAP`: a file in memory."""

    def __init__(self, path: Any) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115 - lives as long as its tensors
        # A private copy of the pages, since a pointer is only given out of writable memory.
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def get_file_handle(self) -> int:
        return self._file.fileno()

    def bounce(self) -> bool:
        return True


def is_supported() -> bool:
    """Whether this ComfyUI can load models dynamically."""
    import comfy.model_patcher

    return hasattr(comfy.model_patcher, "ModelPatcherDynamic")


@contextmanager
def dynamic_vram(dynamic: bool = True) -> Iterator[Gpu]:
    """ComfyUI with dynamic VRAM (or without) on a GPU that is `meta`; everything is restored at the
    end."""
    gpu = Gpu()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if dynamic:
            _play_aimdo(gpu, patch)
        _play_gpu(gpu, patch)
        stack.callback(_forget_models)
        stack.enter_context(gpu.watch())
        stack.enter_context(_Operations(gpu))
        stack.enter_context(_Literals(gpu))
        yield gpu


def _play_aimdo(gpu: Gpu, patch: pytest.MonkeyPatch) -> None:
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    vbar, dynamic = comfy_aimdo.model_vbar, comfy.model_patcher.ModelPatcherDynamic
    patch.setattr(vbar, "ModelVBAR", lambda size, device: _Range(gpu))
    patch.setattr(vbar, "vbar_fault", lambda alloc: alloc[0].fault(*alloc[1:]))
    patch.setattr(vbar, "vbar_unpin", lambda alloc: None)
    patch.setattr(vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    patch.setattr(vbar, "vbars_analyze", lambda device=None: 0)
    patch.setattr(
        comfy_aimdo.torch,
        "aimdo_to_tensor",
        lambda alloc, device: torch.empty(alloc[2], dtype=torch.uint8, device=device),
    )
    patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", _HostBuffer)
    patch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", _MappedFile)
    patch.setattr(
        comfy_aimdo.host_buffer,
        "read_file_to_device",
        lambda file, offset, size, *_, **__: gpu.read_from_file(size),
    )
    patch.setattr(args, "disable_pinned_memory", True)
    patch.setattr(comfy.memory_management, "aimdo_enabled", True)
    patch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic)
    patch.setattr(dynamic, "_load_list", _load_list(dynamic._load_list))


def _load_list(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tiny modules are managed like large ones, and parameters may change their device."""

    def load_list(self: Any, for_dynamic: bool = False, default_device: Any = None) -> list[Any]:
        found = original(self, for_dynamic)
        if default_device is not None:
            for module in self.model.modules():
                own = dict(module.named_parameters(recurse=False))
                if len(own) < sum(1 for _ in module.parameters()):
                    # The original sets `param.data`, which torch allows not between these devices.
                    for name, parameter in own.items():
                        dtype = getattr(module, name + "_comfy_model_dtype", None)
                        moved = parameter.data.to(device=default_device, dtype=dtype)
                        setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
        if not for_dynamic:
            return found
        return [
            (*order, size + _SMALL_MODULE, *rest)
            for *order, size, n, m, p in found
            for rest in [(n, m, p)]
        ]

    return load_list


def _play_gpu(gpu: Gpu, patch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as mm

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        memory = 0 if gpu.full else MEMORY
        return (memory, memory) if torch_free_too else memory

    def total(device: Any = None, torch_total_too: bool = False) -> Any:
        return (MEMORY, MEMORY) if torch_total_too else MEMORY

    def usable(device: Any = None, *_: Any, **__: Any) -> bool:
        return device is None or device.type != "cpu"

    def put(name: str, value: Any) -> None:
        if hasattr(mm, name):  # older cores lack some
            patch.setattr(mm, name, value)

    patch.setattr(mm, "cpu_state", mm.CPUState.GPU)
    patch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    patch.setattr(mm, "get_torch_device", lambda: META)
    put("get_all_torch_devices", lambda exclude_current=False: [META])
    patch.setattr(mm, "get_free_memory", free)
    patch.setattr(mm, "get_total_memory", total)
    patch.setattr(mm, "should_use_fp16", usable)
    patch.setattr(mm, "should_use_bf16", usable)
    for name in ("supports_fp8_compute", "supports_nvfp4_compute", "supports_mxfp8_compute"):
        put(name, lambda device=None: False)
    patch.setattr(mm, "current_loaded_models", [])
    put("LARGEST_AIMDO_CASTED_WEIGHT", (None, 0))
    put("LORA_COMPUTE_DTYPES", {})


def _forget_models() -> None:
    import comfy.model_management as mm

    for loaded in mm.current_loaded_models:
        # A plain model's weights are gone with the device; moving them back would wait for it.
        if loaded.model is not None and hasattr(loaded.model.model, "dynamic_vbars"):
            loaded.model.detach()
    mm.current_loaded_models.clear()


def sample(
    gpu: Gpu, guider: Any, latents: torch.Tensor, sigmas: Sequence[float], strict: bool = True
) -> list[Record]:
    """Run a guider's whole stack with a sampler that calls the model once for each sigma.

    What prepares the run and its first call may make the host wait.

    Args:
        strict: later calls may not.

    Returns:
        What each call moved and waited for.
    """
    import comfy.samplers

    records: list[Record] = []

    class Sampler(comfy.samplers.Sampler):
        def sample(self, model: Any, _: Any, extra_args: Any, *args: Any, **kwargs: Any) -> Any:
            x = latents.to(META)
            for sigma in sigmas:
                t = torch.full((x.shape[0],), sigma, device=META)
                with gpu.waiting_allowed(not strict or not records), gpu.watch() as record:
                    x = model(x, t, **extra_args)
                records.append(record)
            return x

    with gpu.waiting_allowed():
        steps = torch.tensor([*sigmas, 0.0])
        guider.sample(latents, torch.zeros_like(latents), Sampler(), steps, disable_pbar=True)
    return records
