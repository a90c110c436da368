"""The command `easyref`: look at an adapter file, encode references, draw data, train."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EasyRefError, OutOfMemoryError

if TYPE_CHECKING:
    from .tokens import ReferenceTokens

_DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 refused with a sentence on stderr."""
    options = _parsed(arguments)
    try:
        return options.run(options)
    except EasyRefError as error:
        print(f"easyref: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("easyref: interrupted", file=sys.stderr)
        return 130


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; settings of a recipe may stand behind options too."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    settings = [text for text in left if "=" in text and not text.startswith("-")]
    if left and (left != settings or "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyref", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="say what an adapter file holds")
    inspect.add_argument("file", type=Path, metavar="FILE", help="adapter file")
    inspect.add_argument("--json", action="store_true", help="print plain JSON")
    inspect.set_defaults(run=_inspect)

    encode = commands.add_parser(
        "encode", help="condense reference images and a prompt into reference tokens"
    )
    encode.add_argument(
        "--adapter", type=Path, required=True, metavar="FILE", help="EasyRef adapter file"
    )
    encode.add_argument(
        "--mllm", type=Path, metavar="DIR", help="Qwen2-VL directory: tokenizer, sizes, weights"
    )
    encode.add_argument(
        "--prompt", default="", metavar="TEXT", help="read along with the images; default: none"
    )
    encode.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="at which images are read; 0, the default: as the adapter was trained",
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
    encode.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="to compute in; default: %(default)s"
    )
    encode.add_argument("--device", default="cpu", help="default: %(default)s")
    encode.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )
    encode.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="reference image, in their order"
    )
    encode.set_defaults(run=_encode)

    data = commands.add_parser("demo-data", help="draw groups of pictures to train and judge with")
    data.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty one")
    data.add_argument(
        "--groups", type=int, default=1000, help="to train with; default: %(default)s"
    )
    data.add_argument(
        "--held-out-groups", type=int, default=400, help="to judge with; default: %(default)s"
    )
    data.add_argument("--pictures", type=int, default=5, help="a group; default: %(default)s")
    data.add_argument("--side", type=int, default=128, help="in pixels; default: %(default)s")
    data.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    data.set_defaults(run=_demo_data)

    demo = commands.add_parser(
        "demo-train", help="train all demo models from nothing (about six hours on two CPU cores)"
    )
    demo.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/demo"),
        metavar="FOLDER",
        help="where all parts work; default: %(default)s",
    )
    demo.add_argument("--recipes", type=Path, metavar="FOLDER", help="default: recipes/demo")
    demo.add_argument("--device", help="default: a GPU where there is one")
    demo.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="train these parts only, in this order; 3_averaged and 3_from_scratch are trained "
        "only when named here, to compare with",
    )
    demo.add_argument(
        "--pretrained",
        type=Path,
        metavar="SET",
        help="take the pretrained parts that a model set holds, instead of training them",
    )
    demo.add_argument(
        "--set",
        type=Path,
        metavar="FOLDER",
        help="write the finished model set there; before the last stage, the pretrained parts that "
        "are done",
    )
    demo.set_defaults(run=_demo_train)

    check = commands.add_parser(
        "demo-check",
        help="measure demo models on characters they have never seen; exit status 0: every bar "
        "is met, 1: one is missed, 2: cannot be measured",
    )
    check.add_argument(
        "--set", type=Path, metavar="FOLDER", help="default: the shipped trained set"
    )
    check.add_argument(
        "--data", type=Path, metavar="FOLDER", help="a drawn data set; drawn anew by default"
    )
    check.add_argument(
        "--split",
        default="held_out",
        metavar="NAME",
        help="groups to measure: held_out (default), or training, to choose settings with",
    )
    check.add_argument("--judge", type=Path, metavar="FILE", help="default: the set's own")
    check.add_argument("--identities", type=int, default=160, help="default: %(default)s")
    check.add_argument("--steps", type=int, help="of the sampling; default: as in the demo")
    check.add_argument("--cfg", type=float, help="default: as in the demo")
    check.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another adapter to report: stage1, stage2, scratch or averaging; can be repeated",
    )
    check.add_argument(
        "--mllm", type=Path, metavar="FOLDER", help="for a compared adapter that carries no MLLM"
    )
    check.add_argument("--device", help="default: a GPU where there is one")
    check.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    check.add_argument(
        "--scores", type=Path, metavar="FILE", help="write every group's scores as CSV"
    )
    check.set_defaults(run=_demo_check)

    train = commands.add_parser("train", help="train an adapter, one stage a recipe")
    train.add_argument("recipe", type=Path, metavar="CONFIG.yaml", help="such as those in recipes/")
    train.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="instead of what the recipe says"
    )
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
    from .files import check_place
    from .limits import lack_of_memory
    from .tokens import save_tokens

    if options.mllm is None:
        raise EasyRefError(
            "There is no tokenizer: an adapter file carries none. Name the Qwen2-VL directory "
            "with --mllm; its weights are only used where the adapter has none of its own."
        )
    check_place(options.out)
    device = _device(options.device)
    try:
        tokens = _encoded(options, device)
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
        raise OutOfMemoryError(
            f"{device} has not enough memory ({reason}). Use fewer pictures, a smaller "
            "--image-size or --dtype bfloat16."
        ) from error
    print(save_tokens(tokens, options.out))
    return 0


