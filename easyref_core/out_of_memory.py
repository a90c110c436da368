"""Recognise an error that says a device or the computer ran out of memory."""

from __future__ import annotations

import errno
import re

import torch

_NO_ROOM = re.compile(
    r"""
    out[ _]?of[ _]?(\w+[ _])?memory       # CUDA, HIP, MPS, XPU (OUT_OF_DEVICE_MEMORY), NPU
    | out_of_resources | \bvbar\ oom\b    # Level Zero; dynamic VRAM
    | not\ enough\ (\w+\ ){0,2}memory     # CPU and DirectML on Windows, "GPU video memory"
    | (could|can)(\ ?not|n't|'t)\ allocate | (un|not\ )able\ to\ allocate | failed\ to\ allocate
    | alloc_?failed | allocation[ _]failed # cuBLAS, cuDNN, MIOpen; pinned memory, mapped files
    | cublascreate                         # the handle's own memory
    | vram\ (reservation|grow)\ failed | hostbuffer\.(extend|register)\ failed
    | invalid\ buffer\ size                # MPS: larger than any buffer may be
    | paging\ file\ is\ too\ small | insufficient\ (\w+\ )?memory
    """,
    re.IGNORECASE | re.VERBOSE,
)


def lack_of_memory(error: BaseException) -> str | None:
    """What an error says, in one line, where a device or the computer ran out of memory; None for
    any other error.

    Few devices raise a type of their own; the others say it in a plain RuntimeError, as allocators,
    math libraries and loaders of weights do.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return first_line(error)
    # safetensors' error is no OSError where it wraps one.
    known = isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError"
    if known and (_NO_ROOM.search(str(error)) or getattr(error, "errno", None) == errno.ENOMEM):
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """What an error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
