"""One supervised fabric of two real Ray clusters for all fault tests.

Every test runs a federation, kills something in the middle and wants the bits of the undisturbed run. With
``ICRF_RECOVERY_TABLE=FILE`` what was measured is written into FILE, see ``scripts/bench-recovery``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from icrf.testing import FabricEnvironment

from .bench import Bench

HEADER = ("fault", "what the user saw", "told after", "next round after")


@pytest.fixture(scope="package")
def bench(write_table: Callable[..., None]) -> Iterator[Bench]:
    with FabricEnvironment(2, slots=1, supervise=True) as environment:
        found = Bench(environment)
        yield found
        write_table("ICRF_RECOVERY_TABLE", "scripts/bench-recovery", HEADER, found.rows)
