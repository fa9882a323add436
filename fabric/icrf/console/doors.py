"""How commands get at a fabric: what ``fabric`` opens for them, and tests replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from icrf.client import LocalHandle
    from icrf.ports import MediatorPort
    from icrf.protocol import Plan, Submission


class Doors(Protocol):
    """The ways in that a command may need."""

    @property
    def remote(self) -> Callable[[str, Path | None], MediatorPort]:
        """The mediator at an address, called with the certificate of a folder; None: in plaintext."""

    @property
    def local(self) -> Callable[[int, Path | None, Callable[[str], None]], LocalHandle]:
        """A fabric of so many local clusters, with its state in a folder, and where progress is told."""

    @property
    def plan_local(self) -> Callable[[Submission, int], Plan]:
        """What so many local clusters would make of a federation."""

    @property
    def wall_s(self) -> Callable[[], float]:
        """Seconds since 1970."""
