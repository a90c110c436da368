"""Time and memory from loader to sampling at real size, with random weights.

Builds an adapter with the keys and shapes of a real checkpoint (Qwen2-VL-2B inside, 64 tokens,
rank 128, bf16, 5.5 GB), and SDXL in bf16 with random weights, then runs ComfyUI's own nodes in
process: loader, references, encode, apply, sampling. Needs a ComfyUI and about 20 GB of memory.

    python benchmarks/real_size.py --comfyui FOLDER --work FOLDER [--device cpu]
        [--latent 8] [--steps 2]

Prints one JSON object; earlier results are in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def start_comfyui(folder: Path, work: Path, device: str, *options: str) -> dict[str, Any]:
    """Import ComfyUI and the pack; returns the node classes by id.

    Args:
        options: more of ComfyUI's.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["main.py", "--base-directory", str(work)] + (["--cpu"] if device == "cpu" else [])
    sys.argv += options
    import comfy.options

    comfy.options.enable_args_parsing()
    import asyncio

    # Before ComfyUI's `nodes`, which imports another module called `utils`.
    importlib.import_module("utils.extra_config")
    importlib.import_module("nodes")

    spec = importlib.util.spec_from_file_location(
        "easyref_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules["easyref_pack"] = pack
    spec.loader.exec_module(pack)

    async def node_classes() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    return {c.GET_SCHEMA().node_id: c for c in asyncio.run(node_classes())}


class Log:
    """Seconds per part, and peak memory after it."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        entry = {"seconds": round(time.perf_counter() - start, 2), "peak_gb": peak_gb()}
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            entry["seconds"] = round(time.perf_counter() - start, 2)
            entry["gpu_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.parts[name] = entry
        print(name, entry, file=sys.stderr, flush=True)


def peak_gb() -> float:
    """Peak resident memory of the process in GB, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e9 if platform.system() == "Darwin" else 1e6 / 1.024), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    work = options.work.resolve()
    adapter = work / "models" / "easyref" / "random.safetensors"
    if not adapter.is_file():
        from random_models import write_adapter

        write_adapter(adapter)
    log = Log()
    with log.part("import ComfyUI and the pack"):
        nodes = start_comfyui(options.comfyui.resolve(), work, options.device)
    import torch

    with torch.inference_mode():
        run(nodes, log, options.latent, options.steps)
    print(
        json.dumps(
            {
                "device": options.device,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "latent": options.latent,
                "steps": options.steps,
                "parts": log.parts,
            },
            indent=2,
        )
    )


def run(nodes: dict[str, Any], log: Log, side: int, steps: int) -> None:
    import comfy.sample
    import torch
    from random_models import random_sdxl

    def execute(node: str, **inputs: Any) -> Any:
        return nodes[node].execute(**inputs)[0]

    generator = torch.Generator().manual_seed(2)
    sizes = ((512, 512), (768, 1024), (640, 480))
    pictures = [torch.rand(1, h, w, 3, generator=generator) for h, w in sizes]
    with log.part("loader"):
        easyref = execute(
            "EasyRefLoader", adapter="random.safetensors", mllm="from adapter", precision="auto"
        )
    references = execute(
        "EasyRefReferences",
        weight=1.0,
        images={f"image_{n}": picture for n, picture in enumerate(pictures, 1)},
    )
    inputs = {"easyref": easyref, "references": references}
    inputs |= {"aggregation": "easyref", "image_size": 336}
    with log.part("encode 3 references, weights read"):
        execute("EasyRefEncode", prompt="a man in a garden", **inputs)
    with log.part("encode again with another prompt"):
        tokens = execute("EasyRefEncode", prompt="a man on a bridge at night", **inputs)
    with log.part("build random SDXL"):
        model = random_sdxl()
    with log.part("apply"):
        steered = execute(
            "EasyRefApply",
            model=model,
            easyref=easyref,
            tokens=tokens,
            weight=1.0,
            start_percent=0.0,
            end_percent=1.0,
            lora_strength=1.0,
        )
    text = [
        [torch.randn(1, 77, 2048, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]
    ]
    noise = torch.randn(1, 4, side, side, generator=generator)

    def sample(patcher: Any) -> torch.Tensor:
        return comfy.sample.sample(
            patcher, noise, steps, 7.5, "ddim", "normal", text, text, noise * 0, seed=1
        )

    with log.part(f"plain model, {steps} steps"):
        plain = sample(model)
    with log.part(f"steered model, {steps} steps, LoRA merged and tokens projected"):
        first = sample(steered)
    with log.part(f"steered model again, {steps} steps"):
        again = sample(steered)
    if not torch.isfinite(first).all() or not torch.equal(first, again):
        raise SystemExit("the latents with references are not finite, or differ between two runs")
    if torch.equal(first, plain):
        raise SystemExit("the references have no effect")


if __name__ == "__main__":
    main()
