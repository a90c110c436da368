"""Compare the images of a finished run, blind: the page, the votes, the results."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...files import hold
from ...untrusted import escaped, is_regular, shown
from ..store import LOCK, RESULTS, VOTES, RunFolder, TrialState, is_run
from ..trials import Trial
from .pairs import Pair, labels_of, make_pairs, two_labels
from .preferences import Preference, preferences
from .server import RatingServer
from .session import RatingSession
from .votes import VoteFile, matching

_VOTES_LOCK = ".votes.lock"
_LONGEST_NAME = 100  # characters


def rate(
    folder: str | Path,
    compare: str = "",
    rater: str = "",
    port: int = 0,
    open_browser: bool = True,
) -> list[Preference]:
    """Serve the page until the person at it ends the comparison, or Ctrl-C; then add the win rates
    of all votes to `results.json` and write the run's page anew.

    Args:
        folder: of a finished run.
        compare: two labels, as "A,B"; empty for all pairs.
        rater: the person's name, for votes of several; may be empty.
        port: 0 for any that is free.

    Returns:
        The win rates of all votes in the folder.

    Raises:
        EasyRefError: the folder is no finished run or has no two images to compare, somebody else
            is rating, the port cannot be used, or something cannot be read or written.
    """
    run = _finished(folder)
    if len(rater) > _LONGEST_NAME or not rater.isprintable():
        raise EasyRefError(f"--rater is {shown(rater)}; a name has at most 100 letters.")
    with hold(run.path / _VOTES_LOCK, "comparison"):
        trials, checksums = _with_images(run)
        labels = labels_of(trials)
        if len(labels) < 2:
            found = f"only those of {shown(labels[0])}" if labels else "none"
            raise EasyRefError(
                f"{shown(run.path, 300)} has no images of two variants to compare, but {found}. "
                "Run the benchmark with another --method or --vary."
            )
        pairs = make_pairs(trials, two_labels(compare, labels) if compare else None)
        if not pairs:
            raise EasyRefError(
                f"In {shown(run.path, 300)} no two variants have an image for the same group and "
                "seed. Let the run make the images that are missing."
            )
        session = _session(run, trials, pairs, checksums, rater)
        with RatingServer(session, lambda: add_preferences(run.path), port) as server:
            results = _serve(server, session, open_browser)
    for reason in session.unreadable:
        print(f"left out: {escaped(reason)}", file=sys.stderr)
    return results


def add_preferences(folder: Path) -> list[Preference]:
    """Count the votes of a run, add the win rates to its `results.json`, and write its page anew.

    Raises:
        EasyRefError: another run works in the folder, or it cannot be read or written.
    """
    run = _finished(folder)
    with hold(run.path / LOCK, "benchmark run"):
        counted = _counted(run, *_with_images(run))
        results = run.read_json(RESULTS)
        if not isinstance(results, dict):
            raise EasyRefError(
                f"{shown(run.path / RESULTS, 300)} is damaged. Give the command of the run again "
                "to write it anew; the votes are kept."
            )
        results["preferences"] = [asdict(each) for each in counted]
        run.write_json(RESULTS, results, indent=1)
        _write_page(run.path)
    return counted


def plain_preferences(
    run: RunFolder, trials: Sequence[Trial], states: Mapping[str, TrialState]
) -> list[dict[str, Any]]:
    """The win rates of all votes for images that are in a run, as plain JSON.

    Args:
        states: path of a trial -> what became of it.

    Raises:
        EasyRefError: the votes cannot be read.
    """
    there = [trial for trial in trials if states[trial.path].status == "done"]
    checksums = {trial.path: states[trial.path].sha256 for trial in there}
    return [asdict(each) for each in _counted(run, there, checksums)]


def _counted(
    run: RunFolder, trials: Sequence[Trial], checksums: Mapping[str, str]
) -> list[Preference]:
    votes = VoteFile(run.path / VOTES).read().counted
    kept, _ = matching(votes, _images(make_pairs(trials), checksums)) if votes else ([], 0)
    return preferences(kept, labels_of(trials))


def _finished(folder: str | Path) -> RunFolder:
    run = RunFolder(folder)
    if not is_run(run.path):
        raise EasyRefError(
            f"{shown(run.path, 300)} is no folder of easyref bench. Name the --out of a run."
        )
    if not is_regular(run.path / RESULTS):
        raise EasyRefError(
            f"The run in {shown(run.path, 300)} is not finished. Give its command again, and "
            "compare when it is done."
        )
    return run


def _with_images(run: RunFolder) -> tuple[list[Trial], dict[str, str]]:
    """(the trials whose image is there, path of each -> SHA-256 of its file)"""
    trials, checksums = [], {}
    for trial in run.read_trials():
        state = run.state(trial)
        if state is not None and state.status == "done":
            trials.append(trial)
            checksums[trial.path] = state.sha256
    return trials, checksums


def _images(pairs: Sequence[Pair], checksums: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {pair.key: (checksums[pair.first.path], checksums[pair.second.path]) for pair in pairs}


def _session(
    run: RunFolder,
    trials: Sequence[Trial],
    pairs: Sequence[Pair],
    checksums: Mapping[str, str],
    rater: str,
) -> RatingSession:
    file = VoteFile(run.path / VOTES)
    votes = file.read()
    if votes.damaged:
        print(f"{VOTES}: {votes.damaged} damaged lines are passed over.", file=sys.stderr)
    _, gone = matching(votes.counted, _images(make_pairs(trials), checksums))
    if gone:
        print(
            f"{VOTES}: {gone} votes are for images that are gone or were made anew; they are kept, "
            "but not counted.",
            file=sys.stderr,
        )
    own = [vote for vote in votes.counted if vote.rater == rater]
    kept, _ = matching(own, _images(pairs, checksums))
    return RatingSession(run.path, pairs, checksums, file, kept, rater)


def _serve(server: RatingServer, session: RatingSession, open_browser: bool) -> list[Preference]:
    state = session.state()
    print(f"{state['total']} pairs, {state['done']} of them with a vote", file=sys.stderr)
    print(f"Compare them at {server.address}", flush=True)
    print("Votes are kept as they come. Ctrl-C ends the comparison too.", file=sys.stderr)
    if open_browser and _has_display():
        threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    server.ended()
    return session.results or []


def _has_display() -> bool:
    """Elsewhere a browser may start in this terminal, in place of the command."""
    return (
        os.name == "nt"
        or sys.platform == "darwin"
        or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    )


def _write_page(folder: Path) -> None:
    from ..page.write import write_page

    write_page(folder)


def table_of(results: Sequence[Preference]) -> str:
    """The win rates as lines for a terminal."""
    lines = [
        f"{each.label_a} over {each.label_b}: {100 * each.rate:.1f}% "
        f"[{100 * each.low:.1f}, {100 * each.high:.1f}], {each.votes} votes "
        f"({each.wins_a} : {each.wins_b}, {each.ties} ties), {each.groups} groups"
        for each in results
    ]
    return "\n".join(map(escaped, lines)) or "There are no votes."
