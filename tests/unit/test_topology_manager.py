"""Routing is enforced on every message, mail is bulk-synchronous, and nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icrf import values
from icrf.errors import IcrfError, ProtocolError, RoutingError
from icrf.exchange import CONSENSUS, MESSAGE, MODEL, PARTIAL, UPDATE
from icrf.federation.message import Message
from icrf.ports import PayloadHeader
from icrf.protocol import CENTRALIZED, DECENTRALIZED, Activate, NodeSpec, PeerAddress, TensorSpec
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.postings import Posting
from icrf_agent.room import TopologyManager
from icrf_agent.topology_manager import HybridTopologyManager

# A line n0 - n1 - n2 - n3 over two clusters: n0 and n1 are "here", n2 and n3 "there".
LINE = ((0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2))
# n0 aggregates; n1 trains here, n2 and n3 there.
STAR = ((0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (3, 0))


def activation_of(
    flow: str = DECENTRALIZED, edges: Sequence[tuple[int, int]] = LINE, *, generation: int = 1, run_id: str = "run"
) -> Activate:
    roles = ["aggregate", "train", "train", "train"] if flow == CENTRALIZED else ["train"] * 4
    return Activate(
        run_id=run_id,
        generation=generation,
        federation="fed",
        config_json="{}",
        flow=flow,
        nodes=tuple(NodeSpec(f"n{i}", role) for i, role in enumerate(roles)),
        graph=HybridAdjacencyMatrix.from_edges(4, edges).to_graph(),
        layout=(TensorSpec("w", (2, 2), "float32"),),
        clusters=("here", "there"),
        assignment=(0, 0, 1, 1),
        peers=(PeerAddress("here", ""), PeerAddress("there", "")),
        num_slots=1,
    )


def manager_of(activation: Activate | None = None, cluster: str = "here") -> HybridTopologyManager:
    manager = HybridTopologyManager(cluster, InlineReferences())
    manager.link(activation or activation_of())
    manager.begin_round("run", 1, 1, 1)
    return manager


def posting(kind: str, senders: Sequence[int], recipients: Sequence[int] | None = None, **more: Any) -> Posting:
    fields = {"run_id": "run", "generation": 1, "round": 1, "attempt": 1, **more}
    to = None if recipients is None else tuple(recipients)
    return Posting(kind=kind, senders=tuple(senders), reference=np.ones(4), recipients=to, **fields)


def header(kind: str, sender: int, source: str = "there", **more: Any) -> PayloadHeader:
    dtype = "float32" if kind in (MODEL, UPDATE) else "float64"
    fields = {"generation": 1, "round": 1, "attempt": 1, "dtype": dtype, "num_elements": 4, **more}
    return PayloadHeader(run_id="run", kind=kind, sender=sender, source=source, target="here", **fields)


def bundle(*letters: tuple[int, int, Sequence[int], str]) -> bytes:
    """(sender, sequence, recipients, header) of letters as they come from another cluster."""
    return values.encode([[s, q, list(to), Message(text, f"n{s}").encode()] for s, q, to, text in letters])


def heard(manager: HybridTopologyManager, node_id: str) -> list[str]:
    return [message.header for message in manager.sync("run", node_id)]


def fails(code: str, call: Any, *arguments: Any) -> IcrfError:
    with pytest.raises(IcrfError) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value
    return caught.value


# ---------------------------------------------------------------- the room of one federation


def test_a_room_knows_its_neighbours_and_delivers_at_once() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b", "c"], np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]]))
    assert room.get_neighbors("a") == ["b", "c"]
    assert room.publish(Message("hi", "a")) == 2
    assert room.publish(Message("only you", "a"), "b") == 1
    assert [m.header for m in room.sync("b")] == ["hi", "only you"]
    assert room.sync("b") == []
    assert [m.header for m in room.sync("c")] == ["hi"]


def test_a_room_is_linked_by_the_name_of_a_topology() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b", "c", "d"], "ring")
    assert room.get_neighbors("a") == ["b", "d"]


def test_a_graph_of_another_size_is_refused() -> None:
    assert fails("P001", TopologyManager().link_nodes, ["a"], np.zeros((2, 2)))


def test_publishing_along_a_non_edge_reaches_nobody() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b", "c"], np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]]))
    error = fails("P011", room.publish, Message("hi", "a"), ["b", "c"])
    assert "a -> c" in str(error)
    assert room.sync("b") == [] and room.sync("c") == []
    stats = room.get_stats()
    assert (stats["published"], stats["rejected"], stats["waiting"]) == (0, 1, 0)


def test_a_node_cannot_send_to_itself_or_to_nobody() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b"], np.array([[0, 1], [1, 0]]))
    fails("P011", room.publish, Message("hi", "a"), "a")
    fails("P012", room.publish, Message("hi", "a"), "x")
    fails("P012", room.publish, Message("hi", "x"), "a")
    fails("P012", room.sync, "x")


def test_naming_a_recipient_twice_sends_once() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b"], np.array([[0, 1], [1, 0]]))
    assert room.publish(Message("hi", "a"), ["b", "b"]) == 1
    assert len(room.sync("b")) == 1


def test_mail_is_read_by_sender_index_and_then_in_order_of_sending() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b", "c", "d"], np.array([[0, 0, 0, 1]] * 3 + [[0, 0, 0, 0]]))
    for sender, text in (("c", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("c", "5")):
        room.publish(Message(text, sender))
    assert [m.header for m in room.sync("d")] == ["2", "4", "3", "1", "5"]


# ---------------------------------------------------------------- messages of nodes


def test_a_message_along_a_non_edge_names_both_nodes_and_reaches_nobody() -> None:
    manager = manager_of()
    error = fails("P011", manager.publish, "run", Message("hi", "n1"), ["n0", "n3"], (1, 1))
    assert "n1" in str(error) and "n3" in str(error)
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n0") == []
    assert manager.outbox("run", (1, 1)) == {}
    assert manager.get_stats("run")["rejected"] == 1


def test_a_node_of_another_cluster_cannot_speak_here() -> None:
    error = fails("P010", manager_of().publish, "run", Message("hi", "n2"), "n1", (1, 1))
    assert "n2" in str(error) and "there" in str(error)


def test_what_is_sent_in_a_round_is_readable_from_the_next_one_on() -> None:
    manager = manager_of()
    manager.publish("run", Message("one", "n0"), None, (1, 1))
    assert heard(manager, "n1") == []
    manager.begin_round("run", 1, 2, 1)
    manager.publish("run", Message("two", "n0"), None, (2, 1))
    assert heard(manager, "n1") == ["one"]
    assert heard(manager, "n1") == []
    manager.begin_round("run", 1, 3, 1)
    assert heard(manager, "n1") == ["two"]


def test_messages_across_clusters_are_readable_in_the_same_round_as_local_ones() -> None:
    here, there = manager_of(), manager_of(cluster="there")
    assert here.publish("run", Message("hi", "n1"), ["n0", "n2"], (1, 1)) == 2
    ((cluster, (number, letters)),) = here.outbox("run", (1, 1)).items()
    assert cluster == 1
    assert here.outbox("run", (1, 1)) == {1: (number, letters)}, "until it is acknowledged"
    here.acknowledge("run", (1, 1), 1, number)
    assert here.outbox("run", (1, 1)) == {}
    assert there.deliver_letters(header(MESSAGE, -1, "here"), letters)
    for manager, node in ((here, "n0"), (there, "n2")):
        assert heard(manager, node) == []
        manager.begin_round("run", 1, 2, 1)
        assert heard(manager, node) == ["hi"]


def test_letters_that_come_before_this_cluster_began_the_round_wait_for_its_end() -> None:
    manager = manager_of()
    manager.deliver_letters(header(MESSAGE, -1, round=2), bundle((2, 1, [1], "early")))
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == []
    manager.begin_round("run", 1, 3, 1)
    assert heard(manager, "n1") == ["early"]


def test_messages_of_an_aborted_attempt_vanish() -> None:
    manager = manager_of()
    manager.publish("run", Message("local", "n0"), None, (1, 1))
    manager.publish("run", Message("remote", "n1"), "n2", (1, 1))
    manager.deliver_letters(header(MESSAGE, -1), bundle((2, 1, [1], "delivered")))
    manager.abort("run", 1, 1)
    assert manager.outbox("run", (1, 1)) == {}
    fails("P003", manager.publish, "run", Message("late", "n0"), None, (1, 1))
    fails("P003", manager.deliver_letters, header(MESSAGE, -1), bundle((2, 2, [1], "late")))
    manager.begin_round("run", 1, 1, 2)
    manager.publish("run", Message("again", "n0"), None, (1, 2))
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == ["again"]


def test_messages_of_a_superseded_attempt_vanish_without_an_abort() -> None:
    manager = manager_of()
    manager.publish("run", Message("first", "n0"), None, (1, 1))
    manager.begin_round("run", 1, 1, 2)
    fails("P003", manager.publish, "run", Message("late", "n0"), None, (1, 1))
    manager.publish("run", Message("second", "n0"), None, (1, 2))
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == ["second"]


def test_a_repeated_round_finds_the_mail_that_its_first_attempt_has_read() -> None:
    manager = manager_of()
    manager.publish("run", Message("hi", "n0"), None, (1, 1))
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == ["hi"]
    manager.abort("run", 2, 1)
    manager.begin_round("run", 1, 2, 2)
    assert manager.sync("run", "n1", 0.0, (2, 1)) == [], "the abandoned attempt may not take it again"
    assert heard(manager, "n1") == ["hi"]
    manager.begin_round("run", 1, 3, 1)
    assert heard(manager, "n1") == []


def test_between_rounds_a_message_belongs_to_the_last_round() -> None:
    manager = manager_of()
    manager.publish("run", Message("called", "n1"), None)
    assert list(manager.outbox("run", (1, 1))) == [1]
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n0") == ["called"]


def test_letters_that_come_twice_are_delivered_once() -> None:
    manager = manager_of()
    letters = bundle((2, 1, [1], "one"), (2, 2, [1], "two"))
    assert manager.deliver_letters(header(MESSAGE, -1), letters)
    assert not manager.deliver_letters(header(MESSAGE, -1), letters)
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == ["one", "two"]


@pytest.mark.parametrize(
    ("code", "letter"),
    [
        ("P011", (3, 1, [1], "no edge n3 -> n1")),
        ("P010", (0, 1, [1], "n0 is not theirs")),
        ("P012", (-1, 1, [1], "nobody but the supervisor is -1")),
        ("P012", (9, 1, [1], "no such sender")),
        ("P012", (2, 1, [9], "no such recipient")),
        ("P012", (2, 1, [], "to nobody")),
        ("P010", (2, 1, [3], "n3 does not live here")),
    ],
)
def test_one_bad_letter_refuses_the_whole_bundle(code: str, letter: tuple[int, int, list[int], str]) -> None:
    manager = manager_of()
    fails(code, manager.deliver_letters, header(MESSAGE, -1), bundle((2, 1, [1], "good"), letter))
    manager.begin_round("run", 1, 2, 1)
    assert heard(manager, "n1") == []


@pytest.mark.parametrize("data", [b"", b"rubbish", values.encode([1, 2]), values.encode([["x"]]), values.encode(7)])
def test_malformed_letters_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="P001"):
        manager_of().deliver_letters(header(MESSAGE, -1), data)


def test_messages_of_the_supervisor_are_readable_at_once_in_the_order_they_were_sent() -> None:
    manager = manager_of()
    for text in ("a long first message", "2nd", "3"):
        manager.publish_supervisor("run", (0, 2), Message(text, "supervisor").encode())
    assert heard(manager, "n0") == ["a long first message", "2nd", "3"]
    assert manager.get_stats("run")["waiting"] == 0, "n2 does not live here"


def test_a_waiting_node_is_woken_by_its_own_message_only() -> None:
    manager = manager_of()
    found: list[str] = []
    waiter = threading.Thread(target=lambda: found.extend(m.header for m in manager.sync("run", "n1", 30.0)))
    waiter.start()
    manager.publish_supervisor("run", (0,), Message("not for you", "supervisor").encode())
    manager.publish_supervisor("run", (1,), Message("for you", "supervisor").encode())
    waiter.join(10.0)
    assert found == ["for you"]


def test_the_end_of_a_run_ends_the_waiting() -> None:
    manager = manager_of()
    caught: list[str] = []

    def wait() -> None:
        with pytest.raises(RoutingError) as error:
            manager.sync("run", "n1", 30.0)
        caught.append(error.value.code)

    waiter = threading.Thread(target=wait)
    waiter.start()
    manager.unlink("run")
    waiter.join(10.0)
    assert caught == ["P003"]


def test_many_threads_lose_no_message() -> None:
    manager = manager_of()

    def send(text: str) -> None:
        for k in range(50):
            manager.publish("run", Message(f"{text}{k}", "n0"), "n1", (1, 1))

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    manager.begin_round("run", 1, 2, 1)
    assert len(set(heard(manager, "n1"))) == 200


# ---------------------------------------------------------------- postings of hosts


def test_postings_are_collected_in_node_order_and_once() -> None:
    manager = manager_of()
    manager.publish_many(posting(UPDATE, [1]))
    manager.publish_many(posting(UPDATE, [0]))
    manager.publish_many(posting(UPDATE, [0]))
    assert [p.senders for p in manager.collect("run", 1, 1, UPDATE)] == [(0,), (1,)]
    assert manager.collect("run", 1, 2, UPDATE) == []
    assert manager.collect("run", 1, 1, MODEL) == []
    fails("P003", manager.collect, "nothing", 1, 1, MODEL)


def test_a_posting_along_a_non_edge_is_refused_as_a_whole() -> None:
    manager = manager_of(activation_of(CENTRALIZED, STAR))
    error = fails("P011", manager.publish_many, posting(PARTIAL, [0, 1], [0, 2]))
    assert "n1 -> n2" in str(error)
    assert manager.collect("run", 1, 1, PARTIAL) == []


def test_a_posting_for_nodes_of_another_cluster_is_refused() -> None:
    error = fails("P010", manager_of().publish_many, posting(UPDATE, [1, 2]))
    assert "n2" in str(error)


@pytest.mark.parametrize(
    "stale", [{"generation": 2}, {"run_id": "other"}, {"round": 0}, {"attempt": 0}], ids=lambda s: next(iter(s))
)
def test_stale_postings_are_refused(stale: dict[str, Any]) -> None:
    fails("P003", manager_of().publish_many, posting(UPDATE, [0], **stale))


def test_after_an_abort_nothing_of_the_attempt_is_kept_or_accepted() -> None:
    manager = manager_of()
    manager.publish_many(posting(UPDATE, [0]))
    manager.abort("run", 1, 1)
    fails("P003", manager.collect, "run", 1, 1, UPDATE)
    fails("P003", manager.publish_many, posting(UPDATE, [0]))
    fails("P003", manager.deliver, header(UPDATE, 2), np.ones(4))
    manager.begin_round("run", 1, 1, 2)
    manager.publish_many(posting(UPDATE, [0], attempt=2))
    assert manager.get_stats("run")["references"] == 1


def test_aborting_what_is_not_there_is_harmless() -> None:
    manager = manager_of()
    manager.abort("nothing", 1, 1)
    manager.abort("run", 7, 1)
    manager.unlink("nothing")


def test_the_partial_of_a_cluster_is_the_sum_of_its_hosts() -> None:
    manager = manager_of(activation_of(CENTRALIZED, STAR), "there")
    for node, value in ((3, 2.0), (2, 1.0)):
        one = posting(PARTIAL, [node], [0], weight=10 * node)
        manager.publish_many(replace(one, reference=np.full(4, value)))
    merged = manager.cluster_posting("run", 1, 1, PARTIAL)
    assert merged.senders == (2, 3) and merged.weight == 50
    assert merged.reference.tolist() == [3.0] * 4
    manager.abort("run", 1, 1)
    fails("P003", manager.cluster_posting, "run", 1, 1, PARTIAL)


# ---------------------------------------------------------------- payloads of other clusters


def test_a_payload_is_accepted_once_and_counts_as_its_senders_posting() -> None:
    manager = manager_of()
    assert manager.deliver(header(UPDATE, 2), np.ones(4))
    assert not manager.deliver(header(UPDATE, 2), np.zeros(4))
    (found,) = manager.collect("run", 1, 1, UPDATE)
    assert found.senders == (2,) and found.reference.tolist() == [1.0] * 4


def test_a_partial_speaks_for_all_participants_of_its_cluster() -> None:
    manager = manager_of(activation_of(CENTRALIZED, STAR))
    assert manager.deliver(header(PARTIAL, -1, recipients=(0,), weight=5), np.ones(4))
    (found,) = manager.collect("run", 1, 1, PARTIAL)
    assert found.senders == (2, 3) and found.weight == 5


def test_payloads_of_a_round_that_has_not_begun_here_wait() -> None:
    manager = manager_of()
    manager.deliver(header(UPDATE, 2, round=2), np.ones(4))
    manager.begin_round("run", 1, 2, 1)
    assert len(manager.collect("run", 2, 1, UPDATE)) == 1


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("P011", header(UPDATE, 3)),
        ("P010", header(UPDATE, 2, "elsewhere")),
        ("P010", header(UPDATE, 1, "there")),
        ("P012", header(UPDATE, 9)),
        ("P012", header(UPDATE, -1)),
        ("P003", header(UPDATE, 2, generation=2)),
        ("P003", header(UPDATE, 2, round=0)),
        ("P003", header(UPDATE, 2, attempt=0)),
        ("W010", header(UPDATE, 2, num_elements=5)),
        ("W010", header(UPDATE, 2, dtype="float64")),
        ("P010", header(CONSENSUS, -1, "elsewhere")),
        ("P010", header(CONSENSUS, -1, "here")),
        ("P001", header("gossip", -1)),
    ],
)
def test_a_payload_that_may_not_come_in_is_refused(code: str, bad: PayloadHeader) -> None:
    manager = manager_of()
    error = fails(code, manager.deliver, bad, np.ones(4))
    assert code != "P011" or ("n3" in str(error) and "here" in str(error))
    assert manager.get_stats("run")["references"] == 0


@pytest.mark.parametrize(("code", "recipients"), [("P012", ()), ("P011", (1,)), ("P010", (2,)), ("P012", (9,))])
def test_a_partial_must_be_for_the_aggregator(code: str, recipients: tuple[int, ...]) -> None:
    manager = manager_of(activation_of(CENTRALIZED, STAR))
    fails(code, manager.deliver, header(PARTIAL, -1, recipients=recipients), np.ones(4))


# ---------------------------------------------------------------- runs and what they leave


def test_references_do_not_pile_up_over_a_thousand_rounds() -> None:
    manager = manager_of()
    most = 0
    for number in range(1, 1001):
        manager.begin_round("run", 1, number, 1)
        manager.publish_many(posting(UPDATE, [0, 1], round=number))
        manager.deliver(header(UPDATE, 2, round=number), np.ones(4))
        manager.publish("run", Message("hi", "n1"), None, (number, 1))
        manager.outbox("run", (number, 1))
        heard(manager, "n0")
        stats = manager.get_stats("run")
        most = max(most, stats["references"], stats["waiting"])
    assert most == 2


def test_an_older_round_cannot_be_begun_again() -> None:
    manager = manager_of()
    manager.begin_round("run", 1, 2, 1)
    manager.publish_many(posting(UPDATE, [0], round=2))
    manager.begin_round("run", 1, 1, 9)
    assert len(manager.collect("run", 2, 1, UPDATE)) == 1
    fails("P003", manager.begin_round, "run", 2, 3, 1)


def test_linking_again_keeps_the_room_and_a_new_generation_replaces_it() -> None:
    manager = manager_of()
    manager.publish_many(posting(UPDATE, [0]))
    manager.link(activation_of())
    assert len(manager.collect("run", 1, 1, UPDATE)) == 1
    manager.link(activation_of(generation=2))
    assert manager.collect("run", 1, 1, UPDATE) == [] and manager.get_stats("run")["references"] == 0
    fails("P003", manager.publish_many, posting(UPDATE, [0]))


def test_unlinking_frees_everything_of_a_run_and_nothing_of_another() -> None:
    manager = manager_of()
    manager.link(activation_of(run_id="run2"))
    manager.publish_many(posting(UPDATE, [0]))
    manager.publish_many(posting(UPDATE, [0], run_id="run2"))
    manager.unlink("run")
    for call in (manager.get_stats, lambda run: manager.sync(run, "n0"), lambda run: manager.get_neighbors(run, "n0")):
        fails("P003", call, "run")
    fails("P003", manager.publish, "run", Message("hi", "n0"), None, (1, 1))
    fails("P003", manager.publish_supervisor, "run", (0,), b"")
    fails("P003", manager.outbox, "run", (1, 1))
    assert manager.get_stats("run2")["references"] == 1
    assert [p.senders for p in manager.collect("run2", 1, 1, UPDATE)] == [(0,)]
