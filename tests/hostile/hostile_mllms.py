"""Folders of MLLMs that are damaged, foreign or made to do harm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from corpus import EITHER, USED, Case, Way
from goldens import BODY, MLLM, adapter_tensors, without, write
from homes import Home, change_config, pipe, replaced, sparse
from hostile_adapters import Program
from safetensors.torch import load_file

ALL = (
    Way("python_encode", name="Python"),
    Way("command_encode", name="easyref encode"),
    Way("comfy_entry_points.graph", name="nodes"),
)
BOTH = (ALL[0], ALL[-1])
LIST = (Way("comfy_entry_points.choices", name="choices"),)
ALL_AND_LIST = (*ALL, *LIST)
EVERYWHERE = (*BOTH, *LIST)


def config(**changes: Any) -> Callable[[Home], None]:
    return lambda home: change_config(home, **changes)


def content(name: str, content: bytes) -> Callable[[Home], None]:
    return lambda home: replaced(home.mllm / name, content)


def without_own_mllm(change: Callable[[Home], Any]) -> Callable[[Home], None]:
    """The adapter carries no MLLM, so that the folder's weights are read."""

    def make(home: Home) -> None:
        write(replaced(home.adapter), without(adapter_tensors(), BODY))
        change(home)

    return make


def instead(change: Callable[[Home], Any]) -> Callable[[Home], None]:
    """The adapter carries no MLLM, and the folder's weights are something else."""

    def make(home: Home) -> None:
        replaced(home.mllm / "model.safetensors")
        change(home)

    return without_own_mllm(make)


