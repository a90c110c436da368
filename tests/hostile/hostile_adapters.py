"""Adapter files that are damaged, foreign or made to do harm."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corpus import EITHER, REFUSED, USED, Case, Way
from goldens import ADAPTER, BODY, Tensors, adapter_tensors, pooled_adapter, write
from homes import Home, pipe, replaced, sparse
from safetensors.torch import load_file

ALL = (
    Way("python_encode", name="Python"),
    Way("command_inspect", name="easyref inspect"),
    Way("command_encode", name="easyref encode"),
    Way("comfy_entry_points.graph", name="nodes"),
)
ENCODED = (ALL[0], *ALL[2:])
BOTH = (ALL[0], ALL[-1])
SHOWN = (ALL[1], ALL[-1])
NODES = (ALL[-1],)
LAYERS = (Way("python_layers", name="Python"), ALL[-1])
INDEX = "adapter.safetensors.index.json"
SHARDED = (  # the ways that read an index
    Way("command", ("inspect", f"BASE/models/easyref/{INDEX}"), name="easyref inspect"),
    Way("command_encode", ("--adapter", f"BASE/models/easyref/{INDEX}"), name="easyref encode"),
    Way("comfy_entry_points.graph", more={"loader__adapter": INDEX}, name="nodes"),
)
POOLED = (  # the ways that read layer pooling
    Way("command_encode", ("--aggregation", "dla"), name="easyref encode"),
    Way("comfy_entry_points.graph", more={"tokens__aggregation": "dla"}, name="nodes"),
)

TOKENS = "mllm_final_layer.reference_tokens"
PROJECTOR = "image_proj_model.proj.0.weight"
BODY_WEIGHT = BODY + "model.layers.0.mlp.up_proj.weight"
FINAL_WEIGHT = "mllm_final_layer.layers.0.mlp.up_proj.weight"
KEY = next(n for n in load_file(ADAPTER) if n.endswith("to_k_ip.weight"))
LORA = next(n for n in load_file(ADAPTER) if n.endswith("attn2.processor.to_q_lora.up.weight"))
POOLS = "mllm_layer_pooling."
NORM = "mllm_final_layer.norm.weight"


def with_tensors(change: Callable[[Tensors], Any], **metadata: str) -> Callable[[Home], None]:
    """The golden adapter with other tensors."""

    def make(home: Home) -> None:
        tensors = adapter_tensors()
        change(tensors)
        write(replaced(home.adapter), tensors, **metadata)

    return make


def setting(name: str, tensor: torch.Tensor) -> Callable[[Home], None]:
    return with_tensors(lambda tensors: tensors.__setitem__(name, tensor))


def converted(name: str, dtype: torch.dtype) -> Callable[[Home], None]:
    return with_tensors(lambda tensors: tensors.__setitem__(name, tensors[name].to(dtype)))


def scaled_fp8(*names: str, scale: str) -> Callable[[Home], None]:
    """Weights in one byte with their scale beside them, as ComfyUI's tools write them."""

    def change(tensors: Tensors) -> None:
        for name in names:
            weight = tensors[name]
            factor = weight.abs().max() / 448
            tensors[name] = (weight / factor).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + scale] = factor.float()

    return with_tensors(change)


def int8(
    content: bytes, scale: torch.Tensor | None = None, name: str = BODY_WEIGHT
) -> Callable[[Home], None]:
    """A weight in int8 with a mark of this content, and a scale for each row by default."""

    def change(tensors: Tensors) -> None:
        layer, weight = name.removesuffix("weight"), tensors[name]
        factor = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / factor).round().to(torch.int8)
        tensors[layer + "weight_scale"] = factor if scale is None else scale
        tensors[layer + "comfy_quant"] = torch.tensor([*content], dtype=torch.uint8)

    return with_tensors(change)


