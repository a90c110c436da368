"""What it costs that the MLLM's weights are copied out of their file instead of mapped.

Reads the weights of an encoder with Qwen2-VL-2B's shapes, in bf16, up to some gigabytes: first
mapped, as the safetensors library does, then as EasyRef does. Mapped pages belong to the system,
which may drop and reread them; copied weights are the process's own. Linux only.

    python benchmarks/weight_memory.py [--gigabytes 1]

Prints one JSON object: bytes of all weights of the encoder, and for both ways the gigabytes of the
process's own memory and of mapped pages that reading took, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from goldens import real_shapes, sparse_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.plan_encoder import Source, plan_encoder, read_sources

Sources = Mapping[str, Source]


def memory() -> dict[str, float]:
    """Gigabytes of the process's own memory, and of mapped pages."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {
        kind: int(found[field].split()[0]) * 1024 / 1e9
        for kind, field in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


def map_sources(sources: Sources) -> dict[str, torch.Tensor]:
    with safe_open(next(iter(sources.values()))[0].path, "pt") as file:
        tensors = {key: file.get_tensor(name) for key, (_, name) in sources.items()}
    for tensor in tensors.values():
        tensor.sum()  # pages count when they are used
    return tensors


def cost(read: Callable[[Sources], Any], sources: Sources) -> dict[str, float]:
    before, start = memory(), time.perf_counter()
    kept = read(sources)
    seconds, after = time.perf_counter() - start, memory()
    del kept
    taken = {f"{kind} memory, GB": after[kind] - before[kind] for kind in before}
    return {name: round(value, 2) for name, value in (taken | {"seconds": seconds}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    budget = parser.parse_args().gigabytes * 1e9
    with tempfile.TemporaryDirectory() as folder:
        path = sparse_file(Path(folder) / "adapter.safetensors", real_shapes())
        sources = plan_encoder(load_checkpoint(path)).sources
        chosen: dict[str, Source] = {}
        total = left = 0.0
        for key, (file, name) in sources.items():
            size = 2 * torch.Size(file.tensors[name].shape).numel()
            total += size
            if left + size <= budget:
                left += size
                chosen[key] = (file, name)
        result = {
            "all weights, GB": round(total / 1e9, 2),
            "weights read, GB": round(left / 1e9, 2),
            "mapped": cost(map_sources, chosen),
            "copied": cost(lambda those: read_sources(those, None), chosen),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
