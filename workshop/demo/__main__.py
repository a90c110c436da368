"""The demo models: run, train and evaluate them.

python -m workshop.demo run      # sample images from the shipped references, as one sheet
python -m workshop.demo data     # draw a data set
python -m workshop.demo train    # train all models from scratch
python -m workshop.demo check    # evaluate a trained set
python -m workshop.demo bench    # compare EasyRef with other methods, as easyref bench does
python -m workshop.demo bench --table layers   # and ways to read the MLLM; or stages, training
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: threads that spin while idle make a busy computer ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from easyref_core.cli import require_extra, usable_device
from easyref_core.errors import EasyRefError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 an error, named on stderr."""
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
    parser = argparse.ArgumentParser(
        prog="python -m workshop.demo",
        description="Run, train and evaluate the demo models; docs/demo.md explains all of it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="sample the demo's images into demo/out")
    run.set_defaults(run=_run)

    data = commands.add_parser("data", help="draw groups of images to train and evaluate with")
    data.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty folder")
    data.add_argument(
        "--groups", type=int, default=1000, help="training groups; default: %(default)s"
    )
    data.add_argument(
        "--held-out-groups",
        type=int,
        default=400,
        help="to evaluate with; default: %(default)s",
    )
    data.add_argument("--pictures", type=int, default=5, help="per group; default: %(default)s")
    data.add_argument("--side", type=int, default=128, help="in pixels; default: %(default)s")
    data.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    data.set_defaults(run=_data)

    train = commands.add_parser(
        "train", help="train all demo models from scratch (about six hours on two CPU cores)"
    )
    train.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/demo"),
        metavar="FOLDER",
        help="of all parts' data, checkpoints and results; default: %(default)s",
    )
    train.add_argument("--recipes", type=Path, metavar="FOLDER", help="default: recipes/demo")
    train.add_argument("--device", help="default: a GPU where there is one")
    train.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="train only these parts, in this order; some are trained only when named here: the "
        "baselines 3_averaged, 3_from_scratch and 4_last, and on the last stage's adapter layer "
        "pooling (4_layer_pooling, 4_lap), identity (5_identity), and both (5_single_stage)",
    )
    train.add_argument(
        "--pretrained",
        type=Path,
        metavar="SET",
        help="use the pretrained parts of this model set instead of training them",
    )
    train.add_argument(
        "--set",
        type=Path,
        metavar="FOLDER",
        help="write the finished model set there; before the last stage is done, the pretrained "
        "parts that are",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="replace a model set that --set names"
    )
    train.set_defaults(run=_train)

    check = commands.add_parser(
        "check",
        help="evaluate demo models on held-out characters; exit status 0: every bar is met, "
        "1: one is missed, 2: an error",
    )
    check.add_argument(
        "--set", type=Path, metavar="FOLDER", help="default: the shipped trained set"
    )
    check.add_argument(
        "--data", type=Path, metavar="FOLDER", help="a drawn data set; default: a new one"
    )
    check.add_argument(
        "--split",
        default="held_out",
        metavar="NAME",
        help="groups to evaluate on: held_out (default), or training, to choose settings with",
    )
    check.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="classifier; default: the set's, else workshop/demo/weights/judge.safetensors",
    )
    check.add_argument("--identities", type=int, default=160, help="default: %(default)s")
    check.add_argument("--steps", type=int, help="sampling steps; default: as in the demo")
    check.add_argument("--cfg", type=float, help="CFG scale; default: as in the demo")
    check.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another adapter to report: stage1, stage2, scratch or averaging; repeatable",
    )
    check.add_argument(
        "--mllm",
        type=Path,
        metavar="FOLDER",
        help="for compared adapters without MLLM weights",
    )
    check.add_argument(
        "--precision",
        choices=("fp32", "int8"),
        default="fp32",
        help="of the MLLM's weights; default: %(default)s",
    )
    check.add_argument("--device", help="default: a GPU where there is one")
    check.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    check.add_argument(
        "--scores", type=Path, metavar="FILE", help="write every group's scores as CSV"
    )
    check.add_argument(
        "--overwrite", action="store_true", help="replace tables that --out and --scores name"
    )
    check.set_defaults(run=_check)
    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare EasyRef with other methods, or with itself, on the demo models; exit status "
        "0: what is expected holds, 1: it does not, 2: an error",
    )
    add = bench.add_argument
    tables = ("methods", "layers", "stages", "training")
    help_table = "methods (default), layers (of the MLLM), stages (of the sampling), training"
    add("--table", choices=tables, default="methods", help=help_table)
    help_out = "of groups and run; default: runs/bench, runs/bench_layers and so on"
    add("--out", type=Path, metavar="FOLDER", help=help_out)
    add("--models", type=Path, metavar="FOLDER", help="of CLIP, DINO and IP-Adapter")
    add("--groups", type=int, help="of each split and kind; default: 6, layers 40, others 16")
    add("--steps", type=int, default=20, help="of sampling; default: %(default)s")
    help_counts = "of references; default: 1 2 4 8 16, layers 1 4, others 4"
    add("--counts", type=int, nargs="+", metavar="N", help=help_counts)
    add("--methods", nargs="+", metavar="NAME", help="default: all")
    help_adapters = "last, lap and dla for layers, dla for stages, one and two for training"
    add("--adapters", nargs="+", metavar="NAME=FILE", help=help_adapters)
    add("--lora-steps", type=int, metavar="N", help="of each group's LoRA")
    add("--overwrite", action="store_true", help="begin anew")
    bench.set_defaults(run=_bench)

    models = commands.add_parser(
        "bench-models", help="train what the benchmark scores and compares with"
    )
    models.add_argument(
        "--folder", type=Path, default=Path("runs/bench_models"), help="default: %(default)s"
    )
    models.add_argument(
        "--only", nargs="+", metavar="PART", help="clip, dino or ip_adapter; default: all"
    )
    models.add_argument(
        "--check", action="store_true", help="train nothing; say how well each does its task"
    )
    models.add_argument("--to", type=Path, metavar="FOLDER", help="copy the finished models there")
    models.set_defaults(run=_bench_models)


