"""Numbers and names as people read them. Pure functions, no terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_BLOCKS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MISSING = "–"


def safe_text(text: str) -> str:
    """Text from elsewhere without control characters: no escape sequence reaches a terminal or a report."""
    return _CONTROL.sub("\ufffd", text)


def format_bytes(num_bytes: float) -> str:
    """``39.1 KiB``; exact below one KiB."""
    if num_bytes < 1024:
        return f"{int(num_bytes)} B"
    value = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def saved_text(summary: Mapping[str, Any]) -> str:
    """What a codec has saved, of a summary that says so: ``saved 3.1 MiB (42.0 %)``."""
    saved, sent = int(summary["bytes_saved"]), int(summary["bytes_inter_cluster"])
    share = 100 * saved / (saved + sent) if saved + sent else 0.0
    return f"saved {format_bytes(saved)} ({share:.1f} %)"


def format_duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 03 min``."""
    if seconds < 9.995:
        return f"{max(0.0, seconds):.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_clock(seconds: float) -> str:
    """A time that is still running, in whole seconds: ``12 s``, ``3 min 05 s``."""
    return f"{max(0, int(seconds))} s" if seconds < 60 else format_duration(seconds)


def format_age(seconds: float) -> str:
    """``just now``, ``5 min ago``, ``3 days ago``."""
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = int(seconds // size)
            plural = "s" if unit == "day" and count > 1 else ""
            return f"{count} {unit}{plural} ago"
    return "just now" if seconds < 10 else f"{int(seconds)} s ago"


def format_metric(value: float | None, digits: int = 4) -> str:
    """A loss or an accuracy; an en dash where there is none."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3e}"


def format_count(count: int, noun: str) -> str:
    """``1 node``, ``2,000 nodes``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_id(run_id: str) -> str:
    """The part of a run id that people type and folders are named by."""
    return run_id[:8]


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The last `width` values as block characters, scaled to their own range."""
    recent = [v for v in values if math.isfinite(v)][-width:]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((v - low) / span * (len(_BLOCKS) - 1))] for v in recent)


def compress_names(names: Iterable[str], limit: int = 6) -> str:
    """``server, client_0…client_9``: runs of numbered names folded, at most `limit` parts."""
    parts: list[tuple[str, int, int]] = []
    for name in names:
        match = re.fullmatch(r"(.*?)(\d{1,9})", name)
        stem, number = (match.group(1), int(match.group(2))) if match else (name, -1)
        if parts and number >= 0 and parts[-1][0] == stem and parts[-1][2] == number - 1:
            parts[-1] = (stem, parts[-1][1], number)
        else:
            parts.append((stem, number, number))
    words = []
    for stem, first, last in parts:
        if first < 0:
            words.append(stem)
        elif first == last:
            words.append(f"{stem}{first}")
        else:
            words.append(f"{stem}{first}…{last}" if last > first + 1 else f"{stem}{first}, {stem}{last}")
    shown = words[:limit]
    return ", ".join(shown) + (f", … ({len(words) - limit} more)" if len(words) > limit else "")


def clean_json(value: Any) -> Any:
    """The value with NaN and infinities as null: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): clean_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(v) for v in value]
    return value
