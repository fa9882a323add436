"""What is kept of a round, as bytes, and what of it goes where nodes go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from icrf import values
from icrf.errors import WeightsError
from icrf.protocol import DECENTRALIZED
from icrf.testing.round_driver import activation
from icrf_agent.checkpoint import SERVER, pack_rows, split_rows
from icrf_agent.delivery import Delivery, Letter
from icrf_agent.kept import Kept, merged, part_of
from icrf_agent.mail import NO_MAIL, Mail
from icrf_agent.room import TopologyManager

ROUND = 4
MAIL = Mail(((Letter(0, 7, b"late"), (2,)), (Letter(-1, 1, b"all"), (2, 4))), {0: 7, -1: 1})


def rows(*nodes: int | str) -> bytes:
    return pack_rows({str(n): np.full(3, len(str(n)), np.float32) for n in nodes}, ROUND)


def test_what_is_kept_comes_back_out_of_its_bytes() -> None:
    for kept in (
        Kept(),
        Kept(rows(1, 2)),
        Kept(rows(1), {1: b"x"}),
        Kept(b"", {3: b"y"}, MAIL),
        Kept(rows(1), {}, MAIL),
    ):
        assert Kept.unpack(kept.pack(ROUND), ROUND) == kept
    assert Kept(rows(1)).pack(ROUND) == rows(1) and Kept().pack(ROUND) == b""


@pytest.mark.parametrize(
    "data",
    [
        Kept(b"", {1: b"x"}).pack(ROUND + 1),
        values.encode(["no", "checkpoint"]),
        values.encode({"round": ROUND, "flow": b"", "nodes": {"one": b""}}),
        values.encode({"round": ROUND, "flow": b"", "nodes": {}, "mail": {"letters": [[1, 2]], "numbers": []}}),
        values.encode({"round": ROUND, "flow": b"", "nodes": {}, "mail": {}}),
    ],
)
def test_what_is_no_such_thing_is_refused(data: bytes) -> None:
    with pytest.raises(WeightsError, match="W010"):
        Kept.unpack(data, ROUND)


def test_a_cluster_takes_what_belongs_to_its_nodes_out_of_several() -> None:
    order = replace(activation(DECENTRALIZED, clusters=("a", "b")), restore_round=ROUND)  # nodes 1, 3 and 5 go to b
    parts = [Kept(rows(0, 1), {0: b"0", 1: b"1"}, MAIL), Kept(rows(2, 3), {3: b"3"}), Kept(rows(4, 5))]
    found = Kept.unpack(part_of(order, "b", [part.pack(ROUND) for part in parts]), ROUND)
    assert split_rows(found.flow, ROUND, [["1", "3", "5"]]) == [rows(1, 3, 5)]
    assert found.flow == rows(1, 3, 5)
    assert found.states == {1: b"1", 3: b"3"} and found.mail == MAIL
    assert part_of(order, "b", []) == b"" and part_of(order, "b", [rows(1)]) == rows(1)


def test_the_servers_rows_stay_with_those_of_earlier_rounds() -> None:
    everything = rows(SERVER, "model-3", 1, 2)
    assert Kept(everything).of([2], ROUND).flow == rows(SERVER, "model-3", 2)
    assert Kept(b"").of([2], ROUND).flow == b""


def test_letters_of_several_clusters_keep_the_highest_number_of_every_writer() -> None:
    other = Mail(((Letter(3, 2, b"more"), (4,)),), {3: 2, 0: 9})
    whole = merged([Kept(mail=MAIL), Kept(), Kept(mail=other)], ROUND).mail
    assert whole.letters == MAIL.letters + other.letters and whole.numbers == {0: 9, -1: 1, 3: 2}
    assert not NO_MAIL and MAIL and Mail(numbers={0: 1})


def test_letters_are_put_back_where_their_readers_live_and_new_ones_come_behind_them() -> None:
    room = TopologyManager()
    room.link_nodes(["a", "b", "c", "d", "e"], "mesh")
    room.restore(MAIL, {4})
    assert (room.waiting().letters, room.used) == (((Letter(-1, 1, b"all"), (4,)),), True)
    assert room.sealed(0, b"new").sequence == 8


def test_a_round_that_is_being_read_has_not_been_read_yet() -> None:
    room, delivery = TopologyManager(), Delivery()
    room.link_nodes(["a", "b"], "mesh")
    assert not room.used and not delivery.staged(1)
    delivery.stage((1, 1), Letter(0, 1, b"void"), [1])
    delivery.stage((1, 2), Letter(0, 3, b"b"), [1])
    delivery.stage((1, 2), Letter(0, 2, b"a"), [1])
    assert [letter.message for letter, _ in delivery.staged(1)] == [b"a", b"b"]
    assert [letter.message for letter, _ in delivery.begin((2, 1))] == [b"a", b"b"]
