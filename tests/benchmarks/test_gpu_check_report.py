"""Rows and reports of make gpu-check, and workers that fail; no ComfyUI is needed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

# Last in the path: the pack's folder `nodes` must not hide ComfyUI's module.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import plan
from benchmarks.gpu_check.report import (
    FAIL,
    MEASURED,
    NOT_HERE,
    PASS,
    Row,
    measured,
    stated,
    table,
)

ABOUT = {"card": None, "card_bytes": 0}
FREE, PARITY, SYNCS = (
    next(c for c in plan.CHECKS if c.name == n) for n in ("free", "parity", "syncs")
)


def test_a_row_passes_within_its_limit_only() -> None:
    assert measured("time", 1.0, at_most=1.0).verdict == PASS
    assert measured("time", 1.1, at_most=1.0).verdict == FAIL
    assert measured("cosine", 0.999, at_least=0.999).verdict == PASS
    assert measured("cosine", 0.99, at_least=0.999).verdict == FAIL
    assert measured("time", 5.0).verdict == MEASURED
    assert stated("finite", False).verdict == FAIL


def test_nan_fails_every_limit() -> None:
    assert measured("cosine", math.nan, at_least=0.9).verdict == FAIL
    assert measured("difference", math.nan, at_most=0.1).verdict == FAIL


def test_the_table_shows_values_limits_and_reasons_in_columns() -> None:
    rows = [
        Row("step", "one Apply / plain", 1.0512, "", 1.03, True, FAIL, "much\ntoo slow"),
        Row("growth", "more", 3.0, "MB", 64.0, True, PASS),
    ]
    head, rule, first, second = table(rows).splitlines()
    assert head.split() == ["check", "measured", "value", "bar", "verdict"]
    assert set(rule) == {"-", " "}
    assert "1.051 " in first
    assert first.endswith("fail     much too slow")
    assert "<= 64 MB" in second
    assert first.index("fail") == second.index("pass") == head.index("verdict")


def test_every_check_has_a_function_and_is_found_by_its_name() -> None:
    package = Path(command.__file__).parent
    for check in plan.CHECKS:
        module, function = check.function.split(":")
        assert f"def {function}(" in (package / f"{module}.py").read_text(encoding="utf-8")
        assert check in plan.chosen([check.name])
    assert len(plan.chosen([])) == len(plan.CHECKS)
    assert sum(check.seconds for check in plan.CHECKS) > 0


def test_a_small_card_is_simulated_by_reserving_the_rest_of_a_big_one() -> None:
    known = "--reserve-vram --disable-dynamic-vram"
    big = 80 * plan.GIB
    assert plan.flags(plan.USUAL, big, known) == []
    assert plan.flags(plan.SMALL_USUAL, big, known) == ["--reserve-vram", "74.00"]
    assert plan.flags(plan.SMALL_USUAL, 5 * plan.GIB, known) == []
    both = ["--disable-dynamic-vram", "--reserve-vram", "74.00"]
    assert plan.flags(plan.SMALL_STATIC, big, known) == both
    assert isinstance(plan.flags(plan.STATIC, big, "--reserve-vram"), str)


@pytest.fixture
def run(tmp_path: Path) -> command.Run:
    return command.Run(tmp_path, tmp_path, dict(ABOUT), small=True)


def worker(run: command.Run, body: str) -> None:
    """Replace the workers by a script; `note` writes a row, `checks` are its checks."""
    script = run.base / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "rows = open(sys.argv[3], 'a')\n"
        "checks = [a for a in sys.argv[4:] if ':' in a]\n"
        "def note(**content):\n"
        "    print(json.dumps(content), file=rows, flush=True)\n"
        "def passed(name):\n"
        "    note(begin=name)\n"
        "    note(check=name.split(':')[1], name='row', verdict='pass')\n"
        "    note(end=name)\n" + body,
        encoding="utf-8",
    )
    run.worker = (sys.executable, str(script))


def verdicts(run: command.Run) -> list[tuple[str, str]]:
    return [(row.check, row.verdict) for row in run.rows]


def all_checks(run: command.Run, *checks: plan.Check) -> None:
    (run.comfyui / "comfy").mkdir(exist_ok=True)
    (run.comfyui / "comfy" / "cli_args.py").touch()
    run.all(checks)


def test_rows_of_a_worker_are_collected(run: command.Run) -> None:
    worker(run, "for name in checks: passed(name)\n")
    all_checks(run, FREE, PARITY)
    assert verdicts(run) == [("free", PASS), ("parity", PASS)]


def test_a_check_whose_process_dies_fails_and_the_others_go_on(run: command.Run) -> None:
    worker(
        run,
        "for name in checks:\n"
        "    if 'parity' in name:\n"
        "        note(begin=name)\n"
        "        print('a last word', flush=True)\n"
        "        os._exit(7)\n"
        "    passed(name)\n",
    )
    all_checks(run, FREE, PARITY, SYNCS)
    assert verdicts(run) == [("free", PASS), ("parity", FAIL), ("syncs", PASS)]
    note = run.rows[1].note
    assert "status 7" in note
    assert "a last word" in note


def test_after_an_error_of_the_device_a_new_process_goes_on(run: command.Run) -> None:
    worker(run, "passed(checks[0])\nsys.exit(3)\n")
    all_checks(run, FREE, PARITY, SYNCS)
    assert verdicts(run) == [("free", PASS), ("parity", PASS), ("syncs", PASS)]


def test_a_check_that_times_out_is_ended_and_fails(run: command.Run) -> None:
    worker(run, "note(begin=checks[0])\ntime.sleep(60)\n")
    short = plan.Check("parity", PARITY.function, seconds=1)
    all_checks(run, short)
    assert verdicts(run) == [("parity", FAIL)]
    assert "took too long" in run.rows[0].note


def test_a_comfyui_that_does_not_start_fails_every_check_once(run: command.Run) -> None:
    worker(run, "print('no such module', flush=True)\nsys.exit(1)\n")
    all_checks(run, FREE, PARITY)
    assert verdicts(run) == [("free", FAIL), ("parity", FAIL)]
    assert "did not start" in run.rows[0].note
    assert "no such module" in run.rows[0].note


def test_options_that_a_core_lacks_are_reported_and_do_not_pass(run: command.Run) -> None:
    worker(run, "for name in checks: passed(name)\n")
    run.about = {"card": "NVIDIA H100", "card_bytes": 80 * plan.GIB}
    all_checks(run, *plan.chosen(["dynamic"]))
    assert [verdict for _, verdict in verdicts(run)] == [PASS, NOT_HERE]
    assert "no dynamic VRAM" in run.rows[1].note


def test_the_json_has_the_card_and_every_measurement(run: command.Run, tmp_path: Path) -> None:
    run.about = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "comfyui": "0.33.0"}
    run.add(Row("step", "one Apply / plain", 1.2, "", 1.03, True, FAIL))
    out = tmp_path / "new" / f"{command.slug(run.about['card'])}.json"
    command.write(out, run, 12.3)
    content: dict[str, Any] = json.loads(out.read_text())
    assert out.name == "nvidia_h100_80gb_hbm3.json"
    assert content["passed"] is False
    assert content["card"] == run.about["card"]
    row = content["rows"][0]
    assert (row["value"], row["bar"], row["verdict"]) == (1.2, 1.03, FAIL)


def test_a_file_that_was_named_is_replaced_only_where_that_was_asked_for(
    run: command.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, notes = tmp_path / "results.json", tmp_path / "notes"
    notes.write_text("mine")
    command.write(out, run, 1.0)
    for given, said in (
        (["--out", str(out)], "results.json exists"),
        (["--out", str(notes), "--overwrite"], "holds something else"),
    ):
        with pytest.raises(SystemExit):
            command.main(given)
        assert said in capsys.readouterr().err
    assert notes.read_text() == "mine"
