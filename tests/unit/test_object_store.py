"""Named references of one cluster."""

from __future__ import annotations

from icrf_agent.object_store import GlobalObjectStore, object_key


def test_keys_name_federation_node_and_round() -> None:
    assert object_key("fed", "client_3", 7) == "fed/client_3/round_7"


def test_what_was_put_is_found_and_can_be_replaced() -> None:
    store = GlobalObjectStore()
    store.put("fed/a/round_1", b"one")
    store.put("fed/a/round_1", b"two")
    assert store.get("fed/a/round_1") == b"two"
    assert store.size() == 1
    assert store.get("fed/b/round_1") is None


def test_deleting_takes_everything_below_and_nothing_beside() -> None:
    store = GlobalObjectStore()
    for key in ("fed/a/round_1", "fed/a/round_1/x", "fed/a/round_10", "fed/ab/round_1", "federation/a/round_1"):
        store.put(key, b"")
    assert store.delete("fed/a/round_1") == 2
    assert store.delete("fed/a/") == 1
    assert store.delete("fed") == 1
    assert store.keys() == ["federation/a/round_1"]
    assert store.delete("nothing") == 0


def test_discarding_takes_one_key_only() -> None:
    store = GlobalObjectStore()
    store.put("fed/a", b"")
    store.put("fed/a/b", b"")
    store.discard("fed/a")
    store.discard("fed/a")
    assert store.keys() == ["fed/a/b"]


def test_keys_are_listed_in_order_and_by_prefix() -> None:
    store = GlobalObjectStore()
    for key in ("b/1", "a/2", "a/1"):
        store.put(key, object())
    assert store.keys() == ["a/1", "a/2", "b/1"]
    assert store.keys("a/") == ["a/1", "a/2"]


def test_a_reference_is_let_go_with_its_key() -> None:
    freed: list[str] = []

    class Reference:
        def __del__(self) -> None:
            freed.append("freed")

    store = GlobalObjectStore()
    store.put("fed/a", Reference())
    store.delete("fed")
    assert freed == ["freed"]
