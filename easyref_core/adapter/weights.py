"""All weights of an adapter file under the official names."""

from __future__ import annotations

from .checkpoint import AdapterCheckpoint
from .layer_pooling import POOLING
from .parts import BODY, FINAL, PROJECTOR


def official_weights(checkpoint: AdapterCheckpoint) -> dict[str, str]:
    """Official name -> name in the file, of all that belongs to the adapter: not the base UNet's
    weights, which some files hold too, nor what is not used."""
    names = {BODY + name: source for name, source in checkpoint.body.items()}
    names |= {FINAL + name: source for name, source in checkpoint.final.items()}
    names |= {PROJECTOR + name: source for name, source in checkpoint.projector.items()}
    names |= {POOLING + name: source for name, source in checkpoint.layer_pooling.items()}
    for layer, parts in checkpoint.cross_attention.items():
        names |= {f"unet.{layer}.processor.{part}.weight": n for part, n in parts.items()}
    for kind, loras in (("lora", checkpoint.lora), ("identity_lora", checkpoint.identity_lora)):
        for layer, parts in loras.items():
            for part, halves in parts.items():
                for half, name in halves.items():
                    names[f"unet.{layer}.processor.{part}_{kind}.{half}.weight"] = name
    return names
