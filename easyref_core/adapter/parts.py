"""The parts of an EasyRef adapter, and whether a file's weights make up a whole one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ..errors import EasyRefError
from ..untrusted import escaped
from ..weight_file import WeightFile

PROJECTOR = "image_proj_model."
FINAL = "mllm_final_layer."
BODY = "multimodal_llm."
TOKENS = "reference_tokens"
KEY_VALUE = ("to_k_ip", "to_v_ip")
LORA = ("to_q", "to_k", "to_v", "to_out")
IDENTITY_LORA = ("to_k", "to_v")

# Several times what any Qwen2-VL and any UNet has.
MAX_TOKENS = 4096
MAX_WIDTH = 16_384

Cross = Mapping[str, Mapping[str, str]]
"""Layer -> "to_k_ip" or "to_v_ip" -> name in the file."""
Lora = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Layer -> projection ("to_q", ...) -> "down" or "up" -> name in the file."""

_LOOKALIKES = (
    ("model.diffusion_model.", "an SDXL or other image model checkpoint (models/checkpoints)"),
    ("ip_adapter.", "an IP-Adapter; EasyRef's own adapter is another file"),
    ("image_proj.", "an IP-Adapter; EasyRef's own adapter is another file"),
    ("lora_unet_", "a LoRA (models/loras)"),
    ("visual.", "a bare Qwen2-VL model; it goes into models/LLM and is chosen as the MLLM"),
    ("model.visual.", "a bare Qwen2-VL model; it goes into models/LLM and is chosen as the MLLM"),
    ("model.layers.", "a bare language model"),
    ("uncond", "saved reference tokens; load them with EasyRef Load Tokens"),
    ("control_model.", "a ControlNet (models/controlnet)"),
)


def not_an_adapter(
    file: WeightFile, projector: Mapping[str, str], final: Mapping[str, str], cross: Cross
) -> EasyRefError:
    """The error for a file that is something else (its likely kind is named), or lacks a part."""
    path = escaped(str(file.path))
    parts = {PROJECTOR: projector, FINAL: final, "unet.*.to_k_ip": cross}
    if any(parts.values()):
        lacking = ", ".join(prefix for prefix, part in parts.items() if not part)
        return EasyRefError(
            f"{path} is only part of an EasyRef adapter: it lacks {lacking}. Get the whole "
            "model.safetensors."
        )
    names = sorted(file.tensors)
    found = f"It holds {len(names)} tensors"
    if names:
        found += f", such as {_listed(names)}"
    for prefix, kind in _LOOKALIKES:
        if any(name.startswith(prefix) for name in names):
            found = f"It looks like {kind}"
            break
    return EasyRefError(
        f"{path} is not an EasyRef adapter. {found}. An adapter holds {PROJECTOR}*, {FINAL}* "
        "and unet.*.processor.to_k_ip; the official one is model.safetensors of "
        "zongzhuofan/EasyRef."
    )


def check_unused(file: WeightFile, unused: Iterable[str]) -> None:
    """Raise EasyRefError where a tensor that is not used belongs to a layer that is.

    Whatever stands beside keys, values and LoRA would change the picture: scales of unknown kinds,
    biases, a LoRA's alpha, layers of another layout.
    """
    plain = (name.removeprefix("module.") for name in unused)
    own = [n for n in plain if n.startswith("unet.") and (".processor." in n or "lora" in n)]
    if own:
        raise EasyRefError(
            f"{escaped(str(file.path))} holds {len(own)} tensors for the UNet's attention that "
            f"EasyRef does not know: {_listed(sorted(own))}. Without them the pictures would "
            "differ, so the file is not used. Get the adapter in the official layout, in float32, "
            "float16, bfloat16 or scaled fp8."
        )


