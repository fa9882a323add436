"""Other edges under a new generation: what was, is refused by the topology manager, and mail that was sent is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from icrf import values
from icrf.errors import IcrfError
from icrf.exchange import GATHERED, MESSAGE, UPDATE
from icrf.federation.message import Message
from icrf.ports import PayloadHeader
from icrf.protocol import DECENTRALIZED, Activate, NodeSpec, PeerAddress, Relink, Rows, TensorSpec
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.postings import Posting
from icrf_agent.topology_manager import HybridTopologyManager

# A line n0 - n1 - n2 - n3 over two clusters: n0 and n1 are "here", n2 and n3 "there".
LINE = ((0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2))
# n0 - n2 in the place of n1 - n2.
OTHER = ((0, 1), (1, 0), (0, 2), (2, 0), (2, 3), (3, 2))


ACTIVATION = Activate(
    run_id="run",
    generation=1,
    federation="fed",
    config_json="{}",
    flow=DECENTRALIZED,
    nodes=tuple(NodeSpec(f"n{i}", "train") for i in range(4)),
    graph=HybridAdjacencyMatrix.from_edges(4, LINE).to_graph(),
    layout=(TensorSpec("w", (2, 2), "float32"),),
    clusters=("here", "there"),
    assignment=(0, 0, 1, 1),
    peers=(PeerAddress("here", ""), PeerAddress("there", "")),
    num_slots=1,
    rows=Rows(gathered=3),
)


def manager_of(cluster: str = "here") -> HybridTopologyManager:
    manager = HybridTopologyManager(cluster, InlineReferences())
    manager.link(ACTIVATION)
    manager.begin_round("run", 1, 1, 1)
    return manager


def posting(kind: str, senders: Sequence[int], array: np.ndarray) -> Posting:
    return Posting("run", 1, 1, 1, kind, tuple(senders), array)


def header(kind: str, sender: int = -1, **more: Any) -> PayloadHeader:
    fields = {
        "generation": 1,
        "round": 1,
        "attempt": 1,
        "dtype": "float32",
        "num_elements": 4,
        "source": "there",
        **more,
    }
    return PayloadHeader(run_id="run", kind=kind, sender=sender, target="here", **fields)


def bundle(*letters: tuple[int, int, Sequence[int], str]) -> bytes:
    """(sender, sequence, recipients, header) of letters as they come from another cluster."""
    return values.encode([[s, q, list(to), Message(text, f"n{s}").encode()] for s, q, to, text in letters])


def fails(code: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(IcrfError) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value


def relink(generation: int = 2) -> Relink:
    return Relink("run", generation, HybridAdjacencyMatrix.from_edges(4, OTHER).to_graph())


def test_after_a_new_graph_everything_of_the_old_generation_is_refused() -> None:
    manager = manager_of()
    manager.relink(relink())
    fails("P003", manager.deliver, header(UPDATE, 2), np.ones(4))
    fails("P003", manager.deliver_letters, header(MESSAGE, dtype="uint8"), bundle((2, 1, [1], "late")))
    fails("P003", manager.publish_many, posting(UPDATE, [0, 1], np.ones((2, 4))))
    fails("P003", manager.begin_round, "run", 1, 2, 1)
    fails("P003", manager.relink, relink(1))
    assert manager.linked() == {"run": (2, 1, 1)}


def test_a_new_graph_decides_who_may_talk_to_whom() -> None:
    manager = manager_of()
    manager.publish("run", Message("old way", "n1"), "n2")
    manager.relink(relink())
    manager.relink(relink())
    manager.begin_round("run", 2, 2, 1)
    fails("P011", manager.publish, "run", Message("old way", "n1"), "n2")
    assert manager.publish("run", Message("new way", "n0"), "n2") == 1
    assert manager.get_neighbors("run", "n0") == ["n1", "n2"]
    news = {"generation": 2, "round": 2}
    fails("P011", manager.deliver, header(UPDATE, 3, **news), np.ones(4))
    assert manager.deliver(header(UPDATE, 2, **news), np.ones(4))
    late = header(MESSAGE, dtype="uint8", **news)
    fails("P011", manager.deliver_letters, late, bundle((2, 1, [1], "old way")))
    assert manager.deliver_letters(late, bundle((2, 1, [0], "new way")))


def test_mail_that_was_sent_along_the_old_graph_is_read_after_the_new_one() -> None:
    manager = manager_of()
    manager.publish("run", Message("from here", "n0"), "n1")
    manager.deliver_letters(header(MESSAGE, dtype="uint8"), bundle((2, 1, [1], "from there")))
    manager.relink(relink())
    manager.begin_round("run", 2, 2, 1)
    assert [letter.header for letter in manager.sync("run", "n1")] == ["from here", "from there"]


def test_a_run_that_is_not_here_is_not_linked_anew() -> None:
    fails("P003", HybridTopologyManager("here", InlineReferences()).relink, relink())


def test_the_rows_of_all_hosts_leave_as_one_and_must_be_as_many_as_there_are_nodes() -> None:
    there = manager_of("there")
    for node in (3, 2):
        there.publish_many(posting(GATHERED, [node], np.full((1, 3), float(node), np.float32)))
    sent = there.cluster_posting("run", 1, 1, GATHERED)
    assert sent.senders == (2, 3) and sent.reference.tolist() == [[2.0] * 3, [3.0] * 3]
    manager = manager_of()
    rows = {"dtype": "float32", "num_elements": 6}
    fails("W010", manager.deliver, header(GATHERED, num_elements=3), np.ones(3))
    fails("W010", manager.deliver, header(GATHERED, dtype="float64", num_elements=6), np.ones(6))
    fails("P010", manager.deliver, header(GATHERED, source="here", **rows), np.ones(6))
    assert manager.deliver(header(GATHERED, **rows), np.ones(6))
    assert [p.senders for p in manager.collect("run", 1, 1, GATHERED)] == [(2, 3)]
