"""Series and plots of a run."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import bench_run
import pytest
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.page.document import markdown_table, save_plot
from easyref_core.evaluation.page.placing import spread
from easyref_core.evaluation.page.record import RunRecord, read_run
from easyref_core.evaluation.page.series import SECONDS, series_over, trade_pairs, varied
from easyref_core.evaluation.trials import Variant


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(bench_run.write_run(tmp_path_factory.mktemp("w"), bench_run.WEIGHTS, groups=4))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("r")
    return read_run(bench_run.write_run(folder, bench_run.REFERENCES, groups=4, references=16))


def test_a_series_follows_what_was_varied(weights: RunRecord) -> None:
    assert varied(weights.summaries) == ["weight"]
    easyref, none = series_over(weights, "weight", weights.columns[0])
    assert [point.at for point in easyref.points] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert (easyref.label, easyref.level) == ("easyref", False)
    assert (none.label, none.level) == ("none", True)


def test_nothing_varied_gives_no_series(weights: RunRecord) -> None:
    assert series_over(weights, "references", weights.columns[0]) == []


def test_seconds_grow_with_the_references(references: RunRecord) -> None:
    first = series_over(references, "references", SECONDS)[0]
    means = [point.mean.value for point in first.points]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_settings_beside_the_varied_one_tell_series_apart(tmp_path: Path) -> None:
    base = Variant("easyref")
    variants = [replace(base, weight=w, references=n) for w in (0.5, 1.0) for n in (1, 2)]
    run = read_run(bench_run.write_run(tmp_path, variants, groups=2))
    labels = [one.label for one in series_over(run, "references", run.columns[0])]
    assert labels == ["easyref, weight 0.5", "easyref"]


def test_columns_that_are_better_the_higher_come_first(weights: RunRecord) -> None:
    assert [c.name for c in weights.columns[:3]] == ["clip_i", "clip_t", "dino_i"]
    assert [(a.name, b.name) for a, b in trade_pairs(weights)] == [
        ("clip_i", "clip_t"),
        ("dino_i", "clip_t"),
    ]


@pytest.mark.parametrize("heights", [[0, 0, 0], [0, 5, 100], [0, 11, 12, 50], [3]])
def test_labels_are_moved_apart_and_keep_their_order(heights: list[float]) -> None:
    moved = spread(heights, 10)
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(moved))
    assert sum(moved) == pytest.approx(sum(heights))


class TestPlots:
    """What needs matplotlib."""

    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_texts_are_texts_and_colours_those_of_the_page(self, weights: RunRecord) -> None:
        from easyref_core.evaluation.page.plots import all_plots

        groups = all_plots(weights)
        assert [group.key for group in groups] == ["trade", "weight"]
        for plot in (plot for group in groups for plot in group.plots):
            ElementTree.fromstring(plot.svg)
            assert re.search(r"<text[^>]*>easyref</text>", plot.svg), plot.title
            assert not re.findall(r"#[0-9a-f]{6}\b", plot.svg)
            assert "var(--m0)" in plot.svg
            assert "font-family" not in plot.svg

    def test_plots_of_a_page_share_no_ids(self, references: RunRecord) -> None:
        from easyref_core.evaluation.page.plots import all_plots

        plots = [
            p for s in ("", "held_out") for group in all_plots(references, s) for p in group.plots
        ]
        ids = [found for plot in plots for found in re.findall(r' id="([^"]+)"', plot.svg)]
        assert ids
        assert len(ids) == len(set(ids))

    def test_the_text_of_a_trade_off_lists_its_points(self, weights: RunRecord) -> None:
        from easyref_core.evaluation.page.plots import all_plots

        plot = all_plots(weights)[0].plots[0]
        for weight in ("0.2", "0.4", "0.6", "0.8", "1.2"):
            assert f"{weight}: 0." in plot.alt
            assert re.search(rf"<text[^>]*>{weight}</text>", plot.svg)

    def test_names_are_no_formulas(self, tmp_path: Path) -> None:
        from easyref_core.evaluation.page.plots import all_plots

        variants = [Variant("a $x_1$ <b>", weight=w) for w in (0.5, 1.0)]
        bench_run.BASES["a $x_1$ <b>"] = bench_run.BASES["none"]
        try:
            run = read_run(bench_run.write_run(tmp_path, variants, groups=2))
        finally:
            del bench_run.BASES["a $x_1$ <b>"]
        assert "a $x_1$ &lt;b&gt;" in all_plots(run)[0].plots[0].svg

    @pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
    def test_a_plot_for_a_document_is_the_same_each_time(
        self, references: RunRecord, tmp_path: Path, name: str
    ) -> None:
        first = save_plot(references, tmp_path / name, columns=["clip_i"]).read_bytes()
        assert save_plot(references, tmp_path / name, columns=["clip_i"]).read_bytes() == first
        if name.endswith("png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.getpixel((0, 0))[:3] == (255, 255, 255)

    def test_a_plot_of_what_was_not_varied_is_refused(
        self, references: RunRecord, tmp_path: Path
    ) -> None:
        with pytest.raises(EasyRefError, match="--vary weight="):
            save_plot(references, tmp_path / "plot.png", field="weight")


def test_a_markdown_table_has_the_best_in_bold(weights: RunRecord) -> None:
    lines = markdown_table(weights, ["clip_i", "clip_t"], seconds=False).splitlines()
    assert lines[0] == "| method | CLIP-I ↑ | CLIP-T ↑ |"
    assert len(lines) == 2 + len(bench_run.WEIGHTS)
    values = [
        float(line.split("|")[2].strip(" *").split("*")[0].split(" ")[0]) for line in lines[2:]
    ]
    bold = [line.split("|")[2].strip().startswith("**") for line in lines[2:]]
    assert bold[values.index(max(values))]
    assert sum(bold) == 1


def test_a_markdown_table_says_how_long_encoding_and_a_step_took(references: RunRecord) -> None:
    lines = [line.split(" | ") for line in markdown_table(references, ["clip_i"]).splitlines()]
    assert lines[0][2:] == ["seconds an image", "of encoding", "a step |"]
    # Of one reference: 0.17 of encoding and 2.1 of 30 steps.
    assert lines[2][2:] == ["2.27", "0.17", "0.07 |"]


def test_an_unknown_column_is_named(weights: RunRecord) -> None:
    with pytest.raises(EasyRefError, match="no column fid; it has clip_i"):
        markdown_table(weights, ["fid"])
