"""One person's comparison: which pair comes next, the votes, the pictures by opaque names."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import EasyRefError
from ...pictures.loading import open_picture
from .pairs import Pair, is_turned, shuffled
from .preferences import Preference
from .votes import Vote, VoteFile

CHOICES = (0, 1, 2)  # a tie, the left one, the right one
_LONGEST_IMAGE = 2048  # pixels
_LONGEST_REFERENCE = 768


class RatingSession:
    """What the page of a comparison shows and does. Its methods may be called by several threads.

    Args:
        folder: of the run.
        pairs: to compare.
        checksums: path of a trial -> SHA-256 of its image.
        votes: of this person, for pairs among `pairs`.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Sequence[Pair],
        checksums: Mapping[str, str],
        file: VoteFile,
        votes: Sequence[Vote],
        rater: str,
    ) -> None:
        self._folder = folder
        self._pairs = {pair.key: pair for pair in shuffled(pairs, rater)}
        self._checksums = checksums
        self._file = file
        self._votes = {vote.pair: vote for vote in votes}
        self._rater = rater
        self._again = ""  # key of a pair whose vote was taken back
        self._pictures: dict[str, tuple[Path, int]] = {}
        self._names: dict[tuple[Path, str], str] = {}
        self._lock = threading.Lock()
        self.unreadable: list[str] = []
        self.results: list[Preference] | None = None

    def state(self) -> dict[str, Any]:
        """What the page shows, as plain JSON: progress, and the next pair without a word of which
        variants it compares; after the end, the results.
        """
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"pair": None, "ahead": []}
        if self.results is not None:
            state["results"] = [asdict(each) for each in self.results]
        else:
            left = self._left()
            while left and state["pair"] is None:
                state["pair"] = self._shown(left.pop(0))
            state["ahead"] = [name for pair in left[:1] for name in self._images(pair)]
        state["done"] = sum(key in self._pairs for key in self._votes)
        state["total"] = len(self._pairs)
        return state

    def _left(self) -> list[Pair]:
        left = [pair for key, pair in self._pairs.items() if key not in self._votes]
        return sorted(left, key=lambda pair: pair.key != self._again)

    def _shown(self, pair: Pair) -> dict[str, Any] | None:
        """A pair as the page gets it; None, and out of the comparison, if an image of it cannot be
        read any more.
        """
        for trial in (pair.first, pair.second):
            try:
                open_picture(self._path(trial.path), longest=_LONGEST_IMAGE)
            except EasyRefError as error:
                self.unreadable.append(str(error))
                del self._pairs[pair.key]
                return None
        left, right = self._images(pair)
        references = [
            self._name(each.source.path, "", _LONGEST_REFERENCE) for each in pair.references
        ]
        prompt = pair.first.prompt
        return {
            "id": pair.key,
            "prompt": prompt,
            "references": references,
            "left": left,
            "right": right,
        }

    def _images(self, pair: Pair) -> tuple[str, str]:
        """The names of the pictures on the left and on the right."""
        first, second = (
            self._name(self._path(trial.path), pair.key, _LONGEST_IMAGE)
            for trial in (pair.first, pair.second)
        )
        return (second, first) if is_turned(pair, self._rater) else (first, second)

    def _path(self, trial: str) -> Path:
        return self._folder / f"{trial}.png"

    def _name(self, path: Path, place: str, longest: int) -> str:
        """A name that says nothing of the picture; another one in each pair."""
        name = self._names.setdefault((path, place), secrets.token_urlsafe(12))
        self._pictures[name] = path, longest
        return name

    def vote(self, pair: str, choice: int) -> dict[str, Any]:
        """Keep a vote and go on to the next pair.

        Args:
            pair: the id in the state; if it has a vote, as in a second window, that stays.
            choice: one of `CHOICES`.

        Raises:
            EasyRefError: an unknown pair or choice, or the vote cannot be written.
        """
        with self._lock:
            shown = self._pairs.get(pair)
            if shown is None or choice not in CHOICES or isinstance(choice, bool):
                raise EasyRefError("There is no such pair, or no such choice. Load the page again.")
            if pair not in self._votes and self.results is None:
                vote = self._made(shown, choice)
                self._file.add(vote)
                self._votes[pair] = vote
                self._again = ""
            return self._state()

    def _made(self, pair: Pair, choice: int) -> Vote:
        turned = is_turned(pair, self._rater)
        left, right = ("b", "a") if turned else ("a", "b")
        one = pair.first
        return Vote(
            *(pair.key, one.group, one.prompt, one.seed, *pair.labels),
            winner=("tie", left, right)[choice],
            left=left,
            image_a=self._checksums[one.path],
            image_b=self._checksums[pair.second.path],
            rater=self._rater,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def undo(self) -> dict[str, Any]:
        """Take the last vote back and show its pair again; without a vote nothing changes.

        Raises:
            EasyRefError: it cannot be written.
        """
        with self._lock:
            key = next((key for key in reversed(self._votes) if key in self._pairs), None)
            if key is not None and self.results is None:
                self._file.add(self._votes[key], taken_back=True)
                del self._votes[key]
                self._again = key
            return self._state()

    def end(self, results: list[Preference]) -> None:
        """Show the results from now on; no more votes are taken."""
        with self._lock:
            self.results = results

    def picture(self, name: str) -> bytes | None:
        """A picture as PNG, without the file's own name or notes; None for an unknown name.

        Raises:
            EasyRefError: it cannot be read.
        """
        with self._lock:
            found = self._pictures.get(name)
        if found is None:
            return None
        path, longest = found
        picture = open_picture(path, longest=longest)
        buffer = BytesIO()
        Image.frombytes("RGB", picture.size, picture.tobytes()).save(
            buffer, "PNG", compress_level=1
        )
        return buffer.getvalue()
