"""Frames come and go by the thousand: their memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from icrf.wire.allocator import keep_freed_frames

FRAMES, TIMES, PAGES = 8, 100, 256
CHILD = f"""
import resource, sys
from icrf.wire.allocator import keep_freed_frames

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

assert len(sys.argv) == 1 or keep_freed_frames()
before = faults()
for _ in range({TIMES}):
    frames = [b"x" * (1 << 20) for _ in range({FRAMES})]
    del frames
print(faults() - before)
"""


def faults(*arguments: str) -> int:
    """Page faults of a process of its own: what is set there cannot be taken back."""
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    return int(child.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_the_memory_of_frames_is_used_again() -> None:
    once = FRAMES * PAGES
    assert faults("keep") < 3 * once
    assert faults() > 10 * once, "nothing has to be told to this allocator"


def test_another_platform_does_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_frames()
