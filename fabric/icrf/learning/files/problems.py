"""The one form of complaint about a data file."""

from __future__ import annotations

from pathlib import Path

from icrf.errors import ConfigError


def unreadable(path: Path, problem: str, *, expected: str, hint: str = "") -> ConfigError:
    """C015: `path` is missing or is not what it should be.

    Args:
        problem: what is wrong with it.
        expected: what was looked for.
    """
    return ConfigError("C015", problem, place="data_dir", value=str(path), allowed=expected, hint=hint)


def not_set(*, expected: str, hint: str = "") -> ConfigError:
    """C016: the configuration has no ``data_dir``."""
    return ConfigError("C016", "data_dir is missing", place="data_dir", allowed=expected, hint=hint)


def require_folder(data_dir: str, *, expected: str, hint: str) -> Path:
    """The folder of the configuration's ``data_dir``; C016 if that is not set, C015 if there is none."""
    folder = Path(data_dir)
    if not data_dir:
        raise not_set(expected=expected, hint=hint)
    if not folder.is_dir():
        raise unreadable(folder, "no such folder", expected=expected, hint=hint)
    return folder
