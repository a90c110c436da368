"""The files of a release: the zip that `comfy node pack` makes for ComfyUI's registry.

python -m workshop.release            # each file with its size in the zip, largest last
python -m workshop.release --write    # pin the list: tests/data/release_files.txt
"""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from pathspec import PathSpec

ROOT = Path(__file__).resolve().parents[1]
PINNED = ROOT / "tests" / "data" / "release_files.txt"


def release_files() -> list[str]:
    """Files that git knows or would add, less those of .comfyignore; relative and sorted.

    Raises:
        OSError, CalledProcessError: there is no git, or this is not a clone.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = PathSpec.from_lines("gitwildmatch", lines)
    names = sorted(filter(None, listed.split("\0")))
    return [name for name in names if (ROOT / name).is_file() and not ignored.match_file(name)]


def packed_size(name: str) -> int:
    """Bytes of a file in the zip, about."""
    return len(zlib.compress((ROOT / name).read_bytes())) + 2 * (len(name) + 50)


def main(arguments: Sequence[str]) -> None:
    """Print or pin the list."""
    names = release_files()
    if "--write" in arguments:
        PINNED.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    sizes = {name: packed_size(name) for name in names}
    for name in sorted(names, key=sizes.__getitem__):
        print(f"{sizes[name]:>9,}  {name}")
    print(f"{sum(sizes.values()):>9,}  {len(names)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
