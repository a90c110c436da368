"""Weight files: names and shapes first, then tensor by tensor, in memory of their own.

Formats are told apart by their first bytes, never by the file's name; only the index of a file in
shards is known by its ending. Nothing stays mapped: a file
that is cut off or replaced ends in an error, not in the process.

What is imported here does without PyTorch; `tensors` and `writing` need it.
"""

from .file import GetTensor, WeightFile, open_weight_file
from .layout import is_index, weight_files, with_shards
from .stored import TensorInfo

__all__ = [
    "GetTensor",
    "TensorInfo",
    "WeightFile",
    "is_index",
    "open_weight_file",
    "weight_files",
    "with_shards",
]