def _encoded(options: argparse.Namespace, device: Any) -> ReferenceTokens:
    """What can be refused is refused before weights are read."""
    import torch

    from .aggregation import Reference, chosen_size, encode_references, plan_group
    from .checkpoint import load_checkpoint
    from .loading import plan_encoder
    from .pictures import named, open_picture
    from .preprocessing import reduced
    from .prompt import PromptTokenizer

    checkpoint = load_checkpoint(options.adapter)
    plan = plan_encoder(checkpoint, options.mllm)
    tokenizer = PromptTokenizer.from_directory(options.mllm)
    size = chosen_size(options.image_size, plan)
    references = []
    for path in options.images:
        picture = open_picture(path)
        with named(str(path)):  # photographs at full size would fill the memory
            references.append(Reference(reduced(picture, size), name=str(path)))
    group = (tokenizer, references, options.prompt)
    settings = {
        "aggregation": options.aggregation,
        "image_size": size,
        "insert_before": options.insert_before,
    }
    plan_group(plan, *group, **settings)
    dtype = getattr(torch, options.dtype)
    encoder = plan.build(dtype=dtype, compute_dtype=dtype).to(device)

    def show(done: int, total: int) -> None:
        print(f"\rencoding {done}/{total}", end="", file=sys.stderr, flush=True)

    try:
        return encode_references(
            encoder,
            *group,
            **settings,
            adapter=checkpoint.identity,
            adapter_name=checkpoint.name,
            device=device,
            progress=show,
        )
    finally:
        print(file=sys.stderr)


def _demo_data(options: argparse.Namespace) -> int:
    from .demo.dataset.files import DatasetOptions, write_dataset

    names = ("groups", "held_out_groups", "pictures", "side", "seed")
    print(write_dataset(options.folder, DatasetOptions(**{n: getattr(options, n) for n in names})))
    return 0


def _demo_train(options: argparse.Namespace) -> int:
    _need("Training", "train", "diffusers", "accelerate", "yaml")
    import torch

    from .demo.pretraining.pretrained import take_parts
    from .demo.train import RECIPES, train_demo, train_part, write_set
    from .files import check_place
    from .training.processes import started

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Under torchrun each process has a GPU of its own.
    device = _device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    recipes = options.recipes or RECIPES
    if started() > 1:
        if len(options.only or ()) != 1:
            raise EasyRefError(
                "Under torchrun, name one part with --only; start the next one anew."
            )
        if options.pretrained is not None:
            raise EasyRefError(
                "Under torchrun, leave --pretrained out: take the parts first, with --only data."
            )
        if options.only == ["data"]:
            raise EasyRefError(
                "The data are drawn by one process, on all cores; start it without torchrun."
            )
    for folder in filter(None, (options.folder, options.set)):
        check_place(folder / "model")  # hours may pass before it is written to
    if options.pretrained is not None:
        taken = take_parts(options.pretrained, options.folder)
        print(f"from {options.pretrained}: {', '.join(taken)}", file=sys.stderr)
    if options.only:
        for part in options.only:
            train_part(part, options.folder, device, recipes)
    else:
        train_demo(options.folder, device, recipes)
    if options.set is not None:
        size, parts = write_set(options.folder, options.set)
        unfinished = f": {', '.join(parts)}" if parts else ""
        print(f"{options.set} ({size / 1e6:.1f} MB){unfinished}")
    return 0


def _demo_check(options: argparse.Namespace) -> int:
    try:
        _need("Measuring", "demo", "diffusers")
        import torch

        from .demo.judging.command import Request, demo_check, parse_compare

        names = ("data", "split", "judge", "identities", "steps", "cfg", "mllm", "out", "scores")
        request = Request(
            models=options.set,
            compare=parse_compare(options.compare),
            device=_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            **{name: getattr(options, name) for name in names},
        )
        return demo_check(request)
    except EasyRefError as error:
        print(f"easyref: {error}", file=sys.stderr)
    except Exception:  # Python's own status would say that a bar is missed
        traceback.print_exc()
    return 2


def _train(options: argparse.Namespace) -> int:
    _need("Training", "train", "diffusers", "accelerate", "yaml")
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


def _need(what: str, extra: str, *modules: str) -> None:
    """
    Raises:
        EasyRefError: a module of an extra is not installed.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise EasyRefError(
                f"{what} needs {error.name or module}, which is not installed. Install the extra "
                f"{extra}, in the folder of the project: pip install -e '.[{extra}]'"
            ) from error


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