def check_parts(
    file: WeightFile,
    projector: Mapping[str, str],
    final: Mapping[str, str],
    cross: Cross,
    lora: Lora,
    identity_lora: Lora,
) -> None:
    """Raise EasyRefError where weights are missing, are none, or do not fit together."""
    path = escaped(str(file.path))
    _check_whole(file, cross, lora, identity_lora)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    pairs = [halves for parts in lora.values() for halves in parts.values()]
    own_pairs = [halves for parts in identity_lora.values() for halves in parts.values()]
    matrices = [final[TOKENS], projector["proj.0.weight"], projector["proj.2.weight"]]
    matrices += [n for parts in (*cross.values(), *pairs, *own_pairs) for n in parts.values()]
    file.check_weights((*projector.values(), *final.values(), *matrices))
    for name in projector.values():
        if name not in matrices and math.prod(shapes[name]) > MAX_WIDTH:
            raise EasyRefError(
                f"{path}: {escaped(name)} has shape {list(shapes[name])}, which is too large for "
                "the projector. The file is damaged or was converted wrongly; get it again."
            )
    for name in matrices:
        if len(shapes[name]) != 2 or not all(0 < n <= MAX_WIDTH for n in shapes[name]):
            raise EasyRefError(
                f"{path}: {escaped(name)} has shape {list(shapes[name])}, but a matrix of 1 to "
                f"{MAX_WIDTH:,} rows and columns is needed. The file is damaged or was converted "
                "wrongly; get it again."
            )

    def mixed(reason: str) -> EasyRefError:
        return EasyRefError(
            f"{path}: {reason}. The file mixes parts of two adapters; get it again."
        )

    tokens, inputs = shapes[final[TOKENS]], shapes[projector["proj.0.weight"]][1]
    if tokens[0] > MAX_TOKENS:
        raise EasyRefError(
            f"{path} has {tokens[0]:,} reference tokens; up to {MAX_TOKENS:,} are possible. The "
            "file is damaged; get it again."
        )
    if inputs != tokens[1]:
        raise mixed(
            f"the reference tokens have shape {list(tokens)}, which does not fit the projector's "
            f"input {inputs}"
        )
    width = shapes[projector["proj.2.weight"]][0]
    for layer, parts in cross.items():
        key, value = (shapes[parts[part]] for part in KEY_VALUE)
        if key != value or key[-1] != width:
            raise mixed(
                f"{escaped(layer)} projects {list(key)} and {list(value)}, but the reference "
                f"tokens are {width} wide"
            )
    for what, halves in (("LoRA", pairs), ("identity LoRA", own_pairs)):
        ranks = {shapes[half["down"]][0] for half in halves}
        ranks |= {shapes[half["up"]][1] for half in halves}
        if len(ranks) > 1:
            raise mixed(
                f"its {what} has ranks {', '.join(map(str, sorted(ranks)))}, but one rank is needed"
            )
    for layer, parts in identity_lora.items():
        ends = [shapes[halves["down"]][1] for halves in parts.values()]
        ends += [shapes[halves["up"]][0] for halves in parts.values()]
        if len(set(ends)) > 1:
            raise mixed(
                f"its identity LoRA for {escaped(layer)} is {', '.join(map(str, ends))} wide, but "
                "one width is needed"
            )


def _check_whole(file: WeightFile, cross: Cross, lora: Lora, identity_lora: Lora) -> None:
    wanted = [f"{PROJECTOR}proj.{n}.{kind}" for n in (0, 2, 3) for kind in ("bias", "weight")]
    wanted += [FINAL + n for n in (TOKENS, "norm.weight", "layers.0.self_attn.q_proj.weight")]
    wanted += [f"unet.{layer}.processor.{part}.weight" for layer in cross for part in KEY_VALUE]
    wanted += [
        f"unet.{layer}.processor.{part}_lora.{half}.weight"
        for layer in lora
        for part in LORA
        for half in ("down", "up")
    ]
    wanted += [
        f"unet.{layer}.processor.{part}_identity_lora.{half}.weight"
        for layer in identity_lora
        for part in IDENTITY_LORA
        for half in ("down", "up")
    ]
    present = {name.removeprefix("module.") for name in file.tensors}
    if len(present) < len(file.tensors):
        raise EasyRefError(
            f"{escaped(str(file.path))} holds weights twice, with and without `module.` before "
            "their names. Get the adapter's own file."
        )
    missing = [name for name in wanted if name not in present]
    if missing:
        raise EasyRefError(
            f"{escaped(str(file.path))} lacks {len(missing)} weights of an EasyRef adapter: "
            f"{_listed(missing)}{' and more' if len(missing) > 3 else ''}. "
            "The file is damaged or was converted wrongly; get it again."
        )


def _listed(names: list[str]) -> str:
    return ", ".join(escaped(name[:200]) for name in names[:3])
