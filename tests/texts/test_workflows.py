"""The workflow files: which ComfyUIs are tested, what is published, and what is reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSION = "1.2.0"

needs_sh = pytest.mark.skipif(os.name == "nt", reason="no sh on Windows")


def workflow(name: str) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def oldest() -> str:
    """The oldest ComfyUI that the pack says it runs with."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^requires-comfyui = ">=([\d.]+)"$', text, re.MULTILINE)[1]


def test_oldest_and_newest_comfyui_are_tested_on_three_systems() -> None:
    job = workflow("test.yml")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "windows", "macos"]
    cores = {entry["core"]: entry for entry in matrix["include"]}
    assert list(cores) == matrix["core"] == ["oldest", "newest release", "newest commit"]
    assert cores["oldest"]["ref"] == f"v{oldest()}"
    assert "ref" not in cores["newest release"]
    assert job["name"].startswith("${{ matrix.core }}")  # the report finds jobs by it
    assert job["continue-on-error"] == "${{ matrix.core == 'newest commit' }}"
    assert {entry["tests"] for entry in matrix["include"]} == {
        "tests",
        "tests/comfy tests/server tests/browser",
    }


def test_nothing_is_skipped_for_want_of_what_the_makefile_puts_beside_the_packages() -> None:
    steps = workflow("test.yml")["jobs"]["test"]["steps"]
    commands = "\n".join(step.get("run", "") for step in steps)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for beside in ("newest-page", "transformers-4.57"):
        assert f"--target $(VENV)/{beside} " in makefile
        assert f'"$beside/{beside}"' in commands
    assert '"transformers==4.57.*" "huggingface_hub<1" "tokenizers>=0.22,<0.23"' in commands
    assert "playwright install --with-deps chromium" in commands


def test_new_comfyuis_are_noticed_without_a_change_here() -> None:
    assert workflow("test.yml")[True]["schedule"]  # YAML reads `on` as true


def test_each_action_has_one_version() -> None:
    used: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for name, version in re.findall(r"uses: (\S+)@(\S+)", path.read_text(encoding="utf-8")):
            used.setdefault(name, set()).add(version)
    assert used == {"actions/checkout": {"v7"}, "actions/setup-python": {"v7"}}


def test_only_the_report_may_write_issues() -> None:
    for path in WORKFLOWS:
        file = workflow(path.name)
        assert file["permissions"] == {"contents": "read"}
        for name, job in file["jobs"].items():
            writes = [k for k, v in job.get("permissions", {}).items() if v == "write"]
            assert writes == (["issues"] if name == "report" else []), (path.name, name)


def published(folder: Path, tag: str, changelog: str) -> subprocess.CompletedProcess[str]:
    """What the publishing workflow makes of a tag and a changelog."""
    (folder / "pyproject.toml").write_text(f'[project]\nversion = "{VERSION}"\n', encoding="utf-8")
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    steps = workflow("publish.yml")["jobs"]["publish"]["steps"]
    (check,) = (step for step in steps if "CHANGELOG.md" in step.get("run", ""))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-e", "-c", check["run"]],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": path, "GITHUB_REF_NAME": tag, "RUNNER_TEMP": str(folder)},
        check=False,
    )


CHANGELOG = f"""# Changelog

## [{VERSION}] - 2026-12-01

### Added

- One thing.

## [1.1.0] - 2026-11-01

- An older thing.
"""


@needs_sh
@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is not in Python 3.10")
def test_a_version_is_published_with_its_part_of_the_changelog(tmp_path: Path) -> None:
    done = published(tmp_path, f"v{VERSION}", CHANGELOG)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = (tmp_path / "changelog.md").read_text(encoding="utf-8")
    assert notes.strip() == "### Added\n\n- One thing."
    steps = workflow("publish.yml")["jobs"]["publish"]["steps"]
    assert '--changelog-file "$RUNNER_TEMP/changelog.md"' in steps[-1]["run"]


@needs_sh
@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is not in Python 3.10")
@pytest.mark.parametrize(
    ("tag", "changelog", "said"),
    [
        ("v1.3.0", CHANGELOG, f"pyproject.toml says {VERSION}"),
        (f"v{VERSION}", CHANGELOG.replace("2026-12-01", "Unreleased"), "no dated entry"),
        (f"v{VERSION}", CHANGELOG.replace(VERSION, "1.2.1"), "no dated entry"),
    ],
)
def test_what_is_not_ready_is_not_published(
    tmp_path: Path, tag: str, changelog: str, said: str
) -> None:
    done = published(tmp_path, tag, changelog)
    assert done.returncode == 1
    assert said in done.stdout


GH = """#!{python}
import json, pathlib, sys
folder, given = pathlib.Path(__file__).parent, sys.argv[1:]
answers = json.loads((folder / "answers.json").read_text())
if given[:2] in (["run", "view"], ["issue", "list"]):
    print(answers[given[0]])
else:
    with (folder / "done.jsonl").open("a") as file:
        file.write(json.dumps(given) + "\\n")
"""


@needs_sh
@pytest.mark.parametrize(
    ("failed", "issue", "wanted"),
    [
        ("newest commit of ComfyUI, ubuntu-latest", "", ["issue", "create"]),
        ("newest commit of ComfyUI, ubuntu-latest", "7", ["issue", "comment", "7"]),
        ("", "7", ["issue", "close", "7"]),
        ("", "", None),
    ],
)
def test_one_issue_tells_of_the_newest_commit(
    tmp_path: Path, failed: str, issue: str, wanted: list[str] | None
) -> None:
    gh = tmp_path / "gh"
    gh.write_text(GH.format(python=sys.executable), encoding="utf-8")
    gh.chmod(0o755)
    (tmp_path / "answers.json").write_text(json.dumps({"run": failed, "issue": issue}))
    shell = Path(shutil.which("sh")).parent
    done = subprocess.run(
        [str(ROOT / ".ci" / "report_newest_commit")],
        capture_output=True,
        text=True,
        env={
            "PATH": f"{tmp_path}{os.pathsep}{shell}",
            "GITHUB_SERVER_URL": "https://example.org",
            "GITHUB_REPOSITORY": "some/where",
            "GITHUB_RUN_ID": "12",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = tmp_path / "done.jsonl"
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if wanted is None:
        assert calls == []
        return
    (call,) = calls
    assert call[: len(wanted)] == wanted
    assert "https://example.org/some/where/actions/runs/12" in call[-1]
    assert failed in call[-1]