INT8 = b'{"format": "int8_tensorwise"}'


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Home], None]:
    """A safetensors file with this header, whatever it says."""

    def make(home: Home) -> None:
        size = len(header) if length is None else length
        replaced(home.adapter, struct.pack("<Q", size) + header + data)

    return make


def changed_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Home], None]:
    """The golden file with another header before its data."""

    def make(home: Home) -> None:
        content = ADAPTER.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        new = json.dumps(header).encode()
        new += b" " * (-len(new) % 8)
        replaced(home.adapter, struct.pack("<Q", len(new)) + new + content[8 + size :])

    return make


def pickled(change: Callable[[dict[Any, Any]], Any]) -> Callable[[Home], None]:
    """The golden adapter as a PyTorch file with other content."""

    def make(home: Home) -> None:
        content: dict[Any, Any] = dict(adapter_tensors())
        changed = change(content)
        torch.save(content if changed is None else changed, replaced(home.adapter))

    return make


class Program:
    """A pickle that starts a program when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def program(home: Home) -> None:
    content = {"weight": Program(home.base / "marker")}
    replaced(home.adapter, pickle.dumps(content))


def program_in_zip(home: Home) -> None:
    torch.save({"weight": Program(home.base / "marker")}, replaced(home.adapter))


def deflated(path: Path, megabytes: int = 400) -> None:
    """A PyTorch file whose one tensor is far larger than the file."""
    count, wanted = 100_003, megabytes * 250_000 + 3
    torch.save({TOKENS: torch.zeros(count)}, replaced(path))
    with zipfile.ZipFile(path) as source:
        entries = [(info.filename, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name, content in entries:
            if name.endswith("data.pkl"):
                content = content.replace(struct.pack("<i", count), struct.pack("<i", wanted))
            if not name.endswith("data/0"):
                target.writestr(name, content)
                continue
            with target.open(name, "w") as entry:
                for start in range(0, wanted * 4, 4_000_000):
                    entry.write(bytes(min(4_000_000, wanted * 4 - start)))


def huge_shapes(home: Home) -> None:
    """Sizes that fit each other, in a file of 50 GB that takes no room."""
    count = 200_000_000
    header = {TOKENS: {"dtype": "F32", "shape": [count, 64], "data_offsets": [0, count * 256]}}
    content = ADAPTER.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    golden = json.loads(content[8 : 8 + size])
    end = count * 256
    for name, entry in golden.items():
        if name not in ("__metadata__", TOKENS):
            start, stop = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [end, end + stop - start]}
            end += stop - start
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    sparse(home.adapter, 8 + len(new) + end, struct.pack("<Q", len(new)) + new)


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def renamed(old: str, new: str) -> Callable[[Home], None]:
    return with_tensors(lambda tensors: tensors.__setitem__(new, tensors.pop(old)))


def link(target: str) -> Callable[[Home], None]:
    return lambda home: replaced(home.adapter).symlink_to(target)


def pooled(
    change: Callable[[Tensors], Any], shape: str = "blocks", **metadata: str
) -> Callable[[Home], None]:
    """The golden adapter with new layer pooling, which gives its own tokens, and then a change."""

    def make(home: Home) -> None:
        tensors = pooled_adapter("dla", shape=shape, seed=None)
        change(tensors)
        write(replaced(home.adapter), tensors, **metadata)

    return make


def filled(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[POOLS + name].fill_(value)


def reshaped(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(POOLS + name, torch.zeros(shape))


def many_blocks(tensors: Tensors) -> None:
    first = POOLS + "text.blocks.0."
    for name in [name for name in tensors if name.startswith(first)]:
        for number in range(2, 900):
            tensors[name.replace("blocks.0.", f"blocks.{number}.")] = tensors[name].clone()


def many_tensors(home: Home) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"t{n}":{entry}' for n in range(300_000)) + "}"
    raw(header.encode())(home)


def _same(tensors: Tensors) -> None:
    pass


def _converted_pools(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors.update({n: t.to(dtype) for n, t in tensors.items() if n.startswith(POOLS)})

    return change


def _truncated(home: Home) -> None:
    replaced(home.adapter, ADAPTER.read_bytes()[:-1000])


def _truncated_pickle(home: Home) -> None:
    pickled(lambda content: None)(home)
    replaced(home.adapter, home.adapter.read_bytes()[:200_000])


def _other_zip(home: Home) -> None:
    with zipfile.ZipFile(replaced(home.adapter), "w") as file:
        file.writestr("readme.txt", "text")


def _entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[TOKENS].__setitem__(key, value)


def _setting_in(name: str, tensor: torch.Tensor) -> Callable[[dict[Any, Any]], None]:
    return lambda content: content.__setitem__(name, tensor)


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Home], None]:
    """The golden adapter in two shards, and then a change of their folder or of weight_map."""

    def make(home: Home) -> None:
        folder, tensors = home.adapter.parent, adapter_tensors()
        places = {n: f"{number % 2}.safetensors" for number, n in enumerate(tensors)}
        for file in ("0.safetensors", "1.safetensors"):
            write(folder / file, {n: t for n, t in tensors.items() if places[n] == file})
        changed = change(folder, places)
        if not isinstance(changed, bytes):
            changed = json.dumps({"weight_map": places if changed is None else changed}).encode()
        (folder / INDEX).write_bytes(changed)

    return make


def _shards_elsewhere(name: str) -> Callable[[Home], None]:
    def change(folder: Path, places: dict[str, str]) -> Any:
        (folder / "0.safetensors").rename(folder.parent / "0.safetensors")
        above = name.replace("BASE", str(folder.parent))
        return {n: above if file.startswith("0") else file for n, file in places.items()}

    return sharded(change)


def _saying(metadata: dict[str, Any]) -> Callable[[Path, dict[str, str]], bytes]:
    def change(_: Path, places: dict[str, str]) -> bytes:
        return json.dumps({"metadata": metadata, "weight_map": places}).encode()

    return change


def _linked_shard(folder: Path, _: Any) -> None:
    (folder / "0.safetensors").rename(folder.parent / "0.safetensors")
    (folder / "0.safetensors").symlink_to(folder.parent / "0.safetensors")


def _swapped_shards(folder: Path, _: Any) -> None:
    (folder / "0.safetensors").rename(folder / "2.safetensors")
    (folder / "1.safetensors").rename(folder / "0.safetensors")
    (folder / "2.safetensors").rename(folder / "1.safetensors")


def _twice(content: dict[Any, Any]) -> Any:
    return {"module": content, "content": content}


CASES = (
    # Scales and markers that belong to a weight
    *(
        Case(
            f"scaled fp8 ({scale}) in {part}",
            scaled_fp8(name, scale=scale),
            ENCODED,
            USED,
            closest=0.3,
        )
        for part, name in (
            ("body", BODY_WEIGHT),
            ("final layer", FINAL_WEIGHT),
            ("projector", PROJECTOR),
        )
        for scale in ("scale_weight", "weight_scale")
    ),
    Case("int8 in the body", int8(INT8), ENCODED, USED, closest=0.1),
    Case("int8 in keys", int8(INT8, name=KEY), LAYERS, USED),
    *(
        Case(f"int8 with {what}", int8(content, scale), ENCODED, said=said)
        for what, content, scale, said in (
            ("a scale of another shape", INT8, torch.ones(1, 7), "is int8"),
            ("a scale of no numbers", INT8, torch.ones(0, 1), "is int8"),
            ("a scale in whole numbers", INT8, torch.ones(1).int(), "is int(8|32)"),
            ("a scale that is no number", INT8, torch.tensor(float("nan")), "not numbers"),
            ("an infinite scale", INT8, torch.tensor(float("inf")), "not numbers"),
            ("a mark that is no JSON", b'{"format": ', None, "comfy_quant"),
            ("a mark that is no text", b"\xff\xfe\x00", None, "comfy_quant"),
            ("a deep mark", b"[" * 4000, None, "comfy_quant"),
            ("a long mark", INT8 + b" " * 2**20, None, "is int8"),
            ("a mark of another kind", b"[1]", None, "is int8"),
            ("a rotation", INT8[:-1] + b', "convrot": true}', None, "is int8"),
        )
    ),
    Case("scaled fp8 in keys", scaled_fp8(KEY, scale="scale_weight"), LAYERS, USED),
    Case("scaled fp8 in a LoRA", scaled_fp8(LORA, scale="scale_weight"), LAYERS, USED),
    Case(
        "a quantisation of another kind beside a weight",
        setting(BODY_WEIGHT.removesuffix("weight") + "comfy_quant", torch.zeros(9).byte()),
        ENCODED,
        said="comfy_quant",
    ),
    Case(
        "bitsandbytes beside a weight",
        setting(FINAL_WEIGHT + ".absmax", torch.zeros(9)),
        ENCODED,
        said="absmax",
    ),
    Case(
        "a LoRA of a wrong shape",
        with_tensors(lambda t: t.__setitem__(LORA, torch.ones(t[LORA].shape[0] + 3, 4))),
        NODES,
        said="to_q_lora",
    ),
    Case("keys of a wrong shape", setting(KEY, torch.ones(7, 96)), LAYERS, said="7, 96"),
    # Layer pooling
    *(
        Case(f"new layer pooling ({shape})", pooled(_same, shape), POOLED, USED, closest=1e-3)
        for shape in ("blocks", "scores")
    ),
    *(
        Case(
            f"{value} in layer pooling's {name} ({shape})",
            pooled(filled(name, value), shape),
            POOLED,
            said="not numbers|NaN",
        )
        for shape, name in (
            ("blocks", "image.weighted_sum.weight"),
            ("blocks", "text.blocks.1.mlp.down_proj.weight"),
            ("scores", "image.gate.weight"),
        )
        for value in (math.nan, math.inf)
    ),
    *(
        Case(
            f"layer pooling's {name} of shape {list(shape)}", pooled(reshaped(name, *shape)), SHOWN
        )
        for name, shape in (
            ("text.weighted_sum.weight", (9,)),
            ("text.weighted_sum.weight", ()),
            ("text.weighted_sum.weight", (0,)),
            ("image.blocks.0.self_attn.q_proj.weight", (0, 64)),
            ("image.blocks.0.self_attn.q_proj.weight", (100, 64)),
            ("image.blocks.0.mlp.gate_proj.weight", (20_000, 64)),
            ("image.blocks.999999999.mlp.gate_proj.weight", (64, 64)),
            ("image.blocks.²٣.mlp.gate_proj.weight", (64, 64)),
            ("\x1b[31m\n.weighted_sum.weight", (4,)),
        )
    ),
    Case("900 blocks of layer pooling", pooled(many_blocks), SHOWN, said="blocks", needs=200),
    Case(
        "half of layer pooling",
        pooled(lambda t: [t.pop(n) for n in list(t) if n.startswith(POOLS + "text.")]),
        SHOWN,
        said="lacks",
    ),
    *(
        Case(
            f"layer pooling as {dtype}",
            pooled(_converted_pools(dtype)),
            POOLED,
            said="layer_pooling",
        )
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    *(
        Case(f"layer pooling of the layers {text[:20]!r}", pooled(_same, mllm_layers=text), BOTH)
        for text in ("", "9" * 5000, "0," * 100_000, "0,1,2,²", "3,2,1,0", "\x1b[31m\n", "0,1,2,9")
    ),
    # Tensors that are no weights
    *(
        Case(f"{part} as {dtype}", converted(name, dtype), ways, said=re.escape(name))
        for part, name, ways in (
            ("reference tokens", TOKENS, BOTH),
            ("projector", PROJECTOR, BOTH),
            ("body", BODY_WEIGHT, BOTH),
            ("keys", KEY, LAYERS),
            ("LoRA", LORA, LAYERS),
        )
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64)
    ),
    *(
        Case(f"{value} in {part}", setting(name, tensor * value), ways, said="not numbers|NaN")
        for part, name, ways in (
            ("norm", NORM, BOTH),
            ("keys", KEY, LAYERS),
            ("LoRA", LORA, (NODES[0],)),
        )
        for value in (math.nan, math.inf)
        for tensor in (load_file(ADAPTER)[name],)
    ),
    # Sizes
    Case("no reference tokens", setting(TOKENS, torch.zeros(0, 64)), ALL, said="reference.tokens"),
    Case("no width", setting(TOKENS, torch.zeros(16, 0)), ALL),
    Case("200 million reference tokens", huge_shapes, ALL, mapped=60_000),
    Case(
        "a final layer numbered 999,999,999",
        renamed(FINAL_WEIGHT, FINAL_WEIGHT.replace("layers.0", "layers.999999999")),
        ENCODED,
    ),
    Case(
        "a body layer numbered 999,999,999",
        renamed(BODY_WEIGHT, BODY_WEIGHT.replace("layers.0", "layers.999999999")),
        ENCODED,
    ),
    Case("an image_size of 5,000 digits", with_tensors(_same, image_size="9" * 5000), ALL),
    Case("an image_size of another script", with_tensors(_same, image_size="²"), ALL),
    Case("an image_size beyond any picture", with_tensors(_same, image_size="9" * 12), ALL),
    Case("300,000 tensors of other names", many_tensors, ALL, said="a header of"),
    # Headers of safetensors files
    Case("a header of 100,000 brackets", raw(nested(100_000)), BOTH),
    Case("a header that claims 4 GB", raw(b"{}", length=2**32 - 1), BOTH),
    Case("a header that claims 2 to the 63", raw(b"{}", length=2**63), BOTH),
    Case("a header that is no JSON", raw(b'{"a":'), BOTH),
    Case("a header that is a list", raw(b"[]      "), BOTH),
    Case("an empty header", raw(b"{}      "), BOTH),
    Case("a header of other bytes", raw(b'{"\xff\xfe": 1}'), BOTH),
    Case("a truncated file", _truncated, BOTH, said="whole safetensors"),
    *(
        Case(f"an entry with {key} {value!r}", changed_header(_entry(key, value)), BOTH)
        for key, values in {
            "shape": ([-1, 64], [2**63, 64], [1.5, 64], "16", [[16], 64], [], {}, None, [True, 64]),
            "dtype": ("F4", "", None, 7, [], "I32", "C64"),
            "data_offsets": ([0, 2**63], [-4, 0], [4, 0], [0], None, "0", [0.5, 1], [0, 4]),
        }.items()
        for value in values
    ),
    Case(
        "control characters in a name",
        renamed(PROJECTOR, "image_proj_model.\x1b[31m\n\0proj"),
        BOTH,
    ),
    Case("a name of a megabyte", renamed(PROJECTOR, "image_proj_model." + "x" * 1_000_000), BOTH),
    Case(
        "metadata that is no text",
        changed_header(lambda h: h.__setitem__("__metadata__", {"image_size": 7})),
        BOTH,
        EITHER,
    ),
    Case(
        "a name given twice",
        raw(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        BOTH,
    ),
    # PyTorch files
    Case("a pickle that starts a program", program, ALL, said="code"),
    Case("a zipped pickle that starts a program", program_in_zip, ALL, said="code"),
    Case(
        "a pickle with integer keys beside",
        pickled(lambda c: c.__setitem__(7, c[NORM])),
        ALL,
        EITHER,
    ),
    Case("a pickle of integer keys", pickled(lambda c: {7: c[NORM]}), ALL),
    Case("a pickle of keys of many kinds", pickled(lambda c: {None: 1, (1, 2): c[NORM]}), ALL),
    Case("a pickle of a list", pickled(lambda c: [c[NORM]]), ALL, said="list"),
    Case("a pickle with its weights twice", pickled(_twice), ALL, EITHER),
    *(
        Case(f"a pickle with {kind} tensors", pickled(_setting_in(name, tensor)), BOTH, result)
        for name in (PROJECTOR,)
        for kind, tensor, result in (
            ("sparse", torch.zeros(64, 64).to_sparse(), REFUSED),
            ("meta", torch.zeros(64, 64, device="meta"), REFUSED),
            ("expanded", torch.ones(1, 1).expand(64, 64), EITHER),
            ("hugely expanded", torch.ones(1, 1).expand(1_000_000_000, 64), REFUSED),
            (
                "quantised",
                torch.quantize_per_tensor(torch.ones(64, 64), 1, 0, torch.qint8),
                REFUSED,
            ),
            ("integer", torch.ones(64, 64).long(), REFUSED),
            ("overlapping", torch.ones(64).as_strided((64, 64), (0, 1)), EITHER),
        )
    ),
    Case("a deflated pickle of 400 MB", lambda home: deflated(home.adapter), ALL),
    Case("a truncated pickle", _truncated_pickle, ALL),
    Case("a ZIP archive of something else", _other_zip, ALL),
    # Shards
    Case("an adapter in two shards", sharded(lambda *_: None), SHARDED, USED, closest=1e-3),
    *(
        Case(f"an adapter's index that names {name}", _shards_elsewhere(name), SHARDED, said="outs")
        for name in ("../0.safetensors", "BASE/0.safetensors", "..\\0.safetensors")
    ),
    Case("a shard of an adapter that is a link outside", sharded(_linked_shard), SHARDED),
    Case("swapped shards of an adapter", sharded(_swapped_shards), SHARDED, said="no shard of"),
    Case(
        "a shard of an adapter that is a pipe",
        sharded(lambda folder, _: pipe(folder / "0.safetensors")),
        SHARDED,
        said="lacks 1 of its 2",
    ),
    Case(
        "an adapter's index of 100,000 weights",
        sharded(lambda *_: {str(n): "0.safetensors" for n in range(100_000)}),
        SHARDED,
        said="no shard of",
    ),
    *(
        Case(f"an adapter's index of {given!r}", sharded(lambda *_, g=given: g), SHARDED)
        for given in ([], 7, {"a": 7}, {"a": INDEX}, {"\x1b[31m" * 900: "0.safetensors"})
    ),
    *(
        Case(f"an adapter's index that is {what}", sharded(lambda *_, t=text: t), SHARDED)
        for what, text in (
            ("no JSON", b'{"weight_map": '),
            ("nested", nested(100_000)),
            ("huge", b" " * 9_000_000),
        )
    ),
    *(
        Case(f"an adapter's index that says {what}", sharded(_saying(given)), SHARDED, said=said)
        for what, given, said in (
            ("much", {"x" * 1000: {"y": ["z"] * 500_000}}, "metadata of"),
            ("it was trained at image_size 7", {"image_size": 7}, "image_size '7'"),
        )
    ),
    # What is no file
    Case("a pipe", lambda home: pipe(home.adapter), ALL),
    Case("a folder", lambda home: replaced(home.adapter).mkdir(), ALL),
    Case("a link to itself", link("adapter.safetensors"), ALL),
    Case("a link to nothing", link("/nowhere/at/all"), ALL),
    Case("a link to a device that never ends", link("/dev/zero"), ALL),
    Case("an empty file", lambda home: replaced(home.adapter, b""), ALL, said="empty"),
    Case("20 GB of zeros", lambda home: sparse(home.adapter, 20_000_000_000), ALL, mapped=25_000),
)
