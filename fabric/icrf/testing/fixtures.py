"""Fixtures for pytest: put ``pytest_plugins = ["icrf.testing.fixtures"]`` into your ``conftest.py``.

They are not registered as a plugin by themselves: pytest would load them everywhere, and starting a fabric takes
seconds that a test should ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from icrf.testing.environment import FabricEnvironment


@pytest.fixture(scope="module")
def fabric_environment() -> Iterator[FabricEnvironment]:
    """A supervised fabric of two clusters with one slot each, for the tests of a module."""
    # Loads the agent's code and gRPC: only when a test asks.
    from icrf.testing.environment import FabricEnvironment  # noqa: PLC0415

    with FabricEnvironment(2, slots=1, supervise=True) as environment:
        yield environment
