"""A comparison through its server: what is told, kept, refused and counted."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import bench, make_groups, settings_for
from PIL import Image
from rated_run import COLOURS, lines_of, write_rated_run

from easyref_core.cli import main
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.rating import rate as module
from easyref_core.evaluation.rating.rate import add_preferences, rate, table_of
from easyref_core.evaluation.rating.server import RatingServer
from easyref_core.files import hold


class Rater:
    """Talks to the server as the page does."""

    def __init__(self, address: str) -> None:
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([^/]+)/", address)
        assert found
        self.port, self.secret = int(found[1]), found[2]

    def ask(
        self,
        name: str,
        content: Any = None,
        path: str | None = None,
        raw: bytes | None = None,
        **headers: str,
    ) -> tuple[int, bytes, Any]:
        """(status, body, headers)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = raw if raw is not None else None if content is None else json.dumps(content).encode()
        if body is not None:
            headers = {"Content-Type": "application/json", **headers}
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        target = f"/{self.secret}/{name}" if path is None else path
        connection.request("GET" if body is None else "POST", target, body, given)
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.headers
        connection.close()
        return found

    def state(self) -> dict[str, Any]:
        return json.loads(self.ask("state")[1])

    def send(self, name: str, content: Any) -> dict[str, Any]:
        status, body, _ = self.ask(name, content)
        assert status == 200, body
        return json.loads(body)

    def vote(self, choice: int) -> dict[str, Any]:
        return self.send("vote", {"pair": self.state()["pair"]["id"], "choice": choice})

    def colour(self, name: str) -> tuple[int, ...]:
        """Of the upper left corner of a picture."""
        with Image.open(BytesIO(self.ask(f"picture/{name}")[1])) as picture:
            assert picture.info == {}
            return picture.getpixel((0, 0))


@contextmanager
def rating(folder: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> Iterator[Rater]:
    """A comparison that runs in another thread; it is ended if nobody did."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(rate(folder, open_browser=False, **options))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    said = ""
    while "http" not in said and thread.is_alive():
        said += capsys.readouterr().out
        thread.join(0.01)
    if "http" not in said:
        raise outcome[0]
    rater = Rater(re.search(r"http\S+/", said)[0])  # type: ignore[index]
    try:
        yield rater
    finally:
        with suppress(OSError):  # it has ended
            rater.ask("end", {})
        thread.join(30)
    assert not thread.is_alive()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose pages were written."""
    found: list[Path] = []
    monkeypatch.setattr(module, "_write_page", found.append)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_rated_run(tmp_path / "run")


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    return lambda folder, **options: rating(folder, capsys, **options)


def rgb(name: str) -> tuple[int, ...]:
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))


def test_votes_go_to_the_variant_that_was_shown_on_that_side(
    run: Path, start: Callable[..., Any], pages: list[Path]
) -> None:
    """The first variant's images are tomato; who always prefers tomato makes it win."""
    sides = set()
    with start(run) as rater:
        while (state := rater.state())["pair"]:
            left = rater.colour(state["pair"]["left"])
            assert {left, rater.colour(state["pair"]["right"])} == {*map(rgb, COLOURS[:2])}
            sides.add(left)
            rater.vote(1 if left == rgb(COLOURS[0]) else 2)
        assert (state["done"], state["total"]) == (4, 4)
        results = rater.send("end", {})["results"]
        with suppress(OSError):  # it may have gone by now
            assert rater.send("end", {})["results"] == results
    assert len(sides) == 2
    (found,) = results
    wanted = {"label_a": "easyref", "label_b": "none", "wins_a": 4, "wins_b": 0, "rate": 1.0}
    assert wanted.items() <= found.items()
    content = json.loads((run / "results.json").read_text())
    assert content["preferences"] == results
    assert content["notes"] == ["kept"]
    assert pages == [run]


def test_nothing_says_which_variant_is_where(run: Path, start: Callable[..., Any]) -> None:
    with start(run) as rater:
        seen = b""
        for name in ("", "page.js", "page.css", "state"):
            status, body, headers = rater.ask(name)
            assert status == 200
            seen += body + str(headers).encode()
        state = rater.state()
        status, body, headers = rater.ask(f"picture/{state['pair']['left']}")
        seen += body + str(headers).encode()
        again = rater.vote(0)
    for word in (b"easyref,", b'"easyref"', b'none"', b"images/", b"0/", str(run).encode()):
        assert word not in seen.replace(b"image/", b"").replace(b"http://www.w3.org/", b"")
    assert state["pair"]["left"] != again["pair"]["left"]


def test_votes_are_kept_as_they_come_and_a_later_session_goes_on(
    run: Path, start: Callable[..., Any]
) -> None:
    with start(run) as rater:
        first = rater.state()["pair"]["id"]
        second = rater.vote(1)["pair"]["id"]
        assert len(lines_of(run)) == 1  # while the server runs
    with start(run) as rater:
        state = rater.state()
        assert (state["done"], state["pair"]["id"]) == (1, second)
        assert second != first


