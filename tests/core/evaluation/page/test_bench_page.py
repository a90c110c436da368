"""The page of a run: one file, whatever the run's folder holds."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import bench_run
import pytest

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.page import write
from easyref_core.evaluation.page.write import MOST_BYTES, write_page
from easyref_core.evaluation.trials import Variant

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 191 }} $x$"


class Found(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_run.write_run(tmp_path_factory.mktemp("run"), bench_run.TABLE[:3], groups=4)


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of a page's time; tests that need them are marked."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(write, "all_plots", lambda run, split="": [])


@pytest.fixture
def plots() -> None:
    """The page is written with its plots."""
    pytest.importorskip("matplotlib")


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> Path:
    """A finished run of three methods on four groups, to be changed."""
    return Path(shutil.copytree(plain_run, tmp_path / "run"))


def page_of(folder: Path, most_bytes: int = MOST_BYTES) -> str:
    return write_page(folder, most_bytes).read_text(encoding="utf-8")


def change(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def results(folder: Path, **changed: Any) -> None:
    change(folder / "results.json", lambda content: content.update(changed))


def test_the_page_needs_no_other_file_and_no_network(run: Path) -> None:
    page = page_of(run)
    found = Found(page)
    assert found.all("img")
    assert all(image["src"].startswith("data:image/") for image in found.all("img"))
    assert not found.all("link")
    assert not [script for script in found.all("script") if "src" in script]
    policy = next(m["content"] for m in found.all("meta") if "content-security" in str(m).lower())
    assert "default-src 'none'" in policy
    assert not re.search(r"url\((?!#)|@import", page)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert page_of(run) == page_of(run)


def test_every_picture_has_a_text_and_every_table_a_name(run: Path, plots: None) -> None:
    found = Found(page_of(run))
    assert all(image["alt"] for image in found.all("img"))
    regions = [a for tag, a in found.elements if a.get("role") == "region"]
    assert regions
    assert all(
        r.keys() & {"aria-label", "aria-labelledby"} and r["tabindex"] == "0" for r in regions
    )
    drawn = [a for tag, a in found.elements if tag == "div" and a.get("role") == "img"]
    assert drawn
    assert all("CLIP" in plot["aria-label"] for plot in drawn)


@pytest.mark.parametrize(
    "place", ["label", "group", "kind", "split", "prompt", "note", "setting", "column", "error"]
)
def test_html_in_names_is_text(run: Path, place: str) -> None:
    if place == "note":
        results(run, notes=[HOSTILE])
    elif place == "setting":
        results(run, settings={HOSTILE: HOSTILE}, methods={HOSTILE: HOSTILE})
    elif place == "column":
        change(
            run / "results.json",
            lambda r: r["columns"][0].update(title=HOSTILE, scale=HOSTILE, printed={HOSTILE: 3}),
        )
    elif place == "error":
        scores = run / "scores.csv"
        text = scores.read_text("utf-8").replace(
            ",done,", ',failed,"' + HOSTILE.replace('"', '""') + '"', 1
        )
        scores.write_text(text, encoding="utf-8")
    else:
        for name in ("trials.json", "results.json"):
            change(
                run / name,
                lambda content: [
                    item.update({place: HOSTILE})
                    for item in (content if isinstance(content, list) else content["summaries"])
                    if item.get(place)
                ],
            )
    found = Found(page_of(run))
    assert len(found.all("script")) == 1
    assert not any(name.startswith("on") for _, a in found.elements for name in a)
    assert all(image["src"].startswith("data:image/") for image in found.all("img"))
    assert "<script>alert(1)</script>" in found.text
    assert str(7 * 191) not in found.text


def test_numbers_that_are_none_are_left_out(run: Path) -> None:
    def spoil(content: Any) -> None:
        for summary in content["summaries"]:
            summary["column"]["clip_i"] = {"value": float("nan"), "low": None, "high": "x"}
            summary["column"]["dino_i"] = {"value": 0.5, "low": float("-inf"), "high": None}
            summary["seconds"] = {"sample": float("inf")}
            summary["groups"] = float("nan")

    change(run / "results.json", spoil)
    page = page_of(run)
    text = Found(page).text
    assert "nan" not in text.lower()
    assert not re.search(r"\binf\b", text)
    assert "–" in text
    assert "0.500" in text


def test_a_variant_without_results_has_its_row(run: Path) -> None:
    change(
        run / "results.json",
        lambda r: r.update(summaries=[s for s in r["summaries"] if s["label"] != "average"]),
    )
    rows = re.findall(r'<th scope="row".*?</tr>', page_of(run), re.DOTALL)
    own = [row for row in rows if ">average<" in row]
    assert own
    assert "–" in own[0]


def test_the_best_of_a_column_is_marked(run: Path) -> None:
    page = page_of(run)
    table = page[page.index('<table class="scores">') : page.index("</table>")]
    head = re.findall(r'<th scope="col"[^>]*>\s*([^<\n]+?) *<', table)
    values = []
    for row in re.findall(r"<tr>\s*<th scope=\"row\".*?</tr>", table, re.DOTALL):
        cells = re.findall(r'<td class="number( best)?" data-order="([^"]+)"', row)
        values.append([(bool(best), float(value)) for best, value in cells])
    for name, better in (("CLIP-I", max), ("DINO-I", max), ("Copied", min)):
        column = [row[head.index(name) - 1] for row in values]
        best = better(value for _, value in column)
        assert [marked for marked, _ in column] == [value == best for _, value in column], name
    nearest = [row[head.index("CLIP-I, nearest reference") - 1] for row in values]
    assert not any(marked for marked, _ in nearest)


def test_scores_are_printed_on_every_scale(run: Path) -> None:
    change(
        run / "results.json",
        lambda r: [
            s["column"].update(clip_t={"value": 0.3, "low": 0.29, "high": 0.31})
            for s in r["summaries"]
        ],
    )
    text = Found(page_of(run)).text
    for number in ("0.300", "0.750", "30.0", "0.290–0.310", "0.725–0.775", "29.0–31.0"):
        assert number in text
    assert "2.5 × cosine" in text


def test_differences_to_the_first_method_are_paired_by_group(run: Path) -> None:
    lines = (run / "scores.csv").read_text("utf-8").splitlines()
    names = lines[0].split(",")
    clip_i, label, group = (names.index(name) for name in ("clip_i", "label", "group"))
    rows = list(csv.reader(lines[1:]))
    of_group = {row[group]: 0.1 * number for number, row in enumerate(rows[:4])}
    for row in rows:
        row[clip_i] = str(of_group[row[group]] + (0.25 if row[label] == "average" else 0))
    with (run / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    # Groups differ much, the difference does not.
    assert "+0.250<small>+0.250 to +0.250" in page_of(run)


@pytest.mark.parametrize("name", ["missing", "damaged", "truncated"])
def test_an_image_that_cannot_be_read_is_said(run: Path, name: str) -> None:
    path = run / "images" / "easyref" / "square_000" / "0.png"
    content = path.read_bytes()
    path.unlink()
    if name != "missing":
        path.write_bytes(b"no picture" if name == "damaged" else content[:200])
    text = Found(page_of(run)).text
    assert "The image cannot be read." in text
    assert "Pictures that cannot be read are not shown: 1." in text


def test_a_failed_image_says_why(tmp_path: Path) -> None:
    failed = "images/average/star_001/0"
    bench_run.write_run(tmp_path, bench_run.TABLE[:2], groups=2, failed=[failed])
    text = Found(page_of(tmp_path)).text
    assert "1 failed." in text
    assert text.count("the device ran out of memory") == 2  # in the list, and in its place


def test_images_outside_of_the_folder_are_not_shown(run: Path) -> None:
    shutil.copy(bench_run.PICTURES / "star" / "1.png", run.parent / "secret.png")
    change(run / "trials.json", lambda trials: trials[0].update(path="images/../../secret"))
    before = len(Found(page_of(run)).all("img"))
    change(run / "trials.json", lambda trials: trials[0].update(path="images/none"))
    assert len(Found(page_of(run)).all("img")) == before


def test_the_page_stays_within_its_size_and_says_what_is_left_out(tmp_path: Path) -> None:
    bench_run.write_run(tmp_path, bench_run.TABLE[:2], groups=20)
    whole = page_of(tmp_path)
    limit = 700_000
    assert len(whole.encode()) > limit
    page = page_of(tmp_path, limit)
    assert len(page.encode()) <= limit
    found = Found(page)
    shown = [a for tag, a in found.elements if tag == "article"]
    assert 3 < len(shown) < 20
    assert {"held-in", "held-out"} == {group["data-split"] for group in shown}
    assert f"from {len(shown)} of 20 groups" in found.text


def test_a_page_without_room_for_pictures_has_its_tables(run: Path) -> None:
    found = Found(page_of(run, 1000))
    assert not found.all("img")
    assert found.all("table")
    assert "0 of 12 images are shown" in found.text


def test_one_group_and_one_method_are_enough(tmp_path: Path) -> None:
    bench_run.write_run(tmp_path, bench_run.TABLE[:1], groups=1)
    text = Found(page_of(tmp_path)).text
    assert "1 variant on 1 group, 1 images" in " ".join(text.split())


def test_several_images_of_a_group_share_its_references(tmp_path: Path) -> None:
    bench_run.write_run(tmp_path, bench_run.TABLE[:2], groups=2, images=3)
    found = Found(page_of(tmp_path))
    images = [image["alt"] for image in found.all("img")]
    assert len([alt for alt in images if alt.startswith("Reference")]) == 2 * 4
    assert len([alt for alt in images if alt.startswith(("easyref", "average"))]) == 2 * 3 * 2


def test_many_references_are_counted(tmp_path: Path) -> None:
    variants = [Variant("easyref", references=n) for n in (1, 20)]
    bench_run.write_run(tmp_path, variants, groups=1, references=20)
    found = Found(page_of(tmp_path))
    assert "20 references" in found.text
    assert "9 are shown" in found.text


def test_win_rates_are_shown_with_their_intervals(run: Path) -> None:
    results(run, preferences=[*bench_run.PREFERENCES, {"label_a": "x", "rate": float("nan")}])
    text = Found(page_of(run)).text
    assert "74%" in text
    assert "63–84%" in text
    assert "41 : 12, 7 ties" in text


def test_checksums_are_shown_but_not_the_folders_of_this_computer(run: Path) -> None:
    page = page_of(run)
    assert "a3" * 32 in page
    assert "models/sdxl" in page
    assert "/srv/private" not in page


def test_licences_of_the_pictures_are_counted(run: Path) -> None:
    assert "CC0-1.0 (16)" in Found(page_of(run)).text


def test_without_matplotlib_the_page_has_no_plots_and_says_so(
    run: Path, plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = Found(page_of(run)).text
    assert "matplotlib is missing" in text
    assert "easyref[bench]" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"summaries": 3}', "\x00\xff", None])
def test_a_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(EasyRefError, match=r"results\.json"):
        write_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("name", ["trials.json", "scores.csv"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[[[", b'path,"', None])
def test_other_files_may_be_damaged(run: Path, name: str, content: bytes | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert Found(page_of(run)).all("table")


@pytest.mark.parametrize("value", [None, 3, "x", [], [None, 3, "x", [[]]], {"x": {"y": None}}])
def test_values_of_other_types_are_left_out(run: Path, value: Any) -> None:
    (run / "trials.json").unlink()
    results(run, settings=value, methods=value, metrics=value, preferences=value, notes=value)
    assert Found(page_of(run)).all("table")
    results(run, columns=value, summaries=value if isinstance(value, list) else [value])
    assert Found(page_of(run)).all("h1")


def test_variants_of_one_method_share_its_colour(tmp_path: Path) -> None:
    base = Variant("easyref")
    variants = [base, replace(base, weight=0.5), Variant("none")]
    page = page_of(bench_run.write_run(tmp_path, variants, groups=2))
    marks = re.findall(r'<svg class="mark (m\d)".*?</svg><span>([^<]+)</span>', page)
    found = {label: mark for mark, label in marks}
    assert found["easyref"] == found["easyref, weight 0.5"] != found["none"]
