"""The command `easyref`: look at an adapter file, encode references, draw data, train."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import EasyRefError, OutOfMemoryError

_DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 refused with a sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except EasyRefError as error:
        print(f"easyref: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("easyref: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyref", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="say what an adapter file holds")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print plain JSON")
    inspect.set_defaults(run=_inspect)

    encode = commands.add_parser(
        "encode", help="condense reference images and a prompt into reference tokens"
    )
    encode.add_argument("--adapter", type=Path, required=True, metavar="FILE")
    encode.add_argument(
        "--mllm", type=Path, metavar="DIR", help="Qwen2-VL directory: tokenizer, sizes, weights"
    )
    encode.add_argument("--prompt", default="", metavar="TEXT")
    encode.add_argument(
        "--image-size", type=int, default=336, metavar="PIXELS", help="default: %(default)s"
    )
    encode.add_argument(
        "--aggregation",
        default="easyref",
        metavar="NAME",
        help="easyref (default), average or concatenate",
    )
    encode.add_argument(
        "--insert-before",
        type=int,
        metavar="LAYERS",
        help="reference tokens enter before the last 1, 2 or 3 layers (default: as trained)",
    )
    encode.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    encode.add_argument("--device", default="cpu", help="default: %(default)s")
    encode.add_argument("--out", type=Path, required=True, metavar="FILE")
    encode.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    encode.set_defaults(run=_encode)

    data = commands.add_parser("demo-data", help="draw groups of pictures to train and judge with")
    data.add_argument("folder", type=Path, metavar="FOLDER")
    data.add_argument("--groups", type=int, default=1000, help="default: %(default)s")
    data.add_argument("--held-out-groups", type=int, default=150, help="default: %(default)s")
    data.add_argument("--pictures", type=int, default=5, help="a group; default: %(default)s")
    data.add_argument("--side", type=int, default=128, help="in pixels; default: %(default)s")
    data.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    data.set_defaults(run=_demo_data)

    train = commands.add_parser("train", help="train an adapter, one stage a recipe")
    train.add_argument("recipe", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print what is trained, the memory it takes, and draw the first batch",
    )
    train.add_argument("--restart", action="store_true", help="do not resume; start anew")
    train.add_argument(
        "--force", action="store_true", help="resume even though the settings have changed"
    )
    train.set_defaults(run=_train)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    from .checkpoint import load_checkpoint

    report = load_checkpoint(options.file).report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")
    return 0


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _encode(options: argparse.Namespace) -> int:
    import torch

    from .aggregation import Reference, encode_references
    from .checkpoint import load_checkpoint
    from .loading import plan_encoder
    from .pictures import open_picture
    from .prompt import PromptTokenizer
    from .tokens import save_tokens

    if options.mllm is None:
        raise EasyRefError(
            "There is no tokenizer: an adapter file carries none. Name the Qwen2-VL directory "
            "with --mllm; its weights are only used where the adapter has none of its own."
        )
    device = _device(options.device)
    references = [Reference(open_picture(path), name=str(path)) for path in options.images]
    checkpoint = load_checkpoint(options.adapter)
    plan = plan_encoder(checkpoint, options.mllm)
    tokenizer = PromptTokenizer.from_directory(options.mllm)
    dtype = getattr(torch, options.dtype)
    encoder = plan.build(dtype=dtype, compute_dtype=dtype).to(device)

    def show(done: int, total: int) -> None:
        print(f"\rencoding {done}/{total}", end="", file=sys.stderr, flush=True)

    try:
        tokens = encode_references(
            encoder,
            tokenizer,
            references,
            options.prompt,
            adapter=checkpoint.identity,
            adapter_name=checkpoint.name,
            aggregation=options.aggregation,
            image_size=options.image_size,
            insert_before=options.insert_before,
            device=device,
            progress=show,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{device} has not enough memory ({str(error).splitlines()[0]}). Use fewer pictures, "
            "a smaller --image-size or --dtype bfloat16."
        ) from error
    finally:
        print(file=sys.stderr)
    print(save_tokens(tokens, options.out))
    return 0


def _demo_data(options: argparse.Namespace) -> int:
    from .demo.dataset.files import DatasetOptions, write_dataset

    names = ("groups", "held_out_groups", "pictures", "side", "seed")
    print(write_dataset(options.folder, DatasetOptions(**{n: getattr(options, n) for n in names})))
    return 0


def _train(options: argparse.Namespace) -> int:
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise EasyRefError(
            f"Training needs {error.name}, which is not installed. Install the extra: "
            'pip install "easyref[train]".'
        ) from error
    from .training.config import load_settings
    from .training.loop import dry_run, train

    settings = load_settings(options.recipe, options.overrides)
    if options.dry_run:
        print(dry_run(settings))
        return 0
    summary = train(settings, resume=not options.restart, force=options.force)
    if summary.skipped:
        print(f"{len(summary.skipped)} broken records were skipped", file=sys.stderr)
    if summary.exported is not None:  # one process writes for all
        print(summary.exported)
    return 0


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EasyRefError(
            f"The device {name!r} cannot be used ({str(error).splitlines()[0]}). Choose cpu, or a "
            "device PyTorch finds here."
        ) from error
    return device


if __name__ == "__main__":
    sys.exit(main())
