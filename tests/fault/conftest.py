"""One supervised fabric of two real Ray clusters for all fault tests.

Every test runs a federation, kills something in the middle and wants the bits of the undisturbed run. With
``ICRF_RECOVERY_TABLE=FILE`` what was measured is written into FILE, see ``scripts/bench-recovery``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from icrf.testing import FabricEnvironment

from .bench import Bench, write_table

TABLE_VARIABLE = "ICRF_RECOVERY_TABLE"


@pytest.fixture(scope="package")
def bench() -> Iterator[Bench]:
    with FabricEnvironment(2, slots=1, supervise=True) as environment:
        found = Bench(environment)
        yield found
        if path := os.environ.get(TABLE_VARIABLE):
            write_table(Path(path), found.rows)
