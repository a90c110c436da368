"""A temporary ComfyUI server with this pack installed.

    with ComfyServer(find_comfyui(), Path("somewhere")) as server:
        run = server.run(prompt)
        server.pictures(run, node)[0].save("result.png")

The server keeps everything (input, output, models, settings) below the given folder; the user's
own ComfyUI is only read.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .comfy_client import ComfyClient, ComfyUIError
from .find_comfyui import PACK

PACK_NAME = "easyref"

_FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")
_NOT_NEEDED = (".git", ".venv*", "tests", "benchmarks", "runs", "out", "__pycache__", ".*_cache")
_TAIL_LINES = 30
_STOP_SECONDS = 10


class ComfyServer(ComfyClient):
    """A server process and its client; it runs inside `with`.

    Args:
        comfyui: ComfyUI's source folder.
        base: folder for the server's files; created if need be.
        port: port on the loopback interface; None for a free one.
        arguments: more options for ComfyUI's main.py. "--cpu" is added where PyTorch finds no
            other device.
        seconds: time limit for starting.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        port: int | None = None,
        arguments: Sequence[str] = (),
        seconds: float = 120,
    ) -> None:
        self.port = port or _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", self._check)
        self.comfyui = comfyui
        self.base = base.resolve()
        self._arguments = list(arguments)
        self._seconds = seconds
        self._log_file = self.base / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """Output of the server since its last start."""
        try:
            return self._log_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            ComfyUIError: it ended or did not answer in time; the end of its log is in the text.
        """
        for folder in _FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        _place_pack(self.base / "custom_nodes" / PACK_NAME)
        command = [sys.executable, "main.py", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        command += ["--base-directory", str(self.base), *self._arguments]
        if "--cpu" not in command and not _has_accelerator():
            command.append("--cpu")
        # Idle threads must sleep: spinning ones make a busy computer ten times slower.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        environment.pop("PYTHONPATH", None)  # the pack must run without what is on our own path
        with self._log_file.open("wb") as log:
            # In a session of its own, Ctrl-C reaches only this process, which then stops it.
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Stop and start; ComfyUI's caches are empty afterwards."""
        self.stop()
        self.start()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            self._check()
            try:
                self.get("/system_stats")
                return
            except ComfyUIError:
                time.sleep(0.1)
        raise ComfyUIError(
            f"ComfyUI was not ready after {self._seconds:.0f} seconds. {self._log_end()}"
        )

    def _check(self) -> None:
        if self._process is None:
            raise ComfyUIError("The ComfyUI server is not running.")
        status = self._process.poll()
        if status is not None:
            raise ComfyUIError(f"ComfyUI ended with status {status}. {self._log_end()}")

    def _log_end(self) -> str:
        lines = self.log.splitlines()[-_TAIL_LINES:]
        return "The end of its log:\n" + "\n".join(lines)


def _place_pack(target: Path) -> None:
    """Link this pack at `target`, or copy it where links are not allowed."""
    if target.is_symlink() and target.resolve() != PACK:
        target.unlink()
    if target.exists():
        return
    try:
        target.symlink_to(PACK, target_is_directory=True)
    except OSError:
        shutil.copytree(PACK, target, ignore=shutil.ignore_patterns(*_NOT_NEEDED))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_accelerator() -> bool:
    """Whether PyTorch finds a device that ComfyUI would use by default."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