def test_the_last_vote_can_be_taken_back_also_of_an_earlier_session(
    run: Path, start: Callable[..., Any]
) -> None:
    with start(run) as rater:
        first = rater.state()["pair"]["id"]
        second = rater.vote(1)["pair"]["id"]
        rater.vote(2)
    with start(run) as rater:
        state = rater.send("undo", {})
        assert (state["done"], state["pair"]["id"]) == (1, second)
        state = rater.send("undo", {})
        assert (state["done"], state["pair"]["id"]) == (0, first)
        assert rater.send("undo", {})["done"] == 0
        assert rater.vote(0)["pair"]["id"] == second
        (found,) = rater.send("end", {})["results"]
    assert (found["votes"], found["ties"]) == (1, 1)


def test_a_second_window_does_not_vote_twice(run: Path, start: Callable[..., Any]) -> None:
    with start(run) as rater:
        pair = rater.state()["pair"]["id"]
        rater.vote(1)
        assert rater.send("vote", {"pair": pair, "choice": 2})["done"] == 1
    assert len(lines_of(run)) == 1


def test_each_person_votes_for_all_pairs_and_all_are_counted(
    run: Path, start: Callable[..., Any]
) -> None:
    for name in ("ana", "bo"):
        with start(run, rater=name) as rater:
            assert rater.state()["done"] == 0
            for _ in range(4):
                rater.vote(1)
    assert add_preferences(run)[0].votes == 8


def test_pairs_of_two_variants_alone(tmp_path: Path, start: Callable[..., Any]) -> None:
    labels = ("easyref", "easyref, weight 0.6", "none")
    run = write_rated_run(tmp_path / "run", labels, images=2)
    with start(run) as rater:
        assert rater.state()["total"] == 24
    with start(run, compare="easyref, weight 0.6,none") as rater:
        assert rater.state()["total"] == 8
        for _ in range(8):
            rater.vote(0)
        assert rater.state()["pair"] is None
    assert "easyref, weight 0.6 over none: 50.0% [50.0, 50.0], 8 votes" in table_of(
        add_preferences(run)
    )


