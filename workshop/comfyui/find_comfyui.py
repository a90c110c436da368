"""Finds a ComfyUI on this computer, or installs one with comfy-cli.

Used by the demo and the tests; nothing here imports ComfyUI.

    python -m workshop.comfyui.find_comfyui            print the folder, exit 1 if there is none
    python -m workshop.comfyui.find_comfyui --install  install one where there is none
    python -m workshop.comfyui.find_comfyui --version  print its version instead of the folder
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
_PROBE_SECONDS = 20
_INSTALL_SECONDS = 900


def workspace() -> Path:
    """Folder into which comfy-cli installs ComfyUI by default."""
    home = Path.home()
    base = home / "Documents" if sys.platform in ("darwin", "win32") else home
    return base / "comfy" / "ComfyUI"


def is_comfyui(folder: Path) -> bool:
    """Whether a folder is a ComfyUI source tree."""
    return (folder / "main.py").is_file() and (folder / "comfy" / "model_patcher.py").is_file()


def find_comfyui() -> Path | None:
    """`COMFYUI_PATH`, else the ComfyUI this pack is installed in, else the newest installed one.

    The installed ones are comfy-cli's workspace and the folders beside it. With a `COMFYUI_PATH`
    that is no ComfyUI the result is None, not another ComfyUI.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        folder = Path(chosen).expanduser().resolve()
        return folder if is_comfyui(folder) else None
    around = PACK.parent.parent if PACK.parent.name == "custom_nodes" else None
    if around is not None and is_comfyui(around):
        return around
    beside = sorted(workspace().parent.glob("*"), key=lambda folder: folder != workspace())
    # Of several with the same version, comfy-cli's own is first.
    return max(filter(is_comfyui, beside), key=_version_number, default=None)


def comfyui_version(folder: Path) -> str:
    """Version in a ComfyUI's source; "unknown" if there is none."""
    try:
        source = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", source)
    return match.group(1) if match else "unknown"


def _version_number(folder: Path) -> tuple[int, ...]:
    """A ComfyUI's version for comparisons; an unknown one is the oldest."""
    return tuple(map(int, re.findall(r"\d+", comfyui_version(folder))))


def install_comfyui() -> str | None:
    """Install the source of ComfyUI's latest release into comfy-cli's workspace.

    Its packages are left to the caller, because comfy-cli would choose other versions.

    Returns:
        None if it is installed, else the reason in one line.
    """
    # Otherwise comfy-cli creates a virtual environment in the workspace.
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "GIT_TERMINAL_PROMPT": "0"}
    problem = _probe(environment)
    if problem is None:
        target = workspace()
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry"]
        command += ["--workspace", str(target), "install", "--version", "latest"]
        # --cpu only chooses which PyTorch to install, and none is.
        command += ["--cpu", "--skip-manager", "--skip-torch-or-directml", "--skip-requirement"]
        problem = _run(command, environment, _INSTALL_SECONDS)
        if is_comfyui(target):
            return None
    return f"ComfyUI could not be installed: {problem or 'comfy-cli installed no ComfyUI'}"


def _probe(environment: Mapping[str, str]) -> str | None:
    """Why ComfyUI's repository is unreachable, with a short timeout: git retries for minutes."""
    try:
        from comfy_cli.constants import COMFY_GITHUB_URL
    except ImportError as error:
        return f"comfy-cli cannot be used ({error})"
    return _run(["git", "ls-remote", COMFY_GITHUB_URL, "HEAD"], environment, _PROBE_SECONDS)


def _run(command: list[str], environment: Mapping[str, str], seconds: float) -> str | None:
    """Run a command without input; None, or the reason of its failure in one line."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(environment),
            start_new_session=True,
        )
    except OSError as error:
        return f"{command[0]} cannot be run ({error.strerror})"
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"{command[0]} had not finished after {seconds:.0f} seconds"
    return None if process.returncode == 0 else _reason(output, process.returncode)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a command and its child processes; git then removes an incomplete clone."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def _reason(output: str, status: int) -> str:
    """The most informative line of a failed command's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" │╭╰─╮╯")]
    fatal = [line for line in lines if line.startswith(("fatal:", "ERROR:", "error:"))]
    return (fatal or lines or [f"exit status {status}"])[-1]


def main() -> int:
    found = find_comfyui()
    problem = None
    chosen = os.environ.get("COMFYUI_PATH")
    if found is None and chosen:
        problem = f"There is no ComfyUI in COMFYUI_PATH ({chosen})."
    elif found is None and "--install" in sys.argv[1:]:
        problem = install_comfyui()
        found = find_comfyui()
    if found is None:
        print(problem or "No ComfyUI found; set COMFYUI_PATH to its folder.", file=sys.stderr)
        return 1
    print(comfyui_version(found) if "--version" in sys.argv[1:] else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
