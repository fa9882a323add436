"""How what nodes publish leaves their host: in batches, checked at once, and only for the attempt it was written in."""

from __future__ import annotations

from typing import Any

import pytest

from icrf.errors import IcrfError
from icrf.federation.message import Message
from icrf.protocol import DECENTRALIZED, Activate, NodeSpec, Relink, TensorSpec
from icrf.topology.hybrid import HybridAdjacencyMatrix
from icrf_agent import host_mailbox
from icrf_agent.host_mailbox import HostMailbox
from icrf_agent.inline_substrate import InlineReferences
from icrf_agent.topology_manager import HybridTopologyManager

RUN = "run"


class Counted(HybridTopologyManager):
    """A topology manager that counts how often it is called."""

    def __init__(self) -> None:
        super().__init__("here", InlineReferences())
        self.calls: list[str] = []

    def publish(self, *arguments: Any) -> int:
        self.calls.append("publish")
        return super().publish(*arguments)

    def post(self, run_id: str, position: tuple[int, int], letters: Any) -> None:
        self.calls.append("post")
        super().post(run_id, position, letters)


def graph(*edges: tuple[int, int]) -> Any:
    return HybridAdjacencyMatrix.from_edges(3, edges).to_graph()


@pytest.fixture
def manager() -> Counted:
    return Counted()


@pytest.fixture
def mailbox(manager: Counted) -> HostMailbox:
    activation = Activate(
        run_id=RUN,
        generation=1,
        federation=RUN,
        config_json="{}",
        flow=DECENTRALIZED,
        nodes=tuple(NodeSpec(f"n{k}", "train") for k in range(3)),
        graph=graph((0, 1), (1, 0), (1, 2), (2, 1)),
        layout=(TensorSpec("w", (1,), "float32"),),
        clusters=("here", "there"),
        assignment=(0, 0, 1),
        peers=(),
        num_slots=1,
    )
    manager.link(activation)
    found = HostMailbox(manager, activation)
    found.open = True
    enter(manager, found, (1, 1))
    return found


def enter(manager: Counted, mailbox: HostMailbox, position: tuple[int, int]) -> None:
    manager.begin_round(RUN, 1, *position)
    mailbox.enter(position)


def heard(manager: Counted, node: str) -> list[str]:
    return [message.header for message in manager.sync(RUN, node)]


def test_a_phase_of_messages_is_one_call(manager: Counted, mailbox: HostMailbox) -> None:
    for k in range(100):
        assert mailbox.publish(Message(f"{k}", "n0"), None) == 1
        assert mailbox.publish(Message(f"{k}", "n1"), ["n0", "n2"]) == 2
    assert manager.calls == []
    mailbox.flush()
    mailbox.flush()
    assert manager.calls == ["post"]
    ((_, bundle),) = manager.outbox(RUN, (1, 1)).values()
    assert bundle.count(b"n1") == 100, "what goes to the other cluster left with them"
    assert heard(manager, "n1") == [], "not before the barrier"
    enter(manager, mailbox, (2, 1))
    assert heard(manager, "n1") == [f"{k}" for k in range(100)]
    assert heard(manager, "n0") == [f"{k}" for k in range(100)]


def test_very_many_messages_do_not_pile_up_in_the_host(
    manager: Counted, mailbox: HostMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_mailbox, "_FULL_LETTERS", 10)
    for k in range(25):
        mailbox.publish(Message(f"{k}", "n0"), "n1")
    assert manager.calls == ["post", "post"]
    monkeypatch.setattr(host_mailbox, "_FULL_BYTES", 100)
    mailbox.publish(Message("long", "n0", {"text": "x" * 100}), "n1")
    assert manager.calls == ["post"] * 3
    enter(manager, mailbox, (2, 1))
    assert heard(manager, "n1") == [*map(str, range(25)), "long"]


def test_who_may_not_hear_is_refused_at_once_and_counted(manager: Counted, mailbox: HostMailbox) -> None:
    mailbox.publish(Message("before", "n0"), "n1")
    with pytest.raises(IcrfError, match="no edge n0 -> n2") as refused:
        mailbox.publish(Message("psst", "n0"), ["n1", "n2"])
    assert refused.value.code == "P011"
    assert manager.get_stats(RUN)["rejected"] == 1
    mailbox.flush()
    enter(manager, mailbox, (2, 1))
    assert heard(manager, "n1") == ["before"]


def test_what_cannot_be_encoded_is_refused_at_once(mailbox: HostMailbox) -> None:
    with pytest.raises(IcrfError) as refused:
        mailbox.publish(Message("x", "n0", {"y": object()}), "n1")
    assert (refused.value.code, "body['y']" in str(refused.value)) == ("C006", True)


def test_what_an_abandoned_attempt_has_written_goes_nowhere(manager: Counted, mailbox: HostMailbox) -> None:
    mailbox.publish(Message("in vain", "n0"), "n1")
    manager.abort(RUN, 1, 1)
    enter(manager, mailbox, (1, 2))
    mailbox.publish(Message("again", "n0"), "n1")
    mailbox.flush()
    enter(manager, mailbox, (2, 1))
    assert heard(manager, "n1") == ["again"]


def test_an_attempt_that_is_over_takes_nothing(manager: Counted, mailbox: HostMailbox) -> None:
    mailbox.publish(Message("late", "n0"), "n1")
    manager.abort(RUN, 1, 1)
    with pytest.raises(IcrfError) as refused:
        mailbox.flush()
    assert refused.value.code == "P003"


def test_between_rounds_a_message_goes_at_once(manager: Counted, mailbox: HostMailbox) -> None:
    mailbox.enter(None)
    assert mailbox.publish(Message("now", "n0"), "n1") == 1
    assert manager.calls == ["publish"]


def test_a_new_graph_counts_from_then_on(manager: Counted, mailbox: HostMailbox) -> None:
    mailbox.publish(Message("old", "n0"), "n1")
    mailbox.flush()
    new = graph((0, 2), (2, 0))
    manager.relink(Relink(RUN, 2, new))
    mailbox.relink(new)
    with pytest.raises(IcrfError) as refused:
        mailbox.publish(Message("old", "n0"), "n1")
    assert refused.value.code == "P011"
    assert mailbox.publish(Message("new", "n0"), None) == 1