def test_an_image_that_failed_or_is_damaged_by_now_is_passed_over(
    tmp_path: Path, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_rated_run(tmp_path / "run", unlike=[("none", 1)])
    (run / "images" / "0" / "0" / "0.png").write_bytes(b"no picture")
    with start(run) as rater:
        assert rater.state()["total"] == 2
        (run / "images" / "0" / "2" / "0.png").write_bytes(b"no picture")
        state = rater.state()
        assert state["total"] == 1
        assert rater.vote(1)["pair"] is None
    assert "left out" in capsys.readouterr().err


def test_references_that_are_gone_are_not_found_and_the_pair_is_shown(
    run: Path, start: Callable[..., Any]
) -> None:
    trials = json.loads((run / "trials.json").read_text())
    for trial in trials:
        trial["references"] = [f"{run}/gone.png"] * len(trial["references"])
    (run / "trials.json").write_text(json.dumps(trials))
    with start(run) as rater:
        (name,) = set(rater.state()["pair"]["references"])
        assert rater.ask(f"picture/{name}")[0] == 404


def test_votes_for_images_that_were_made_anew_are_not_counted(
    tmp_path: Path, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_rated_run(tmp_path / "run")
    with start(run) as rater:
        rater.vote(1)
    votes = (run / "votes.jsonl").read_bytes()
    write_rated_run(run, side=64)
    assert (run / "votes.jsonl").read_bytes() == votes
    with start(run) as rater:
        assert rater.state()["done"] == 0
    assert add_preferences(run) == []
    assert table_of([]) == "There are no votes."


REFUSED: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("another host's name", 403, {"Host": "example.org"}),
    ("another port", 403, {"Host": "127.0.0.1:1"}),
    ("a page of another site", 403, {"Origin": "http://example.org"}),
    ("a page without a site", 403, {"Origin": "null"}),
    ("no secret", 404, {"path": "/"}),
    ("another secret", 404, {"path": "/wrong/state"}),
    ("a part of the secret", 404, {"path": "/SECRET"}),
    ("a secret of other letters", 404, {"path": "/%C3%A9/state"}),
    ("a file of the computer", 404, {"name": "../../../../etc/passwd"}),
    ("a file of the package", 404, {"name": "server.py"}),
    ("an unknown picture", 404, {"name": "picture/x"}),
    ("a path as a picture", 404, {"name": "picture/../trials.json"}),
    ("an unknown action", 404, {"name": "delete", "content": {}}),
    ("a vote that is no JSON", 400, {"name": "vote", "raw": b"{"}),
    ("a vote that is a list", 400, {"name": "vote", "content": []}),
    ("a vote of a form", 400, {"name": "vote", "raw": b"{}", "Content_Type": "text/plain"}),
    ("a vote that is too long", 400, {"name": "vote", "raw": b" " * 5000}),
    ("a vote without a pair", 400, {"name": "vote", "content": {"choice": 1}}),
    ("a vote for an unknown pair", 409, {"name": "vote", "content": {"pair": "x", "choice": 1}}),
    ("an unknown choice", 409, {"name": "vote", "content": {"pair": "PAIR", "choice": 3}}),
    ("true as a choice", 409, {"name": "vote", "content": {"pair": "PAIR", "choice": True}}),
    ("a text as a choice", 400, {"name": "vote", "content": {"pair": "PAIR", "choice": "1"}}),
)


def test_what_is_not_the_pages_is_refused(run: Path, start: Callable[..., Any]) -> None:
    with start(run) as rater:
        pair = rater.state()["pair"]["id"]
        for said, status, given in REFUSED:
            given = dict(given)
            name = given.pop("name", "state")
            if given.get("path") == "/SECRET":
                given["path"] = f"/{rater.secret[:-1]}/state"
            if isinstance(given.get("content"), dict) and given["content"].get("pair") == "PAIR":
                given["content"] = given["content"] | {"pair": pair}
            assert rater.ask(name, **given)[0] == status, said
        assert rater.state()["pair"]["id"] == pair
    assert not (run / "votes.jsonl").exists()


def test_the_page_may_load_nothing_from_elsewhere(run: Path, start: Callable[..., Any]) -> None:
    with start(run) as rater:
        status, _, headers = rater.ask("", Host=f"localhost:{rater.port}")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Referrer-Policy"] == "no-referrer"


def test_a_vote_that_cannot_be_written_is_said_and_not_counted(
    run: Path, start: Callable[..., Any]
) -> None:
    with start(run) as rater:
        pair = rater.state()["pair"]["id"]
        (run / "votes.jsonl").mkdir()
        status, body, _ = rater.ask("vote", {"pair": pair, "choice": 1})
        assert (status, rater.state()["done"]) == (409, 0)
        assert "cannot be written" in json.loads(body)["error"]
        (run / "votes.jsonl").rmdir()
        assert rater.vote(1)["done"] == 1


def test_two_people_at_once_are_refused(run: Path, start: Callable[..., Any]) -> None:
    with start(run), pytest.raises(EasyRefError, match="Another comparison works in"):
        rate(run, open_browser=False)


def test_results_wait_for_a_run_that_works_in_the_folder(
    run: Path, start: Callable[..., Any]
) -> None:
    with start(run) as rater:
        rater.vote(1)
        with hold(run / ".lock", "benchmark run"):
            status, body, _ = rater.ask("end", {})
            assert status == 409
            assert "Another benchmark run" in json.loads(body)["error"]
        assert rater.send("end", {})["results"][0]["votes"] == 1


def test_a_port_that_is_taken_is_named(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EasyRefError, match=f"port {port} .*--port"):
            rate(run, port=port, open_browser=False)
    with pytest.raises(EasyRefError, match="port 70000"):
        rate(run, port=70_000, open_browser=False)


def test_what_is_no_finished_run_is_refused(tmp_path: Path, run: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", run / "run.json"):
        with pytest.raises(EasyRefError, match="no folder of easyref bench"):
            rate(folder, open_browser=False)
    (run / "trials.json").write_text('[{"path": "x"}]')
    with pytest.raises(EasyRefError, match="damaged"):
        rate(run, open_browser=False)
    (run / "results.json").unlink()
    with pytest.raises(EasyRefError, match="not finished"):
        rate(run, open_browser=False)


def test_a_run_without_two_images_to_compare_is_refused(tmp_path: Path) -> None:
    one = write_rated_run(tmp_path / "one", ("easyref",))
    with pytest.raises(EasyRefError, match="only those of 'easyref'"):
        rate(one, open_browser=False)
    apart = [("none", 0), ("none", 1), ("easyref", 2), ("easyref", 3)]
    run = write_rated_run(tmp_path / "apart", unlike=apart)
    with pytest.raises(EasyRefError, match="no two variants"):
        rate(run, open_browser=False)
    with pytest.raises(EasyRefError, match="--compare"):
        rate(run, compare="easyref,x", open_browser=False)
    with pytest.raises(EasyRefError, match="--rater"):
        rate(run, rater="\x1b", open_browser=False)


def test_a_run_that_is_resumed_keeps_its_preferences(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    make_groups(tmp_path / "groups", {"held_in/a": 3, "held_out/b": 4})
    settings = settings_for(tmp_path, ["weight=0.5,1"])
    bench(settings)
    with start(tmp_path / "run") as rater:
        rater.vote(1)
        results = rater.send("end", {})["results"]
    bench(settings)
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["preferences"] == results
    assert results[0]["votes"] == 1


def test_the_command_compares_and_prints_win_rates(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: RatingServer) -> None:
        server.session.vote(server.session.state()["pair"]["id"], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(RatingServer, "serve_forever", interrupted)
    monkeypatch.setattr(module, "_has_display", lambda: False)
    assert main(["bench", "--rate", str(run), "--compare", "easyref,none"]) == 0
    assert "easyref over none: 50.0% [50.0, 50.0], 1 votes" in capsys.readouterr().out
    assert main(["bench", "--rate", str(run), "--out", "x"]) == 1
    assert "--rate is for a run that is finished" in capsys.readouterr().err
