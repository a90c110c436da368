"""The command line of `easyref bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EasyRefError
from ..extras import require_extra
from ..untrusted import escaped

if TYPE_CHECKING:
    from .run import BenchSummary
    from .settings import BenchSettings

# Imported modules would make every command wait for torch.
METHODS = (
    *("easyref", "average", "concatenate", "ip-adapter", "lora", "lora-other", "none"),
    "easyref-other",
)
PROTOCOLS = {
    "mrbench": "several references, held-in and held-out groups (Table 3); default",
    "coco": "one reference, the target itself (Table 2)",
    "dreambooth": "30 subjects, 25 prompts each, 4 images each",
    "multibanana": "up to 8 references of different things (arXiv 2511.22989)",
    "aggregation": "references together, averaged, concatenated (Table 5)",
    "tokens": "number of reference tokens, and where they enter (Table 4)",
    "group-size": "1 to 112 references (Figure 9)",
}
_EPILOG = f"""protocols:
{chr(10).join(f"  {name:<12} {what}" for name, what in PROTOCOLS.items())}

The same command again goes on with a run that was stopped; images that are finished are kept.
To share the images among GPUs: accelerate launch -m easyref_core.cli bench ...
"""


def add_bench_command(commands: Any) -> None:
    """
    Args:
        commands: what `ArgumentParser.add_subparsers` returns.
    """
    parser = commands.add_parser(
        "bench",
        help="measure how well images follow their references, beside other methods",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=bench)
    _add_run(parser.add_argument_group("run"))
    _add_files(parser.add_argument_group("models"))
    _add_generation(parser.add_argument_group("generation"))
    _add_rating(parser.add_argument_group("blind comparison"))


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_groups = "folder of groups of pictures with captions, or JSON of training data"
    add("--groups", metavar="DIR", help=help_groups)
    add("--out", metavar="DIR", help="the run's folder: images, scores, results, page")
    add("--overwrite", action="store_true", help="begin anew, and replace an earlier run in --out")
    help_protocol = "preset of groups, methods and what is varied; see below"
    add("--protocol", choices=list(PROTOCOLS), metavar="NAME", help=help_protocol)
    help_method = (
        f"to compare, again for each one: {', '.join(METHODS)}; default: those of the protocol "
        "whose files are given"
    )
    add(
        "--method",
        action="append",
        dest="methods",
        choices=METHODS,
        metavar="NAME",
        help=help_method,
    )
    help_vary = (
        "a line of the table for each value, again for each key: weight, references, "
        "insert_before, image_size, adapter, steps, guidance, aggregation, identity, stages"
    )
    add("--vary", action="append", default=[], metavar="KEY=V1,V2", help=help_vary)
    help_images = "targets of each group, or of each of its prompts (default: the protocol's)"
    add("--images", type=int, metavar="N", help=help_images)
    add("--seed", type=int, metavar="N", help="of targets, references and noise; default: 0")


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base", metavar="SDXL", help="diffusers directory, or one .safetensors file")
    help_config = "diffusers directory of an SDXL that a single file's configurations come from"
    add("--base-config", metavar="DIR", help=help_config)
    add("--adapter", metavar="FILE", help="EasyRef adapter file")
    add("--mllm", metavar="DIR", help="Qwen2-VL directory")
    add("--ip-adapter", metavar="FILE", help="IP-Adapter for SDXL, as diffusers loads it")
    add("--image-encoder", metavar="DIR", help="the IP-Adapter's CLIP vision directory")
    help_clip = "for CLIP-I and CLIP-T; default: openai/clip-vit-large-patch14"
    add("--clip", metavar="DIR_OR_NAME", help=help_clip)
    add("--dino", metavar="DIR_OR_NAME", help="for DINO-I; default: facebook/dinov2-small")
    add("--faces", metavar="DIR", help="model of faces, for identity; default: none")
    help_offline = "ask no hub: local directories, and what the hub's cache holds"
    add("--offline", action="store_true", default=None, help=help_offline)


def _add_generation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_references = "the most that are used of a group; 0: all (default: the protocol's)"
    add("--references", type=int, metavar="N", help=help_references)
    add("--weight", type=float, metavar="W", help="of the references; default: 1")
    help_insert = "reference tokens enter before the last 1, 2 or 3 layers (default: as trained)"
    add("--insert-before", type=int, metavar="LAYERS", help=help_insert)
    help_size = "at which references are encoded; default: as the adapter was trained"
    add("--image-size", type=int, metavar="PIXELS", help=help_size)
    help_aggregation = "easyref (default): the MLLM's last layer; dla or lap: many, where trained"
    add("--aggregation", metavar="NAME", help=help_aggregation)
    help_identity = "weight of the references' features in self-attention; default: 0, none"
    add("--identity", type=float, metavar="W", help=help_identity)
    help_stages = (
        "when tokens and identity act: noise, steps, or parts of the sampling such as "
        "0-0.36/0.14-1; default: always"
    )
    add("--stages", metavar="STAGES", help=help_stages)
    add("--steps", type=int, metavar="N", help="of sampling; default: 30")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance; default: 7.5")
    add("--size", type=int, metavar="PIXELS", help="of the generated images; default: 1024")
    add("--negative", metavar="TEXT", help="negative prompt; default: the official demo's")
    add("--lora-rank", type=int, metavar="N", help="of LoRAs trained on groups; default: 32")
    add("--lora-steps", type=int, metavar="N", help="of their training; default: 500")
    add("--batch-size", type=int, metavar="N", help="images generated at once; default: 1")
    help_dtype = "of weights and computation: float32 (default), bfloat16 or float16"
    add("--dtype", metavar="NAME", help=help_dtype)
    add("--device", metavar="NAME", help="default: a GPU where there is one")
    help_offload = "keep the MLLM in the computer's memory while images are sampled"
    add("--offload", action="store_true", default=None, help=help_offload)


def _add_rating(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_rate = "of a finished run: choose the better one of two images, on a page in the browser"
    add("--rate", metavar="DIR", help=help_rate)
    help_compare = "two labels of the table; default: all pairs"
    add("--compare", default="", metavar="A,B", help=help_compare)
    help_rater = "your name, where several people vote, one after another"
    add("--rater", default="", metavar="NAME", help=help_rater)
    add("--port", type=int, default=0, metavar="N", help="of the page; default: any that is free")


def _rate(options: argparse.Namespace) -> int:
    from .rating.rate import rate, table_of

    if options.groups or options.out:
        raise EasyRefError("--rate is for a run that is finished: leave --groups and --out away.")
    print(table_of(rate(options.rate, options.compare, options.rater, options.port)))
    return 0


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark; returns the exit status: 0 done, also where some images could not be made
    and the notes say so; 1 if none could; 130 interrupted.

    Raises:
        EasyRefError: see `run.run_bench`.
    """
    if options.rate is not None:
        return _rate(options)
    needed = ("diffusers", "accelerate", "pydantic", "pyarrow", "matplotlib", "tqdm")
    require_extra("A benchmark", "bench", *needed)
    from .run import run_bench

    settings = _settings(options)
    try:
        summary = run_bench(settings, overwrite=options.overwrite)
    except KeyboardInterrupt:
        print("easyref: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if summary is None:  # the first process says it for all
        return 0
    _show(summary)
    return 0 if summary.done else 1


def _settings(options: argparse.Namespace) -> BenchSettings:
    from .settings import make_bench_settings

    for name, what in (("groups", "groups of pictures"), ("out", "a folder for the results")):
        if not getattr(options, name):
            raise EasyRefError(f"Name {what} with --{name}.")
    given = vars(options)
    others = ("run", "overwrite", "vary", "rate", "compare", "rater", "port")
    content = {name: value for name, value in given.items() if name not in others}
    settings = make_bench_settings(content, options.vary)
    if not settings.base:
        raise EasyRefError("There is nothing to generate with: name SDXL with --base.")
    return settings


def _show(summary: BenchSummary) -> None:
    for note in summary.notes:
        print(f"easyref: {escaped(note)}", file=sys.stderr)
    print(summary.table)
    print(Path(summary.folder) / "index.html")
