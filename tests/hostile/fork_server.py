"""Functions run in forked children, with limits on memory and time, and what they took is measured.

The server imports torch and, where asked, ComfyUI with the pack once; a child costs some ten
milliseconds. A child that crashes, hangs or fills the memory takes nothing with it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MB = 1_000_000
MOST_MB = 1_000  # of memory; a child that takes more is killed
MOST_WAITING = 10  # seconds


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    Attributes:
        kind: "done"; "refused" with an EasyRefError; "raised" something else; "killed" by the
            limits; "died" of a signal.
        text: the message, with the traceback where it is not an EasyRefError.
        value: what the function returned.
        peak: megabytes beyond what the child started with.
        cpu: seconds of computing.
        wall: seconds that passed, which depends on what else the computer does.
    """

    kind: str
    text: str
    value: Any
    peak: float
    cpu: float
    wall: float


class ForkServer:
    """Starts the server and hands it functions of `entry_points`.

    Args:
        arguments: of this file.
        log: where all children's output goes.
    """

    def __init__(self, log: Path, *arguments: str) -> None:
        paths = [HERE, HERE.parent, HERE.parent / "comfy", HERE.parents[1]]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",  # threads do not survive a fork
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=log.parent,
        )
        if not self._process.stdout.readline():
            raise RuntimeError(f"the fork server did not start: {log.read_text()[-3000:]}")

    def run(
        self, function: str, *arguments: Any, mapped: int = 0, seconds: float = 30, **more: Any
    ) -> Outcome:
        """Run a function of `entry_points`, or of a module that is named, in a child.

        Args:
            arguments, more: plain values.
            mapped: megabytes of address space that large files may take beyond the usual.
            seconds: of computing, after which it is killed.
        """
        request = {"function": function, "arguments": [str(a) for a in arguments], "more": more}
        request |= {"space": MOST_MB + mapped, "seconds": seconds}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the fork server ended")
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()


def _serve(answers: Any) -> None:
    for line in sys.stdin:
        answers.write(json.dumps(_in_child(json.loads(line))) + "\n")
        answers.flush()


def _in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say what became of it."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(request, writing)
    os.close(writing)
    started = _status(child).get("VmRSS", 0)  # a quick child has ended by now
    answer, killed, peak = b"", "", 0.0
    computed, active = 0.0, start
    while True:
        ready, _, _ = select.select([reading], [], [], 0.01)
        now = time.monotonic()
        if ready:
            part = os.read(reading, 1 << 16)
            answer += part
            if not part:
                break
        peak = max(peak, _status(child).get("VmRSS", 0) - started)
        before, (computed, sleeps) = computed, _activity(child)
        if computed > before or not sleeps:
            active = now
        if computed > request["seconds"]:
            killed = f"still computing after {computed:.0f} seconds"
        elif now - active > MOST_WAITING:
            killed = f"waited for {MOST_WAITING} seconds for what does not come"
        elif peak > MOST_MB:
            killed = f"took {peak:.0f} MB"
        if killed:
            _end(child)
            break
    os.close(reading)
    _, state, used = os.wait4(child, 0)
    outcome = {
        "kind": "died",
        "text": "",
        "value": None,
        "peak": peak,
        "cpu": used.ru_utime + used.ru_stime,
        "wall": time.monotonic() - start,
    }
    if killed:
        return outcome | {"kind": "killed", "text": killed}
    if os.WIFSIGNALED(state):
        return outcome | {"text": f"signal {signal.Signals(os.WTERMSIG(state)).name}"}
    try:
        return outcome | json.loads(answer)
    except ValueError:
        return outcome | {"text": f"exit status {state >> 8} after {answer[:200]!r}"}


def _activity(child: int) -> tuple[float, bool]:
    """Seconds of computing so far, and whether it sleeps now. On a busy computer a child that
    computes may not run for a while; one that waits for a pipe sleeps."""
    try:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, False
    ticks = sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK"), fields[0] == "S"


def _end(child: int) -> None:
    """Kill a child with all that it started."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)


def _run(request: dict[str, Any], writing: int) -> None:
    """The child's part; never returns."""
    os.setpgid(0, 0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = _status("self")
    limit = int(before["VmSize"] + request["space"]) * MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Programs that a case brings, such as a Ghostscript that leaves a mark.
    home = request["arguments"][0]
    os.environ["PATH"] = os.pathsep.join((f"{home}/programs", os.environ["PATH"]))
    try:
        module, _, name = request["function"].rpartition(".")
        function = getattr(import_module(module or "entry_points"), name)
        value = function(*request["arguments"], **request["more"])
        result = {"kind": "done", "value": value}
    except Exception as error:
        ours = any(kind.__name__ == "EasyRefError" for kind in type(error).__mro__)
        text = str(error) if ours else f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        result = {"kind": "refused" if ours else "raised", "text": text}
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    result["peak"] = max(0.0, _status("self")["VmHWM"] - before["VmRSS"])
    with os.fdopen(writing, "wb") as answer:
        answer.write(json.dumps(result).encode())
    sys.stderr.flush()
    os._exit(0)


def _status(process: int | str) -> dict[str, float]:
    """Sizes of a process in megabytes; none once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith("Vm"))
    return {name: int(size.split()[0]) * 1024 / MB for name, size in pairs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", help="folder of a ComfyUI, to load the pack into")
    parser.add_argument("--base", help="its base directory")
    parser.add_argument("--training", action="store_true", help="import what training needs")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import entry_points

    entry_points.prepare(options.comfyui, options.base, options.training)
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    answers.flush()
    _serve(answers)


if __name__ == "__main__":
    main()
