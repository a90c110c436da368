"""A complete, tiny model set with random weights, for tests.

It has the structure of the real models: a UNet with SDXL's blocks, an autoencoder, two text
encoders, a ControlNet, a Qwen2-VL and an EasyRef adapter, each in the layout in which it is
published. Images are noise, but all parts have an effect. `easyref_core.demo_set` lists the files.
"""

from __future__ import annotations

from pathlib import Path

from easyref_core.demo_set import SET_FILE, read_set_info
from easyref_core.errors import EasyRefError

from .tiny_adapter import write_adapter
from .tiny_codecs import write_text_encoders, write_vae
from .tiny_mllm import write_mllm
from .tiny_unet import write_controlnet, write_unet
from .tiny_weights import write_json

# Raise when the content of the set changes, so that sets written before are replaced.
_LAYOUT = 1


def write_tiny_set(directory: Path, seed: int = 0) -> Path:
    """Write the random model set, about 38 MB, into a directory.

    The same seed gives the same weights. A directory that already holds this set is left as it
    is. `set.json` is written last: while it is missing, the set is incomplete.

    Returns:
        The directory.

    Raises:
        EasyRefError: The directory holds a trained set, which would be lost.
    """
    directory = Path(directory)
    info = {
        "trained": False,
        "seed": seed,
        "layout": _LAYOUT,
        "note": "Random weights for tests: the images are noise.",
    }
    existing = read_set_info(directory)
    if existing == info:
        return directory
    if existing is not None and existing.get("trained"):
        raise EasyRefError(
            f"{directory} holds a trained model set, which the random one would replace. Choose "
            "another directory."
        )
    # From here on the files may belong to two different sets until all are written.
    (directory / SET_FILE).unlink(missing_ok=True)
    unet = write_unet(directory / "unet", seed)
    write_controlnet(directory / "controlnet", seed)
    write_vae(directory / "vae", seed)
    write_text_encoders(directory / "text_encoders", seed)
    _, mllm = write_mllm(directory / "mllm", seed)
    write_adapter(directory / "easyref.safetensors", seed, unet, mllm)
    write_json(directory / SET_FILE, info)
    return directory
