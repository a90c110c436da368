"""What is published: metadata, licence, changelog, and which files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from documents import PAGES, project, read
from node_texts import ROOT
from PIL import Image


def test_changelog_starts_with_the_current_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\] - ", read(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions
    assert versions[0] == project()["project"]["version"]


def test_a_next_major_version_of_a_dependency_is_not_installed_unseen() -> None:
    metadata = project()["project"]
    extras = metadata["optional-dependencies"]
    for requirement in (*metadata["dependencies"], *extras["train"], *extras["bench"]):
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<\d+", requirement), requirement
    assert {r.split(">")[0] for r in metadata["dependencies"]} >= {"torch", "transformers"}


def test_the_registry_shows_pictures_of_the_repository_in_its_sizes() -> None:
    metadata = project()
    urls = metadata["project"]["urls"]
    repository = urls["Repository"]
    assert urls.keys() == {"Repository", "Documentation", "Bug Tracker"}
    assert all(url.startswith(repository) for url in urls.values())
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    comfy = metadata["tool"]["comfy"]
    pictures = {}
    for name in ("Icon", "Banner"):
        assert comfy[name].startswith(raw)
        with Image.open(ROOT / comfy[name].removeprefix(raw)) as picture:
            pictures[name] = picture.size
            assert picture.format in ("PNG", "JPEG", "GIF")
    width, height = pictures["Icon"]
    assert width == height <= 400
    width, height = pictures["Banner"]
    assert width * 9 == height * 21


def test_what_runs_it_is_said_in_the_registrys_words() -> None:
    parser = pytest.importorskip("comfy_cli.registry.config_parser")
    classifiers = project()["project"]["classifiers"]
    assert parser.validate_and_extract_os_classifiers(classifiers) == ["OS Independent"]
    assert "GPU :: NVIDIA CUDA" in parser.validate_and_extract_accelerator_classifiers(classifiers)


def test_licence_is_the_whole_apache_licence() -> None:
    licence = read(ROOT / "LICENSE")
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "   9. Accepting Warranty or Additional Liability." in licence


def test_package_keeps_what_it_needs_and_leaves_out_the_rest() -> None:
    pathspec = pytest.importorskip("pathspec")
    lines = [line for line in read(ROOT / ".comfyignore").splitlines() if line[:1] not in ("", "#")]
    assert all(line.startswith("/") for line in lines), "anchor the patterns"
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", lines).match_file
    kept = ["__init__.py", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"]
    kept += [p.relative_to(ROOT).as_posix() for p in PAGES.parent.rglob("*") if p.is_file()]
    assert {"web/js/gallery.js", "web/css/gallery.css"} <= set(kept)
    kept += [f"locales/{language}/nodeDefs.json" for language in ("en", "zh")]
    kept += ["easyref_core/demo_set.py", "nodes/sampling/patch.py", "workflows/any.json"]
    for path in kept:
        assert not ignored(path), path
    for path in (
        "tests/goldens.py",
        "workshop/pages/photograph.py",
        "Makefile",
        "recipes/1_alignment.yaml",
        "benchmarks/any.py",
    ):
        assert ignored(path), path


def tracked() -> list[Path]:
    """The files of the repository, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_no_file_names_a_registry_or_a_folder_of_somebodys_computer() -> None:
    hosts = ("py" + "pi.org", "python" + "hosted.org", "registry." + "comfy.org", "npm" + "js.org")
    hosts += ("api." + "comfy.org", "pypi" + "-more", "test.py" + "pi")
    folders = (
        r"/(?:root|work)/\w",
        r"/home/(?!\.)\w+/",
        r"/Users/\w",
        r"[A-Z]:\\\\?Users",
        r"/mnt/\w",
    )
    hosts_pattern = "|".join(map(re.escape, hosts))
    unwanted = re.compile(rf"{hosts_pattern}|(?<![\w.~$}}>)-])(?:{'|'.join(folders)})")
    for path in tracked():
        if path == Path(__file__) or not path.is_file() or b"\0" in path.read_bytes()[:8192]:
            continue
        found = unwanted.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"
