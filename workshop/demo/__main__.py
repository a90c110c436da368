"""The demo models: run, draw data for, train and measure them.

python -m workshop.demo run      # what the models make of references, as one sheet
python -m workshop.demo data     # draw groups of pictures
python -m workshop.demo train    # train all models from nothing
python -m workshop.demo check    # measure a trained set
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

# Before torch is imported: spinning threads make a busy computer ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from easyref_core.cli import require_extra, usable_device
from easyref_core.errors import EasyRefError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 refused with a sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except EasyRefError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workshop.demo", description="The demo models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="make the demo's pictures, in demo/out")
    run.set_defaults(run=_run)

    data = commands.add_parser("data", help="draw groups of pictures to train and judge with")
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
    data.set_defaults(run=_data)

    demo = commands.add_parser(
        "train", help="train all demo models from nothing (about six hours on two CPU cores)"
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
    demo.set_defaults(run=_train)

    check = commands.add_parser(
        "check",
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
    check.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="default: workshop/demo/weights/judge.safetensors",
    )
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
    check.set_defaults(run=_check)
    return parser


def _run(options: argparse.Namespace) -> int:
    from .run import main as run_demo

    return run_demo()


def _data(options: argparse.Namespace) -> int:
    from .dataset.files import DatasetOptions, write_dataset

    names = ("groups", "held_out_groups", "pictures", "side", "seed")
    print(write_dataset(options.folder, DatasetOptions(**{n: getattr(options, n) for n in names})))
    return 0


def _train(options: argparse.Namespace) -> int:
    require_extra("Training", "train", "diffusers", "accelerate", "yaml")
    import torch

    from easyref_core.files import check_place
    from easyref_core.training.processes import started

    from .pretraining.pretrained import take_parts
    from .train import RECIPES, train_demo, train_part, write_set

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Under torchrun each process has a GPU of its own.
    device = usable_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
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


def _check(options: argparse.Namespace) -> int:
    try:
        require_extra("Measuring", "demo", "diffusers")
        import torch

        from .judging.command import Request, demo_check, parse_compare

        names = ("data", "split", "judge", "identities", "steps", "cfg", "mllm", "out", "scores")
        request = Request(
            models=options.set,
            compare=parse_compare(options.compare),
            device=usable_device(
                options.device or ("cuda" if torch.cuda.is_available() else "cpu")
            ),
            **{name: getattr(options, name) for name in names},
        )
        return demo_check(request)
    except EasyRefError as error:
        print(f"demo: {error}", file=sys.stderr)
    except Exception:  # Python's own status would say that a bar is missed
        traceback.print_exc()
    return 2


if __name__ == "__main__":
    sys.exit(main())
