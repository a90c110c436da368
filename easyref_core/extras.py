"""Optional dependencies, by the extra that installs them."""

from __future__ import annotations

from importlib import import_module

from .errors import EasyRefError


def require_extra(what: str, extra: str, *modules: str) -> None:
    """
    Raises:
        EasyRefError: a module of an extra is not installed.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise EasyRefError(
                f"{what} needs {error.name or module}, which is not installed. Install the extra "
                f"{extra}, in the folder of the project: pip install -e '.[{extra}]'"
            ) from error
