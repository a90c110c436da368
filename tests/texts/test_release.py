"""What a release holds: a pinned list of files, within the size that the project allows itself."""

from __future__ import annotations

import subprocess

import pytest

pytest.importorskip("pathspec", reason="pathspec comes with comfy-cli")

from workshop.release import PINNED, packed_size, release_files

MOST_BYTES = 20e6


@pytest.fixture(scope="module")
def files() -> list[str]:
    try:
        return release_files()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git cannot list the pack's files here")


def test_the_files_are_the_pinned_ones(files: list[str]) -> None:
    pinned = set(PINNED.read_text(encoding="utf-8").splitlines())
    changes = [f"added: {n}" for n in sorted(set(files) - pinned)]
    changes += [f"missing: {n}" for n in sorted(pinned - set(files))]
    assert not changes, (
        f"The files of a release changed: {'; '.join(changes)}. If that is meant, run `python -m "
        "workshop.release --write`; if not, see .comfyignore."
    )


def test_nothing_of_development_is_in_a_release(files: list[str]) -> None:
    top = {name.split("/")[0] for name in files}
    code = {"__init__.py", "easyref_core", "nodes", "web", "locales", "workflows", "subgraphs"}
    assert top == code | {"demo", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert not [name for name in files if "judge" in name]


def test_a_release_is_small(files: list[str]) -> None:
    size = sum(map(packed_size, files))
    assert size <= MOST_BYTES, f"{size / 1e6:.1f} MB; `python -m workshop.release` lists the files"
