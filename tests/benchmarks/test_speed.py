"""The benchmark of what a change of a group costs, tried on a small encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import __main__ as command
from benchmarks.speed import encoding


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "COUNTS", (1, 2))
    arguments = ["speed", "--small", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    return tmp_path


def test_it_measures_prints_and_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main()
    found = json.loads((run / "speed.json").read_text(encoding="utf-8"))
    shares = {row["measure"]: row["share"] for row in found["rows"]}
    assert shares.keys() == {*encoding._BARS, *(f"dla: {n}" for n in encoding._POOLED_BARS)}
    assert shares["the same again"] < shares["prompt edit"] < shares["ninth reference appended"] < 1
    counted = [row["multiplications"] for row in found["rows"][:4]]
    assert 0 == counted[3] < counted[2] < counted[0] < counted[1] < 0.2
    assert found["seconds by references"].keys() == {"1", "2"}
    assert (run / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "speed.md").read_text(encoding="utf-8") in capsys.readouterr().out


@pytest.mark.parametrize(("bar", "status"), [(1.0, 0), (0.0, 1)])
def test_its_status_says_whether_the_bars_are_met(
    run: Path, monkeypatch: pytest.MonkeyPatch, bar: float, status: int
) -> None:
    for bars in (encoding._BARS, encoding._POOLED_BARS):
        for name in bars:
            monkeypatch.setitem(bars, name, bar)
    assert command.main() == status
    assert ("NO" in (run / "speed.md").read_text(encoding="utf-8")) == bool(status)
