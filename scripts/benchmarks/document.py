"""The parts of a document that a script writes: they lie between two marks, and everything around them is people's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_END = "<!-- end of what was measured -->"


def _split(path: Path, script: str) -> tuple[str, str, str]:
    """What is before the part of `script`, in it, and after it, the marks with what is around them."""
    begin = f"<!-- measured by {script} -->"
    before, opened, rest = path.read_text(encoding="utf-8").partition(begin)
    inside, closed, after = rest.partition(_END)
    if not opened or not closed:
        raise ValueError(f"{path} has no '{begin}' with '{_END}' after it")
    return before + begin, inside, _END + after


def read_part(path: Path, script: str) -> str:
    """What the script has written the last time.

    Raises:
        ValueError: the document has no place for it.
    """
    return _split(path, script)[1].strip()


def write_part(path: Path, script: str, text: str) -> None:
    """Replace it.

    Raises:
        ValueError: the document has no place for it.
    """
    before, _, after = _split(path, script)
    path.write_text(f"{before}\n\n{text}\n\n{after}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
