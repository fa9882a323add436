"""Messages: round trip, limits and refusal of anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrf import values
from icrf.errors import ConfigError, ProtocolError
from icrf.federation.message import MAX_HEADER_BYTES, Message

bodies = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.binary() | st.lists(st.booleans()))


@given(st.text(max_size=200), st.text(max_size=50), bodies, st.floats(allow_nan=False))
def test_round_trip(header: str, sender: str, body: dict[str, Any], timestamp: float) -> None:
    message = Message(header, sender, body, timestamp)
    assert Message.decode(message.encode()) == message


def test_arrays_in_the_body_survive_and_the_message_is_frozen() -> None:
    message = Message("weights", "client_2", {"w": np.arange(4, dtype=np.float32), "pair": (1, 2)}, 5)
    decoded = Message.decode(message.encode())
    assert np.array_equal(decoded.body["w"], message.body["w"])
    assert decoded.body["pair"] == (1, 2)
    assert decoded.timestamp == 5.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        decoded.header = "x"  # type: ignore[misc]


def test_the_header_is_limited_in_bytes() -> None:
    limit = "ü" * (MAX_HEADER_BYTES // 2)
    assert Message.decode(Message(limit, "n").encode()).header == limit
    with pytest.raises(ConfigError, match="header of 4097 bytes") as caught:
        Message(limit + "x", "n")
    assert caught.value.code == "C007"


@pytest.mark.parametrize("parts", [(1, "n", {}, 0.0), ("h", None, {}, 0.0), ("h", "n", [], 0.0), ("h", "n", {}, "now")])
def test_parts_of_the_wrong_type_are_refused(parts: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Message(*parts)
    assert caught.value.code == "C006"
    header, sender, body, timestamp = parts
    with pytest.raises(ProtocolError):
        Message.decode(values.encode([header, sender, timestamp, values.encode(body)]))


def test_a_body_that_cannot_be_sent_names_the_place() -> None:
    with pytest.raises(ConfigError, match=r"body\['x'\]\[3\]"):
        Message("h", "n", {"x": [1, 2, 3, print]}).encode()


@pytest.mark.parametrize("data", [b"", b"junk", values.encode(None), values.encode(["h", "n", 0.0, {}])])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Message.decode(data)
    assert caught.value.code == "P001"
