"""The memory of encoding eight references at real size, in processes of their own: through the
nodes, on the command line, and as the official procedure does it.

    python -m benchmarks.speed.peak_memory HOW COMFYUI FOLDER

makes a random adapter of released size in bf16 there (HOW is `make`), or encodes with it (`nodes`,
`command`), and prints JSON. All compute in float32 on the CPU, with as many threads as there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .official import at_real_size
from .processes import ROOT, in_process, peak_bytes
from .timing import Amount

BARS = {"nodes": 0.40, "command": 0.50}
NAMES = {"nodes": "through the nodes", "command": "on the command line"}
OFFICIAL = {"loading": "the official procedure", "encoding": "the same, once its models are read"}
COUNT = 8
_PROMPT = "a watercolour of this person reading in a garden at dusk"


def peak_memory(comfyui: Path, work: Path, transformers: Path) -> list[Amount]:
    """Amounts of the table.

    Args:
        work: where 10 GB of files are made, and stay.
        transformers: a folder of transformers 4.45.2.
    """
    if not _adapter(work).is_file():
        _run("make", comfyui, work)
    found = {how: _run(how, comfyui, work)["peak"] for how in BARS}
    theirs = at_real_size(transformers, _mllm(work))
    return as_amounts(found | {part: theirs[part] for part in OFFICIAL})


def as_amounts(found: Mapping[str, float]) -> list[Amount]:
    """Of bytes, of the nodes, the command line, and the parts of the official procedure."""
    theirs = max(found[part] for part in OFFICIAL)
    shares = [
        Amount(f"memory of the official procedure's: {NAMES[how]}", found[how] / theirs, "", bar)
        for how, bar in BARS.items()
    ]
    names = NAMES | OFFICIAL
    sizes = [Amount(f"memory: {names[how]}", peak / 1e6, "MB") for how, peak in found.items()]
    return shares + sizes


def _run(how: str, comfyui: Path, work: Path) -> Any:
    return in_process("peak_memory", how, str(comfyui), str(work))


def _adapter(work: Path) -> Path:
    return work / "models" / "easyref" / "real_size.safetensors"


def _mllm(work: Path) -> Path:
    return work / "models" / "LLM" / "real_size"


def _measure(how: str, comfyui: Path, work: Path) -> dict[str, float]:
    sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    work = work.resolve()
    if how == "make":
        _make(work)
    elif how == "nodes":
        _encode_by_nodes(comfyui, work)
    else:
        _encode_by_command(work)
    return {"peak": peak_bytes()}


def _make(work: Path) -> None:
    """The adapter, and a Qwen2-VL folder with its weights."""
    from goldens import BODY, mllm_directory
    from random_models import write_adapter
    from safetensors.torch import load_file, save_file

    from easyref_core.adapter.checkpoint import FINAL
    from easyref_core.qwen2vl.config import MllmConfig

    write_adapter(_adapter(work))
    config, mllm = MllmConfig(), _mllm(work)
    mllm.parent.mkdir(parents=True, exist_ok=True)
    first, last = f"{FINAL}layers.0.", f"model.layers.{config.num_layers - 1}."
    adapter = load_file(_adapter(work))
    weights = {n.removeprefix(BODY): t for n, t in adapter.items() if n.startswith(BODY)}
    weights |= {last + n.removeprefix(first): t for n, t in adapter.items() if n.startswith(first)}
    mllm_directory(mllm, config)
    save_file(weights, mllm / "model.safetensors", {"format": "pt"})


def _encode_by_nodes(comfyui: Path, work: Path) -> None:
    from .comfyui_models import start

    nodes = start(comfyui, work)
    import torch

    noise = torch.Generator().manual_seed(0)
    images = {f"image_{n}": torch.rand(1, 336, 336, 3, generator=noise) for n in range(COUNT)}
    with torch.inference_mode():
        easyref = nodes["EasyRefLoader"].execute(_adapter(work).name, "from adapter", "auto")[0]
        references = nodes["EasyRefReferences"].execute(weight=1.0, images=images)[0]
        given = {"aggregation": "easyref", "image_size": 336, "references": references}
        nodes["EasyRefEncode"].execute(easyref, prompt=_PROMPT, **given)


def _encode_by_command(work: Path) -> None:
    from PIL import Image

    from easyref_core.cli import main

    pictures = [work / f"{n}.png" for n in range(COUNT)]
    for n, path in enumerate(pictures):
        Image.new("RGB", (336, 336), (n, 0, 0)).save(path)
    out = work / "tokens.safetensors"
    arguments = ["--adapter", str(_adapter(work)), "--mllm", str(_mllm(work)), "--prompt", _PROMPT]
    arguments += ["--out", str(out), "--overwrite", *map(str, pictures)]
    if main(["encode", *arguments]):
        raise SystemExit("easyref encode failed")


if __name__ == "__main__":
    mode, folder, into = sys.argv[1:]
    print(json.dumps(_measure(mode, Path(folder), Path(into))))
