"""Lack of memory is recognised by what devices, libraries and the system report."""

from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError

from easyref_core.out_of_memory import lack_of_memory

NO_ROOM = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB"),
    "linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "python": MemoryError(),
    "mmap": OSError(12, "Cannot allocate memory"),
    "accelerator": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "hip": RuntimeError("HIP error: hipErrorOutOfMemory"),
    "xpu": RuntimeError("level_zero backend failed with 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "xpu resources": RuntimeError("Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    "directml": RuntimeError(
        "Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!"
    ),
    "mps buffer": RuntimeError("Invalid buffer size: 13.50 GB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
    "cublas handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "dynamic vram": MemoryError("VBAR OOM"),
    "dynamic vram's buffer": RuntimeError("VRAM grow failed: 9 bytes"),
    "dynamic vram's pins": RuntimeError("HostBuffer allocation failed"),
    "page file": OSError(22, "The paging file is too small for this operation to complete."),
    "safetensors": SafetensorError("Error while opening: Cannot allocate memory (os error 12)"),
    "attention": RuntimeError("Not enough memory, use lower resolution (max approx. 64x64)."),
}
OTHER = (
    ValueError("out of memory"),
    RuntimeError("nan"),
    OSError("x"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("comfy-aimdo is not initialized"),
    OSError(2, "No such file or directory"),
)


@pytest.mark.parametrize("kind", NO_ROOM)
def test_lack_of_memory_is_one_line(kind: str) -> None:
    assert lack_of_memory(NO_ROOM[kind])
    assert "\n" not in lack_of_memory(NO_ROOM[kind])


@pytest.mark.parametrize("error", OTHER)
def test_other_errors_are_not_lack_of_memory(error: Exception) -> None:
    assert lack_of_memory(error) is None