def index(weight_map: Any, *files: str) -> Callable[[Home], None]:
    """An index of shards instead of the weights."""

    def change(home: Home) -> None:
        for file in files:
            shutil.copy(MLLM / "model.safetensors", home.mllm / file)
        replaced(home.mllm / "model.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        replaced(home.mllm / "model.safetensors.index.json", text.encode())

    return without_own_mllm(change)


def outside(name: str) -> Callable[[Home], None]:
    """An index that names the golden weights where they lie, outside the folder."""

    def change(home: Home) -> None:
        target = home.base / "outside.safetensors"
        shutil.copy(MLLM / "model.safetensors", target)
        named = dict.fromkeys(load_file(target), name.replace("BASE", str(home.base)))
        index(named)(home)

    return change


def linked_outside(home: Home) -> None:
    """A shard that is a link out of the folder, which an index names."""
    (home.base / "secret").write_bytes(b"secret of another program")
    index({"model.norm.weight": "part.safetensors"})(home)
    (home.mllm / "part.safetensors").symlink_to(home.base / "secret")


def sharded_bin(home: Home) -> None:
    weights = load_file(MLLM / "model.safetensors")
    names = sorted(weights)
    halves = {f"pytorch_model-{n + 1:05}-of-00002.bin": names[n::2] for n in range(2)}
    for file, part in halves.items():
        torch.save({name: weights[name] for name in part}, home.mllm / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    replaced(home.mllm / "model.safetensors")
    text = json.dumps({"weight_map": weight_map})
    (home.mllm / "pytorch_model.bin.index.json").write_text(text)


def one_bin(home: Home) -> None:
    torch.save(load_file(MLLM / "model.safetensors"), home.mllm / "pytorch_model.bin")
    replaced(home.mllm / "model.safetensors")


def program(home: Home) -> None:
    replaced(home.mllm / "model.safetensors")
    torch.save({"weight": Program(home.base / "marker")}, home.mllm / "pytorch_model.bin")


def remote_code(home: Home) -> None:
    """Code of its own beside the files, which both of them name."""
    code = f"import os\nos.system(\"touch '{home.base / 'marker'}'\")\n"
    (home.mllm / "own.py").write_text(code + "class Own: pass\n")
    change_config(home, auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    given = json.loads((MLLM / "tokenizer_config.json").read_text(encoding="utf-8"))
    given |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    replaced(home.mllm / "tokenizer_config.json", json.dumps(given).encode())


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Home], None]:
    def make(home: Home) -> None:
        given = json.loads((MLLM / "tokenizer.json").read_text(encoding="utf-8"))
        change(given)
        replaced(home.mllm / "tokenizer.json", json.dumps(given).encode())

    return make


def beside(write_into: Callable[[Any], Any]) -> Callable[[Home], None]:
    def make(home: Home) -> None:
        folder = home.mllm.parent / "other"
        folder.mkdir()
        write_into(folder)

    return make


def crowd(folder: Any) -> None:
    """A thousand folders, one in the other where they may be searched."""
    for number in range(1_000):
        inner = folder / f"{number:04}"
        inner.mkdir()
        (inner / "config.json").write_text('{"model_type": "llama"}')


def circle(folder: Any) -> None:
    for name in ("a", "b", "c"):
        (folder / name).symlink_to(folder)


DEEP = b'{"model_type": "qwen2_vl", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN = {
    "100,000 brackets": DEEP,
    "100,000 braces": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no JSON": b"{",
    "other bytes": b'\xff\xfe{"model_type": "qwen2_vl"}',
    "a list": b"[]",
    "a number of 100,000 digits": b'{"model_type": "qwen2_vl", "hidden_size": '
    + b"9" * 100_000
    + b"}",
    "NaN": b"NaN",
    "nothing": b"",
    "a lone surrogate": b'{"model_type": "\\ud800"}',
}

CASES = (
    # config.json
    *(
        Case(f"config.json: {name}", content("config.json", given), ALL)
        for name, given in BROKEN.items()
    ),
    *(
        Case(
            f"config.json among others: {name}",
            beside(lambda folder, given=given: (folder / "config.json").write_bytes(given)),
            (ALL[-1], *LIST),
            USED,
        )
        for name, given in BROKEN.items()
    ),
    Case("a pipe as config.json", lambda home: pipe(home.config), ALL),
    Case(
        "a pipe as config.json among others",
        beside(lambda folder: os.mkfifo(folder / "config.json")),
        (ALL[-1], *LIST),
        USED,
    ),
    Case(
        "20 GB of config.json",
        lambda home: sparse(home.config, 20_000_000_000, b"{"),
        ALL,
        mapped=1_000,
    ),
    Case(
        "20 GB of config.json among others",
        beside(lambda folder: sparse(folder / "config.json", 20_000_000_000, b"{")),
        LIST,
        USED,
    ),
    Case(
        "config.json as a link to a device",
        beside(lambda folder: (folder / "config.json").symlink_to("/dev/zero")),
        LIST,
        USED,
    ),
    Case(
        "config.json as a link to itself",
        beside(lambda folder: (folder / "config.json").symlink_to("config.json")),
        LIST,
        USED,
    ),
    Case("folders that link in a circle", beside(circle), LIST, USED),
    Case("a thousand folders", beside(crowd), LIST, USED),
    Case("a folder without permissions", beside(lambda folder: folder.chmod(0)), LIST, USED),
    Case(
        "a folder of a name that is no Unicode",
        beside(lambda folder: os.mkdir(os.fsencode(folder) + b"/\xff\xfe")),
        LIST,
        USED,
    ),
    Case("a family of control characters", config(model_type="\x1b[31m\n\0"), ALL),
    # Sizes that do not fit the weights
    *(
        Case(f"{count} layers", config(num_hidden_layers=count), ALL)
        for count in (3, 2, 1, 0, -1, 5, 10**9, 10**18)
    ),
    *(
        Case(f"{count} vision layers", config(vision_config__depth=count), BOTH)
        for count in (1, 0, -1, 3, 10**9)
    ),
    *(
        Case(f"{name.replace('__', '.')} {value}", config(**{name: value}), BOTH)
        for name, values in {
            "hidden_size": (0, -64, 10**9, 2**63),
            "intermediate_size": (0, 10**9),
            "num_attention_heads": (0, 3, 10**9),
            "num_key_value_heads": (0, 3, 10**9),
            "vocab_size": (0, 10**12),
            "max_position_embeddings": (0, -1, 0.5),
            "rms_norm_eps": (-1, 0.5e400, "small", True),
            "rope_theta": (0, -1.0, 1e400, "large", True),
            "vision_config__embed_dim": (0, 10**9),
            "vision_config__num_heads": (0, 3, 10**9),
            "vision_config__mlp_ratio": (0, -1, 1e400, 10**9),
            "vision_config__patch_size": (0, 13, 10**9),
            "vision_config__spatial_merge_size": (0, 1, 10**9),
            "vision_config__temporal_patch_size": (0, 10**9),
            "vision_config__in_chans": (0, 10**9),
            "vision_config": ("", [], 3),
        }.items()
        for value in values
    ),
    # Weights
    Case("one .bin file", without_own_mllm(one_bin), ALL, USED, closest=1e-3),
    Case("shards in .bin files", without_own_mllm(sharded_bin), ALL, USED, closest=1e-3),
    Case("a .bin file that starts a program", without_own_mllm(program), ALL, said="code"),
    Case(
        "an index that names an absolute path",
        outside("BASE/outside.safetensors"),
        ALL,
        said="outside",
    ),
    Case(
        "an index that names a path above",
        outside("../../../outside.safetensors"),
        ALL,
        said="outside",
    ),
    Case(
        "an index that names a path of Windows above",
        outside("..\\..\\..\\outside.safetensors"),
        ALL,
        said="outside",
    ),
    Case("a shard that is a link outside", linked_outside, ALL, said="outside"),
    Case(
        "an index that names /etc/passwd",
        index({"model.norm.weight": "/etc/passwd"}),
        ALL,
        said="outside",
    ),
    *(
        Case(f"an index of {given!r}", index(given), BOTH)
        for given in (
            [],
            "",
            None,
            {"a": 7},
            {"a": None},
            {"a": []},
            {"a": ""},
            {"a": "\0"},
            {"a": "."},
            {"a": "x" * 5000},
            {"a": "\x1b[31m"},
        )
    ),
    Case(
        "an index of 100,000 brackets",
        instead(content("model.safetensors.index.json", DEEP)),
        BOTH,
    ),
    Case(
        "an index that is a pipe",
        instead(lambda home: pipe(home.mllm / "model.safetensors.index.json")),
        BOTH,
    ),
    Case(
        "an index of 20 GB",
        instead(
            lambda home: sparse(home.mllm / "model.safetensors.index.json", 20_000_000_000, b"{")
        ),
        BOTH,
    ),
    Case(
        "weights that are a pipe",
        without_own_mllm(lambda home: pipe(home.mllm / "model.safetensors")),
        ALL,
    ),
    Case(
        "weights that are a folder",
        without_own_mllm(lambda home: replaced(home.mllm / "model.safetensors").mkdir()),
        ALL,
    ),
    *(
        Case(
            f"weights quantised by {method}",
            without_own_mllm(config(quantization_config={"quant_method": method})),
            ALL,
            said=method,
        )
        for method in ("bitsandbytes", "compressed-tensors", "gptq", "awq")
    ),
    *(
        Case(f"quantization_config {given!r}", config(quantization_config=given), BOTH, EITHER)
        for given in ([], "fp8", 7, {"quant_method": ["\x1b[31m"]}, {"quant_method": "\x1b[31m"})
    ),
    # The tokenizer
    Case("a tokenizer with code of its own", remote_code, ALL, EITHER),
    *(
        Case(f"{file}: {name}", content(file, given), BOTH, EITHER)
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
        for name, given in BROKEN.items()
        if name in ("100,000 brackets", "no JSON", "a list", "other bytes")
    ),
    *(
        Case(f"{file} that is a pipe", lambda home, file=file: pipe(home.mllm / file), BOTH, EITHER)
        for file in (
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "preprocessor_config.json",
            "generation_config.json",
            "added_tokens.json",
        )
    ),
    *(
        Case(
            f"{file} of 20 GB",
            lambda home, file=file: sparse(home.mllm / file, 20_000_000_000, b"{"),
            BOTH,
            EITHER,
        )
        for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    ),
    Case(
        "a tokenizer that splits by a pattern that never ends",
        tokenizer(
            lambda given: given.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            )
        ),
        BOTH,
        EITHER,
    ),
    Case(
        "a tokenizer whose ids are beyond the vocabulary",
        tokenizer(
            lambda given: given["model"]["vocab"].update(
                dict.fromkeys(list(given["model"]["vocab"])[:50], 10**9)
            )
        ),
        BOTH,
        EITHER,
    ),
    Case(
        "a tokenizer without its special tokens",
        tokenizer(lambda given: given.update(added_tokens=[])),
        BOTH,
        EITHER,
    ),
)
