"""The command `easyref`: inspect and convert adapters, encode references, train and measure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .devices import usable_device
from .errors import EasyRefError
from .evaluation.building.options import add_build_groups_command
from .evaluation.options import add_bench_command
from .extras import require_extra
from .untrusted import escaped

if TYPE_CHECKING:
    from .encode.mllm_layers import MllmLayerWeights
    from .tokens.reference_tokens import ReferenceTokens

_DTYPES = ("float32", "bfloat16", "float16")
_INT8 = "int8"
_FILE = "adapter file, or the .safetensors.index.json of its shards"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 refused, with a message on stderr."""
    options = _parsed(arguments)
    try:
        return options.run(options)
    except EasyRefError as error:
        print(f"easyref: {escaped(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("easyref: interrupted", file=sys.stderr)
        return 130


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `section.key=value` may come after options too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    settings = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest and (rest != settings or "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyref", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show the contents of an adapter file")
    inspect.set_defaults(run=_inspect)
    add = inspect.add_argument
    add("file", type=Path, metavar="FILE", help=_FILE)
    add("--json", action="store_true", help="print plain JSON")

    convert = commands.add_parser(
        "convert",
        help="write an adapter file in another dtype, with or without the MLLM, in shards",
    )
    convert.set_defaults(run=_convert)
    add = convert.add_argument
    add("file", type=Path, metavar="FILE", help=_FILE)
    help_dtype = "default: as each weight is; fp8, int8: matrices in one byte, a scale a row"
    add("--dtype", choices=("float32", "bfloat16", "float16", "fp8", "int8"), help=help_dtype)
    which = convert.add_mutually_exclusive_group()
    help_mllm = "Qwen2-VL directory whose weights are put into the file, where it has none"
    which.add_argument("--mllm", type=Path, metavar="DIR", help=help_mllm)
    help_without = "leave the MLLM out; EasyRef Loader then needs its directory"
    which.add_argument("--without-mllm", action="store_true", help=help_without)
    help_size = "write shards with an index where the file would be larger: 2GB, 500MB, or bytes"
    add("--max-shard-size", metavar="SIZE", help=help_size)
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    add("--overwrite", action="store_true", help="replace an adapter that is there")

    encode = commands.add_parser(
        "encode", help="encode reference images and a prompt into reference tokens"
    )
    encode.set_defaults(run=_encode)
    add = encode.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="reference images, in order")
    add("--adapter", type=Path, required=True, metavar="FILE", help="EasyRef adapter file")
    add("--mllm", type=Path, metavar="DIR", help="Qwen2-VL directory: tokenizer, sizes, weights")
    add("--prompt", default="", metavar="TEXT", help="for the MLLM, with the images; default: none")
    help_size = "of the images; 0, the default: as the adapter was trained"
    add("--image-size", type=int, default=0, metavar="PIXELS", help=help_size)
    help_aggregation = "easyref (default), average, concatenate, or dla, lap with adapters for it"
    add("--aggregation", default="easyref", metavar="NAME", help=help_aggregation)
    help_layers = "weights of the layers that dla and lap pool: even, early, late, text-heavy, ..."
    add("--mllm-layers", metavar="PRESET", help=help_layers)
    help_list = "factors for %s tokens, from the first layer to the last, such as 1,0.5,0"
    add("--text-layers", default="", metavar="LIST", help=help_list % "text")
    add("--picture-layers", default="", metavar="LIST", help=help_list % "image")
    help_insert = "reference tokens enter before the last 1, 2 or 3 layers (default: as trained)"
    add("--insert-before", type=int, metavar="LAYERS", help=help_insert)
    help_dtype = "of the computation, or int8: the MLLM's weights in one byte; default: %(default)s"
    add("--dtype", choices=(*_DTYPES, _INT8), default="float32", help=help_dtype)
    add("--device", default="cpu", help="default: %(default)s")
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    add("--overwrite", action="store_true", help="replace reference tokens that are there")

    train = commands.add_parser("train", help="train an adapter, one stage a recipe")
    train.set_defaults(run=_train)
    add = train.add_argument
    add("recipe", type=Path, metavar="CONFIG.yaml", help="such as those in recipes/")
    help_setting = "replaces a setting of the recipe"
    add("overrides", nargs="*", metavar="section.key=value", help=help_setting)
    help_dry_run = "print what is trained and the memory needed, and draw the first batch"
    add("--dry-run", action="store_true", help=help_dry_run)
    help_overwrite = "begin anew, and replace what an earlier run has left in output.folder"
    add("--overwrite", action="store_true", help=help_overwrite)
    add("--force", action="store_true", help="resume although the settings have changed")

    add_bench_command(commands)
    add_build_groups_command(commands)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from .adapter.checkpoint import load_checkpoint

    report = load_checkpoint(options.file).report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from .adapter.checkpoint import load_checkpoint
    from .adapter.convert import convert_adapter
    from .encode.plan_encoder import plan_encoder

    checkpoint = load_checkpoint(options.file)
    mllm = {} if options.without_mllm else None
    if options.mllm is not None:
        mllm = plan_encoder(checkpoint, options.mllm).sources
    written = convert_adapter(
        checkpoint,
        options.out,
        options.dtype,
        mllm=mllm,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    print(written)
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else escaped(str(value))


def _encode(options: argparse.Namespace) -> int:
    from .out_of_memory import lack_of_memory
    from .tokens.reference_tokens import check_tokens_path, save_tokens

    if options.mllm is None:
        raise EasyRefError(
            "There is no tokenizer: an adapter file carries none. Name the Qwen2-VL directory "
            "with --mllm; its weights are only used where the adapter has none of its own."
        )
    inputs = (*options.images, options.adapter, options.mllm)
    check_tokens_path(options.out, inputs, options.overwrite)
    device = usable_device(options.device)
    try:
        tokens = _encode_group(options, device)
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
        raise EasyRefError(
            f"{device} has not enough memory ({reason}). Use fewer pictures, a smaller "
            "--image-size, or --dtype bfloat16 or int8."
        ) from error
    print(save_tokens(tokens, options.out, overwrite=options.overwrite))
    return 0


def _encode_group(options: argparse.Namespace, device: Any) -> ReferenceTokens:
    """Everything is checked before weights are read."""
    import torch

    from .adapter.checkpoint import load_checkpoint
    from .encode.group import Reference, chosen_size, plan_group
    from .encode.passes import encode_references
    from .encode.plan_encoder import plan_encoder
    from .pictures.loading import named, open_picture
    from .pictures.preprocessing import reduced
    from .qwen2vl import casting
    from .qwen2vl.prompt import PromptTokenizer

    encoder_plan = plan_encoder(load_checkpoint(options.adapter), options.mllm)
    tokenizer = PromptTokenizer.from_directory(options.mllm)
    size = chosen_size(options.image_size, encoder_plan)
    references = []
    for path in options.images:
        picture = open_picture(path)
        with named(str(path)):  # full-size photographs would fill the memory
            references.append(Reference(reduced(picture, size), name=str(path)))
    plan = plan_group(
        encoder_plan,
        tokenizer,
        references,
        options.prompt,
        aggregation=options.aggregation,
        image_size=size,
        insert_before=options.insert_before,
        mllm_layers=_mllm_layers(options),
    )
    int8 = options.dtype == _INT8
    if int8:  # a CPU is slow in half precision
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    else:
        dtype = getattr(torch, options.dtype)
    # A file in half precision keeps its size: its weights are converted when they are used.
    stored = None if dtype == torch.float32 else dtype
    encoder = encoder_plan.build(
        operations=casting, dtype=stored, compute_dtype=dtype, int8=int8
    ).to(device)

    def show(done: int, total: int) -> None:
        print(f"\rencoding {done}/{total}", end="", file=sys.stderr, flush=True)

    try:
        return encode_references(encoder, plan, device=device, progress=show)
    finally:
        print(file=sys.stderr)


def _mllm_layers(options: argparse.Namespace) -> MllmLayerWeights | None:
    from .encode.mllm_layers import MllmLayerWeights, parse_factors

    if options.mllm_layers is None and not options.text_layers and not options.picture_layers:
        return None
    return MllmLayerWeights(
        options.mllm_layers or "even",
        parse_factors(options.text_layers, "--text-layers"),
        parse_factors(options.picture_layers, "--picture-layers"),
    )


def _train(options: argparse.Namespace) -> int:
    require_extra("Training", "train", "diffusers", "accelerate", "pydantic", "yaml")
    from .training.config import load_settings
    from .training.loop import dry_run, train

    settings = load_settings(options.recipe, options.overrides)
    if options.dry_run:
        print(dry_run(settings))
        return 0
    summary = train(settings, overwrite=options.overwrite, force=options.force)
    if summary.skipped:
        print(f"{len(summary.skipped)} broken records were skipped", file=sys.stderr)
    if summary.exported is not None:  # one process writes for all
        print(summary.exported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
