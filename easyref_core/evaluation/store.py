"""A run's folder: what it was made with, and which images and scores are finished.

run.json                 settings, methods and metrics, compared when the run is resumed
trials.json              what is generated
images/LABEL/GROUP/0.png beside it 0.json, written last: done or failed, and the PNG's checksum
work/                    what methods keep; scores by metric; checksums of the pictures
scores.csv, scores.parquet, times.csv, results.json, index.html
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import EasyRefError
from ..files import hold, is_within, make_folder, new_name, sweep, write_atomically
from ..pictures.loading import open_picture
from ..untrusted import escaped, is_regular, number, one_line, read_bytes, read_json, shown, text
from .methods import Generated
from .plain_trials import trial_from_plain
from .trials import Trial

VERSION = 1
RUN, TRIALS, RESULTS, VOTES, LOCK = (
    "run.json",
    "trials.json",
    "results.json",
    "votes.jsonl",
    ".lock",
)
SHARED = ".shared"
_HIDDEN = (LOCK, SHARED, ".easyref-")  # the last are unfinished files
_FOLDERS = ("images", "work")
_FILES = (TRIALS, RESULTS, "scores.csv", "scores.parquet", "times.csv", "index.html")
_LARGEST_JSON = 256_000_000  # bytes
_LARGEST_IMAGE = 1_000_000_000  # bytes
_LONGEST = 1e9  # seconds of a stage
_MOST_CHANGES = 5  # that a message names


class OtherRun(EasyRefError):
    """A run's folder that was made with other settings.

    Attributes:
        changed: each difference, as "name: old -> new".
    """

    def __init__(self, folder: Path, changed: Sequence[str]) -> None:
        named = "; ".join(text[:300] for text in changed[:_MOST_CHANGES])
        more = f" and {len(changed) - _MOST_CHANGES} more" if len(changed) > _MOST_CHANGES else ""
        super().__init__(
            f"{shown(folder, 300)} was made with other settings: {named}{more}. Restore them, "
            "choose another --out, or begin anew with --overwrite."
        )
        self.changed = tuple(changed)


@dataclass(frozen=True)
class TrialState:
    """What became of a trial.

    Attributes:
        status: "done" or "failed".
        error: why it failed.
        seconds: by stage.
        sha256: of the PNG file.
    """

    status: str
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    sha256: str = ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        EasyRefError: the disk is full or not writable.
    """
    try:
        yield
    except OSError as error:
        raise EasyRefError(
            f"{shown(path, 300)} could not be written ({escaped(error.strerror or str(error))}). "
            "What is finished is kept; free some space and give the same command again to resume."
        ) from error


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `easyref bench` has written."""
    if not is_regular(folder / RUN):
        return False
    try:
        content = read_json(folder / RUN, _LARGEST_JSON)
    except EasyRefError:
        return False
    if not isinstance(content, dict) or "version" not in content:
        return False
    return all(isinstance(content.get(name), dict) for name in ("settings", "methods"))


class RunFolder:
    """The folder of a run, for reading and writing. Writing needs `opened`, by one process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def opened(self, overwrite: bool, inputs: Sequence[str | Path] = ()) -> Iterator[None]:
        """Make the folder, or check that it is a run's, and keep other runs out of it.

        Args:
            overwrite: remove what an earlier run has left there. Votes are renamed.
            inputs: files and folders that are read.

        Raises:
            EasyRefError: it holds something else, another run works in it, or it is read.
        """
        self._check_apart(inputs)
        with writing(self.path):
            make_folder(self.path)
        with hold(self.path / LOCK, "benchmark run"):
            for parent, _, _ in os.walk(self.path):
                sweep(Path(parent))  # what killed runs have left
            found = sorted(os.listdir(self.path))
            others = [name for name in found if not name.startswith(_HIDDEN)]
            if others and not is_run(self.path):
                raise EasyRefError(
                    f"{shown(self.path, 300)} holds something else than a benchmark run "
                    f"({shown(others[0])}), so nothing is written there. Choose another "
                    "--out."
                )
            if overwrite:
                with writing(self.path):
                    self._clear()
            yield

    def _check_apart(self, inputs: Sequence[str | Path]) -> None:
        written = [self.path / name for name in (RUN, VOTES, *_FILES, *_FOLDERS)]
        for source in map(Path, inputs):
            if is_within(self.path, source) or any(is_within(source, path) for path in written):
                raise EasyRefError(
                    f"--out is {shown(self.path, 300)}, but {shown(source, 300)} is read by this "
                    "run. Choose another --out, outside of what is read."
                )

    def _clear(self) -> None:
        """All that a run writes, `run.json` last: without it the folder is no run's."""
        votes = self.path / VOTES
        if os.path.lexists(votes):
            votes.rename(new_name(votes))
        for name in (*_FILES, *_FOLDERS, RUN):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """
        Raises:
            EasyRefError: it cannot be written.
        """
        self.write_bytes(name, text.encode("utf-8", "surrogateescape"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """
        Raises:
            EasyRefError: it cannot be written.
        """
        with writing(self.path / name):
            write_atomically(self.path / name, lambda file: file.write_bytes(content))

    def write_json(self, name: str, content: Any, indent: int | None = None) -> None:
        """
        Raises:
            EasyRefError: it cannot be written.
        """
        self.write_text(name, json.dumps(content, indent=indent, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """
        Raises:
            EasyRefError: no such file, or it is damaged.
        """
        return read_json(self.path / name, _LARGEST_JSON)

    def image_path(self, trial: Trial) -> Path:
        return self.path / f"{trial.path}.png"

    def save(self, trial: Trial, result: Generated) -> None:
        """Keep an image, or why there is none; what stood there before is replaced.

        Raises:
            EasyRefError: it cannot be written.
        """
        path = self.image_path(trial)
        state = TrialState("failed", result.error or "no image was made", dict(result.seconds))
        if result.image is not None:
            buffer = BytesIO()
            result.image.convert("RGB").save(buffer, "PNG")
            content = buffer.getvalue()
            self.write_bytes(f"{trial.path}.png", content)
            digest = hashlib.sha256(content).hexdigest()
            state = TrialState("done", "", dict(result.seconds), digest)
        else:
            with writing(path):
                path.unlink(missing_ok=True)
        self.write_json(f"{trial.path}.json", vars(state))

    def state(self, trial: Trial) -> TrialState | None:
        """What became of a trial; None if it is to be made (again): not begun, or damaged."""
        path = self.path / f"{trial.path}.json"
        if not is_regular(path):
            return None
        try:
            content = read_json(path)
            state = TrialState(**content)
            text(state.error, "error")
            for stage, seconds in state.seconds.items():
                number(seconds, stage, 0, _LONGEST)
            if state.status == "failed":
                return state
            data = read_bytes(self.image_path(trial), _LARGEST_IMAGE, "image")
        except (EasyRefError, TypeError, AttributeError):
            return None
        if state.status != "done" or hashlib.sha256(data).hexdigest() != state.sha256:
            return None
        return state

    def image(self, trial: Trial) -> Image.Image:
        """A finished image, RGB.

        Raises:
            EasyRefError: missing or damaged.
        """
        return open_picture(self.image_path(trial))

    def read_trials(self) -> list[Trial]:
        """The trials of a run that was begun.

        Raises:
            EasyRefError: there is none, or its list is damaged.
        """
        content = self.read_json(TRIALS)
        try:
            return [trial_from_plain(item, self.path) for item in content]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise EasyRefError(
                f"{shown(self.path / TRIALS, 300)} is damaged ({one_line(error)}). Give the "
                "command of the run again to write it anew."
            ) from error