def _run(options: argparse.Namespace) -> int:
    require_extra("The demo", "demo", "diffusers")
    from .run import run_demo

    run_demo()
    return 0


def _data(options: argparse.Namespace) -> int:
    from .dataset.files import DatasetOptions, write_dataset

    names = ("groups", "held_out_groups", "pictures", "side", "seed")
    print(write_dataset(options.folder, DatasetOptions(**{n: getattr(options, n) for n in names})))
    return 0


def _train(options: argparse.Namespace) -> int:
    require_extra("Training", "train", "diffusers", "accelerate", "pydantic", "yaml")
    import torch

    from easyref_core.files import check_place
    from easyref_core.training.processes import world_size

    from .pretraining.pretrained import take_parts
    from .train import RECIPES, check_set_folder, train_demo, train_part, write_set

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Under torchrun each process has a GPU of its own.
    device = usable_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    recipes = options.recipes or RECIPES
    if world_size() > 1:
        if len(options.only or ()) != 1:
            raise EasyRefError(
                "Under torchrun, name one part with --only; start the next one separately."
            )
        if options.pretrained is not None:
            raise EasyRefError(
                "Under torchrun, leave --pretrained out: copy the parts first, with --only data."
            )
        if options.only == ["data"]:
            raise EasyRefError(
                "The data set is drawn by one process, on all cores; start it without torchrun."
            )
    # Hours may pass before these are written to.
    check_place(options.folder / "model")
    if options.set is not None:
        check_set_folder(options.set, (options.pretrained, recipes), options.overwrite)
    if options.pretrained is not None:
        parts = take_parts(options.pretrained, options.folder)
        print(f"from {options.pretrained}: {', '.join(parts)}", file=sys.stderr)
    if options.only:
        for part in options.only:
            train_part(part, options.folder, device, recipes)
    else:
        train_demo(options.folder, device, recipes)
    if options.set is not None:
        size, parts = write_set(options.folder, options.set)
        only = f": {', '.join(parts)}" if parts else ""
        print(f"{options.set} ({size / 1e6:.1f} MB){only}")
    return 0


def _check(options: argparse.Namespace) -> int:
    try:
        require_extra("Evaluation", "demo", "diffusers")
        import torch

        from .evaluation.command import Request, demo_check, parse_compare

        names = ("data", "split", "judge", "identities", "steps", "cfg", "mllm", "out", "scores")
        names = (*names, "overwrite", "precision")
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
    except Exception:  # Python's own exit status, 1, means that a bar is missed
        traceback.print_exc()
    return 2


def _bench(options: argparse.Namespace) -> int:
    try:
        require_extra("The benchmark", "bench", "diffusers", "accelerate", "peft", "pyarrow")
        from .bench.command import BenchOptions, demo_bench
        from .bench.tables import TABLES

        names = ("out", "models", "table", "groups", "steps", "counts", "methods", "adapters")
        given = {name: getattr(options, name) for name in (*names, "lora_steps", "overwrite")}
        given["out"] = given["out"] or TABLES[options.table].out
        for name in ("counts", "methods", "adapters"):
            given[name] = given[name] and tuple(given[name])
        chosen = {name: value for name, value in given.items() if value is not None}
        return demo_bench(BenchOptions(**chosen))
    except EasyRefError as error:
        print(f"demo: {error}", file=sys.stderr)
    except Exception:  # Python's own exit status, 1, means that the ordering does not hold
        traceback.print_exc()
    return 2


def _bench_models(options: argparse.Namespace) -> int:
    require_extra("Training", "bench", "diffusers", "accelerate", "pydantic", "yaml")
    from .bench.train_models import PARTS, check_models, copy_models, train_part

    if not options.check:
        for part in options.only or PARTS:
            train_part(part, options.folder)
    if options.to is not None:
        print(copy_models(options.folder, options.to))
    if options.check:
        for line in check_models(options.folder):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
