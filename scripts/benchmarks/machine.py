"""On what something was measured: the machine, the versions and the command, in a sentence each."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


def circumstances(command: str, versions: Iterable[Mapping[str, str]], load: float) -> str:
    """The machine with its load average before, all versions that were found, and the command with its arguments."""
    found: dict[str, set[str]] = {}
    for some in versions:
        for name, version in some.items():
            found.setdefault(name, set()).add(version)
    shown = ", ".join(f"{name} {' and '.join(sorted(some))}" for name, some in sorted(found.items()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, load {load:.1f} before"
    return f"Machine: {machine}. Versions: {shown}. Command: `{shlex.join([*command.split(), *sys.argv[2:]])}`."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
