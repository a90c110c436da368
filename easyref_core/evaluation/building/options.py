"""The command line of `easyref build-groups`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...untrusted import escaped

if TYPE_CHECKING:
    from .build_groups import BuildOptions, FaceEncoder, PictureEncoder

# Imported modules would make every command wait for torch.
_NUMBERS = {
    "least": (int, "N", "pictures of a group; default: 4"),
    "held_out": (float, "SHARE", "of the groups of each kind; default: 0.25"),
    "seed": (int, "N", "of the split; default: 0"),
    "duplicate": (float, "COSINE", "pictures this similar count as one; default: 0.97"),
    "like_tag": (float, "COSINE", "least of a picture and its tag's text; default: 0.15"),
    "like_group": (float, "COSINE", "least mean of a picture and its group; default: 0.5"),
}


def add_build_groups_command(commands: Any) -> None:
    """
    Args:
        commands: what `ArgumentParser.add_subparsers` returns.
    """
    parser = commands.add_parser(
        "build-groups", help="make groups for a benchmark from a folder of tagged pictures"
    )
    parser.set_defaults(run=_build_groups)
    add = parser.add_argument
    help_pictures = "folder; tags in metadata.jsonl, in NAME.txt, or as names of folders"
    add("pictures", type=Path, metavar="PICTURES", help=help_pictures)
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder for the groups")
    help_tags = "the tags that make groups, one a line; default: all that are found"
    add("--tags", type=Path, metavar="FILE", help=help_tags)
    for name, (kind, shown, text) in _NUMBERS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar=shown, help=text)
    add("--licence", metavar="TEXT", help="of pictures whose tags do not say it")
    help_clip = "compares pictures with their tags and with each other; default: none"
    add("--clip", default="", metavar="DIR_OR_NAME", help=help_clip)
    help_faces = "model of faces, for groups of people; default: none"
    add("--faces", default="", metavar="DIR", help=help_faces)
    help_offline = "ask no hub: local directories, and what the hub's cache holds"
    add("--offline", action="store_true", help=help_offline)
    add("--device", default="cpu", metavar="NAME", help="default: %(default)s")


def _build_groups(options: argparse.Namespace) -> int:
    from .build_groups import build_groups

    settings = _settings(options)
    settings.check()  # before models are read
    encoder, faces = _models(options)

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\rreading pictures {done}/{total}", end=end, file=sys.stderr, flush=True)

    report = build_groups(settings, encoder, faces, show)
    print("\n".join(map(escaped, str(report).splitlines())))
    return 0


def _settings(options: argparse.Namespace) -> BuildOptions:
    from .build_groups import BuildOptions

    names = (*_NUMBERS, "tags", "licence")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return BuildOptions(options.pictures, options.out, **given)


def _models(options: argparse.Namespace) -> tuple[PictureEncoder | None, FaceEncoder | None]:
    """CLIP and the model of faces, where they are named."""
    from ...devices import usable_device
    from ..metrics.faces.model import FaceModel
    from ..metrics.load import load_clip

    if not options.clip and not options.faces:
        return None, None
    device = usable_device(options.device)
    encoder = load_clip(options.clip, options.offline, device) if options.clip else None
    return encoder, FaceModel(options.faces, device) if options.faces else None
