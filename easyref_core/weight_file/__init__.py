"""Weight files: names and shapes first, then tensor by tensor, in memory of their own.

Formats are told apart by their first bytes, never by the file's name. Nothing stays mapped: a file
that is cut off or replaced ends in an error, not in the process.
"""

from .dtypes import all_finite, dtype_name
from .file import GetTensor, WeightFile, open_weight_file
from .layout import weight_files
from .stored import TensorInfo
from .writing import write_safetensors

__all__ = [
    "GetTensor",
    "TensorInfo",
    "WeightFile",
    "all_finite",
    "dtype_name",
    "open_weight_file",
    "weight_files",
    "write_safetensors",
]
