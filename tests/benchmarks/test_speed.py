"""The benchmark of what a change of a group costs, tried on a small encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed import (
    compiling,
    encoding,
    full_memory,
    growth,
    official_processors,
    peak_memory,
    peers,
    sampling,
    sampling_memory,
    slots,
)
from benchmarks.speed.counting import operations
from benchmarks.speed.inspecting import inspecting
from benchmarks.speed.processes import IS_LINUX, peak_bytes, reset_peak
from benchmarks.speed.slots import Slots
from benchmarks.speed.table import as_table, shown
from benchmarks.speed.timing import Amount


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "COUNTS", (1, 2, 3))
    monkeypatch.setattr(command, "inspecting", lambda *_: [Amount("inspect", 0.5, "s", 1.0)])
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
    read = [row["bytes"] for row in found["rows"][:4]]
    assert 0 == read[3] < read[2] < read[0] < read[1] < 1
    pooled = [row["multiplications"] for row in found["rows"][4:]]
    assert all(0 < share < 0.5 for share in pooled)
    tokens = [read for read, _ in found["by references"].values()]
    assert found["by references"].keys() == {"1", "2", "3"}
    assert tokens[1] - tokens[0] == tokens[2] - tokens[1] > 144
    assert [one["measure"] for one in found["amounts"]][1:] == ["inspect"] * IS_LINUX
    assert (run / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "speed.md").read_text(encoding="utf-8") in capsys.readouterr().out


@pytest.mark.parametrize(("bar", "status"), [(1.0, 0), (0.0, 1)])
def test_its_status_says_whether_the_bars_are_met(
    run: Path, monkeypatch: pytest.MonkeyPatch, bar: float, status: int
) -> None:
    for bars in (encoding._BARS, encoding._POOLED_BARS):
        for name in bars:
            monkeypatch.setitem(bars, name, bar)
    monkeypatch.setattr(command, "DEVIATION", max(bar, 1e-9))
    assert command.main() == status
    assert ("NO" in (run / "speed.md").read_text(encoding="utf-8")) == bool(status)


def test_how_far_times_are_from_a_straight_line() -> None:
    line = {count: (100 + 146 * count, 2.0 + 0.5 * count) for count in (1, 2, 4, 8)}
    start, slope, deviation = encoding.straight_line(line)
    assert deviation == pytest.approx(0, abs=1e-9)
    assert slope == pytest.approx(0.5 / 146)
    assert start == pytest.approx(2 - 100 * slope)
    bent = line | {8: (line[8][0], 1.5 * line[8][1])}
    assert 0.1 < encoding.straight_line(bent)[2] < 0.5


@pytest.mark.skipif(not IS_LINUX, reason="the memory of a process is read as Linux tells it")
def test_inspecting_is_measured_from_the_start_of_its_process(tmp_path: Path) -> None:
    found = inspecting(tmp_path, repeats=1)
    names = ["easyref inspect, 5.9 GB"] * 2 + ["easyref inspect, 3.0 GB in scaled fp8"] * 2
    assert [one.measure for one in found] == names
    assert [(one.unit, one.bar) for one in found] == [("s", 1.0), ("MB", 200.0)] * 2
    for seconds, memory in (found[:2], found[2:]):
        assert 0.02 < seconds.value < 1  # Python alone
        assert 8 < memory.value < 200
    assert not any(tmp_path.iterdir())


def test_a_row_must_be_below_its_peers() -> None:
    widths = sampling.Widths("step", 320, 32, (0.01, 0.05))
    peer, near = sampling._PEERS[sampling.ONE][:2]
    found = {
        sampling.ONE: sampling.Share([0.004, 0.005, 0.006], 0.0025, 0.02),
        sampling.TWO: sampling.Share([0.01], 0.0025),
        peer: sampling.Share([0.02], 0.01),
        near: sampling.Share([0.004], 0.003),
    }
    ours, other, *theirs = sampling.as_rows(widths, found)
    assert (ours.share, ours.spread, ours.below) == (0.005, pytest.approx(0.001), 0.004)
    assert (ours.bar, other.bar) == widths.bars
    assert not ours.met
    assert other.below is None
    assert other.met
    assert all(row.bar is None and row.met for row in theirs)
    head = {"machine": "m", "versions": {"torch": "t"}, "layers": [1, 2], "dtype": "d"}
    found = head | {"layers by references": [3, 4], "by references": {1: (333, 2.0)}}
    table = as_table(found, [ours, *theirs], [Amount("memory", 40.04, "MB", 100.0)])
    line = (
        "| step: one EasyRef Apply | 0.005 ± 0.001 | 0.003 | 0.020 | 0.01, and below 0.004 | NO |"
    )
    assert line in table
    assert f"| step: {peer} | 0.020 ± 0.000 | 0.010 |  |  |  |" in table
    assert "| memory | 40.0 MB | 100 MB | yes |" in table
    assert "| 1 | 333 | 2.00 |" in table


def test_attention_and_products_are_counted() -> None:
    query, key, weight = torch.ones(2, 3, 10, 4), torch.ones(2, 3, 5, 4), torch.ones(7, 4)

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
        torch.nn.functional.linear(query, weight)

    assert operations(run) == 2 * 2 * 6 * 10 * 5 * 4 + 2 * 60 * 4 * 7


def test_memory_is_divided_by_the_most_that_the_official_procedure_takes() -> None:
    found = {"nodes": 5.7e9, "command": 5.5e9, "loading": 14.0e9, "encoding": 10.0e9}
    nodes, command, *sizes = peak_memory.as_amounts(found)
    assert (nodes.value, command.value) == (pytest.approx(5.7 / 14), pytest.approx(5.5 / 14))
    assert (nodes.met, command.met) == (False, True)
    assert [size.value for size in sizes] == [5700, 5500, 14000, 10000]


@pytest.mark.skipif(not IS_LINUX, reason="the memory of a process is read as Linux tells it")
def test_the_peak_can_be_counted_anew() -> None:
    before = torch.ones(64_000_000)
    high = peak_bytes()
    del before
    reset_peak()
    assert high - peak_bytes() > 200e6


def test_the_official_processors_are_timed_beyond_those_of_diffusers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="checkout"):
        official_processors.load_processor(tmp_path)
    file = tmp_path / official_processors._FILE
    file.parent.mkdir()
    file.write_text(
        "from diffusers.models.attention_processor import AttnProcessor2_0\n"
        "class LoRAIPAttnProcessor2_0(AttnProcessor2_0):\n"
        "    def __init__(self, *sizes, num_tokens):\n"
        "        super().__init__()\n",
        encoding="utf-8",
    )
    processor = official_processors.load_processor(tmp_path)
    layers = {
        name: SimpleNamespace(widths=(width, 2048)) for name, width in (("a", 64), ("b", 128))
    }
    found = official_processors.OfficialProcessors(processor, layers, 8, 64, 2)
    # It reads 64 tokens more than the plain one, as keys and values, two rows, two steps.
    for_keys = sum(2 * 2 * 64 * 2048 * width * 2 for width in (64, 128))
    attended = sum(2 * 2 * positions * 64 * width * 2 for positions, width in ((64, 64), (16, 128)))
    assert found.operations() == 2 * (for_keys + attended)
    assert abs(found.seconds()) < 60


def test_amounts_show_their_unit_and_spread() -> None:
    assert shown(Amount("m", 0.5, "s", 1.0, 0.01)) == "0.500 ± 0.010 s"
    assert shown(Amount("m", 1.0, "")) == "1.000"


def test_a_steps_memory_is_held_with_its_keys_and_values() -> None:
    found = {
        "plain": {"peak": 300e6, "keys and values": 0},
        "one": {"peak": 301e6, "keys and values": 43e6},
        "two": {"peak": 320e6, "keys and values": 86e6},
    }
    amounts = sampling_memory.as_amounts(found)
    assert [one.value for one in amounts] == pytest.approx([44, 43, 106, 86])
    assert [one.met for one in amounts] == [True, True, False, True]


def test_a_step_with_full_memory_is_held_against_the_plain_models() -> None:
    found = {
        full_memory.PLAIN: {"free": 2.0, "full": 4.0},
        full_memory.STEERED: {"free": 2.5, "full": 5.2},
    }
    share, plain, steered = full_memory.as_amounts(found)
    assert (share.value, plain.value, steered.value) == pytest.approx((1.3, 2.0, 2.08))
    assert (share.met, plain.met, steered.met) == (False, True, True)


@pytest.mark.parametrize("step", [1e6, 2e6])
def test_growth_is_what_comes_from_prompt_to_prompt_not_what_comes_and_goes(step: float) -> None:
    resident = [1000e6] * 4 + [900e6 + n * step for n in range(36)]
    resident[20] += 300e6
    found = [{"resident": size, "cached": 4, "newest": 8} for size in resident]
    found[2]["cached"] = 9
    grown, highest, first, cached = growth.as_amounts(found)
    assert grown.value == pytest.approx(26 * step / 1e6)
    assert grown.met == (step == 1e6)
    assert highest.value == pytest.approx(300 + 11.5 * step / 1e6)
    assert first.value == pytest.approx(900 + 4.5 * step / 1e6)
    assert cached.value == 9 / 8
    assert not cached.met


def test_a_slot_is_timed_without_the_texts_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(slots, "time", SimpleNamespace(process_time=lambda: now[0]))
    module = ModuleType("pack")

    def attention(seconds: float) -> str:
        now[0] += seconds
        return "text"

    class Slot:
        def __call__(self, seconds: float) -> str:
            text = module.optimized_attention(seconds)
            module.optimized_attention(0.25)  # a peer's own, which counts
            now[0] += 0.5
            return text

    module.optimized_attention = attention
    timed = Slots(module, Slot)
    with timed.timed():
        assert [Slot()(8.0), Slot()(4.0)] == ["text"] * 2
    assert timed.seconds == 1.5
    Slot()(2.0)
    assert timed.seconds == 1.5


def test_the_peers_patch_is_loaded_without_its_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="checkout"):
        peers.load_patch(tmp_path)
    (tmp_path / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    (tmp_path / "utils.py").write_text("HELP = 3", encoding="utf-8")
    (tmp_path / "CrossAttentionPatch.py").write_text("from .utils import HELP", encoding="utf-8")
    monkeypatch.setattr("sys.modules", dict(sys.modules))
    assert peers.load_patch(tmp_path).HELP == 3


def test_of_compiles_gain_a_share_is_kept() -> None:
    seconds = {
        "plain": [1.0, 1.2, 9.0],
        "steered": [1.3],
        "plain, compiled": [1.0],
        "steered, compiled": [1.15],
    }
    found = compiling.summary(seconds)
    assert found["kept"] == pytest.approx(0.75)
    assert found["gain"] == pytest.approx(1 / 6)
