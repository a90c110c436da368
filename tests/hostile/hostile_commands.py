"""What a person may type by mistake: results over inputs, impossible numbers and places."""

from __future__ import annotations

from corpus import Case, Way
from homes import Home, pipe


def encoded(name: str, *more: str, said: str = "", result: str = "refused") -> Case:
    """`easyref encode` with other options; BASE stands for the home."""
    return Case(name, prepare, (Way("command_encode", more, name="easyref encode"),), result, said)


def prepare(home: Home) -> None:
    (home.base / "notes.txt").write_text("notes")
    (home.base / "link.safetensors").symlink_to(home.adapter)
    pipe(home.base / "pipe.safetensors")
    (home.base / "folder.safetensors").mkdir()
    tokens = home.base / "output" / "older.safetensors"
    tokens.write_bytes(home.tokens.read_bytes())


CASES = (
    encoded("tokens over the picture", "--out", "BASE/input/picture.png"),
    encoded("tokens over the adapter", "--out", "BASE/models/easyref/adapter.safetensors"),
    encoded("tokens over the adapter by a link", "--out", "BASE/link.safetensors"),
    encoded("tokens over the MLLM's weights", "--out", "BASE/models/LLM/mllm/model.safetensors"),
    encoded("tokens over the MLLM's configuration", "--out", "BASE/models/LLM/mllm/config.json"),
    encoded("tokens over older ones", "--out", "BASE/output/older.safetensors", said="overwrite"),
    encoded(
        "tokens over older ones, as asked",
        "--out",
        "BASE/output/older.safetensors",
        "--overwrite",
        result="used",
    ),
    encoded(
        "tokens over the adapter, as asked",
        "--overwrite",
        "--out",
        "BASE/models/easyref/adapter.safetensors",
    ),
    encoded("tokens over the picture, as asked", "--overwrite", "--out", "BASE/input/picture.png"),
    encoded("tokens over notes, as asked", "--overwrite", "--out", "BASE/notes.txt"),
    encoded("tokens as a picture", "--out", "BASE/output/tokens.png", said="safetensors"),
    encoded("tokens over a pipe", "--out", "BASE/pipe.safetensors"),
    encoded("tokens over a folder", "--out", "BASE/folder.safetensors"),
    encoded("tokens into a device", "--out", "/dev/full"),
    encoded("tokens below a file", "--out", "BASE/notes.txt/tokens.safetensors"),
    encoded("tokens of a name that is too long", "--out", "BASE/" + "x" * 300 + ".safetensors"),
    encoded("tokens of control characters", "--out", "/proc/\x1b[31m\n.safetensors"),
    encoded("an image_size of 1,000,000,000", "--image-size", "1000000000"),
    encoded("an image_size below 0", "--image-size", "-1"),
    encoded("an image_size of 100 digits", "--image-size", "9" * 100),
    encoded("insertion before 0 layers", "--insert-before", "0"),
    encoded("insertion before 1,000,000,000 layers", "--insert-before", "1000000000"),
    encoded("an aggregation of control characters", "--aggregation", "\x1b[31m\n"),
    encoded("layers of control characters", "--mllm-layers", "\x1b[31m\n"),
    encoded("100,000 weights of layers", "--text-layers", "1," * 50_000 + "1"),
    encoded("a weight of a layer that is not a number", "--picture-layers", "1,nan"),
    encoded("a device of control characters", "--device", "\x1b[31m\n"),
    encoded("a device of no data", "--device", "meta"),
    encoded("a device that is not there", "--device", "cuda:1000000"),
    encoded("a prompt of 3 MB", "--prompt", "word " * 25_000),
    encoded("a prompt that is no Unicode", "--prompt", "\udcff\udcfe"),
)
