"""What travels along with a call on a Ray cluster, and what goes through its object store."""

from __future__ import annotations

import numpy as np
import pytest

from icrf.exchange import CONSENSUS, GATHERED, MERGED, MODEL, PARTIAL, UPDATE
from icrf_agent import ray_actors

SMALL, LARGE = np.zeros(100, np.float32), np.zeros(100_000, np.float32)


@pytest.mark.parametrize("kind", [MODEL, PARTIAL, UPDATE, MERGED, CONSENSUS, GATHERED])
def test_only_what_few_hosts_make_travels_along(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    stored: list[object] = []
    monkeypatch.setattr(ray_actors.ray, "put", stored.append)
    references = ray_actors.RayReferences()
    # Every host is handed what all hosts of its cluster have made: of updates, that grows with the nodes.
    along = references.put(SMALL, kind)
    assert (along is not None) == (not stored) == (kind in (MODEL, PARTIAL))
    if along is not None:
        assert along is not SMALL and references.get([along]) is along
    assert references.put(LARGE, kind) is None and stored[-1] is LARGE
