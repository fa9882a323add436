"""Every value of the protocol survives the wire, and nothing else that a peer sends gets through."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf import protocol
from icrf.errors import IcrfError, ProtocolError
from icrf.protocol import (
    Activated,
    Capacity,
    Graph,
    Heartbeat,
    Instruction,
    NodeSpec,
    Register,
    Release,
    Report,
    RoundReport,
    RoundResult,
    RunEvent,
    Submission,
)
from icrf.wire._generated.icrf.v1 import types_pb2
from icrf.wire.codec import (
    from_proto,
    pack_instruction,
    pack_report,
    parse,
    to_proto,
    unpack_instruction,
    unpack_report,
)

VALUES = sorted(
    (
        c
        for _, c in inspect.getmembers(protocol, dataclasses.is_dataclass)
        if c.__module__.startswith(protocol.__name__)
    ),
    key=lambda cls: cls.__name__,
)
ENVELOPES = [(unpack_instruction, types_pb2.Instruction), (unpack_report, types_pb2.Report)]

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS: dict[typing.Any, st.SearchStrategy[typing.Any]] = {
    str: TEXT,
    int: INT64,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
}


def values_of(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Any value that a type hint of the protocol allows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint]
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if arg is type(None) else values_of(arg) for arg in args))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    hints = typing.get_type_hints(hint)
    return st.builds(hint, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(hint)})


def over_the_wire(message: Message) -> Message:
    return parse(message.SerializeToString(), type(message))


def test_the_protocol_was_found() -> None:
    assert len(VALUES) > 30
    assert {Submission, RunEvent, RoundReport} <= set(VALUES)


@pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)
def test_a_message_has_the_fields_of_its_value_in_the_same_order(cls: typing.Any) -> None:
    message = types_pb2.DESCRIPTOR.message_types_by_name[cls.__name__]
    assert [f.name for f in message.fields] == [f.name for f in dataclasses.fields(cls)]
    numbers = [f.number for f in message.fields]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("cls", VALUES, ids=lambda cls: cls.__name__)
def test_a_value_survives_the_wire(cls: typing.Any) -> None:
    @settings(max_examples=15, derandomize=True, database=None)
    @given(values_of(cls))
    def check(value: typing.Any) -> None:
        assert from_proto(over_the_wire(to_proto(value)), cls) == value

    check()


def test_not_a_number_survives_the_wire() -> None:
    report = RoundReport("r", 1, 2, 3, absmax=(math.nan, math.inf))
    absmax = from_proto(over_the_wire(to_proto(report)), RoundReport).absmax
    assert math.isnan(absmax[0]) and absmax[1] == math.inf


@pytest.mark.parametrize(
    "union, pack, unpack",
    [(Instruction, pack_instruction, unpack_instruction), (Report, pack_report, unpack_report)],
    ids=["Instruction", "Report"],
)
def test_every_member_of_a_union_survives_its_envelope(union: typing.Any, pack: typing.Any, unpack: typing.Any) -> None:
    for cls in typing.get_args(union):

        @settings(max_examples=5, derandomize=True, database=None)
        @given(values_of(cls))
        def check(value: typing.Any) -> None:
            assert unpack(over_the_wire(pack(value))) == value

        check()


def test_an_envelope_refuses_what_is_not_its_kind() -> None:
    with pytest.raises(ProtocolError, match=r"P001 Report: Release is no Report"):
        pack_report(Release("r", 1))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=r"P001 Report: it is empty"):
        unpack_report(types_pb2.Report())


def test_a_value_beyond_64_bits_names_its_field() -> None:
    register = Register("a", "b", 1, "0.1", Capacity(2**70, 1.0, 0.0, 1), None)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError) as caught:
        to_proto(register)
    assert caught.value.place == "Register.capacity.num_slots"


def test_a_bad_value_in_a_sequence_names_its_index() -> None:
    graph = Graph(1, (0, 0), ())
    submission = Submission("a", "{}", "centralized", (NodeSpec("a", "x"), NodeSpec("\ud800", "x")), graph, ())
    with pytest.raises(ProtocolError) as caught:
        to_proto(submission)
    assert caught.value.place == "Submission.nodes[1].id"
    with pytest.raises(ProtocolError) as caught:
        to_proto(Activated("r", 1, num_samples=((1, 2), (3, 4, 5))))  # type: ignore[arg-type]
    assert caught.value.place == "Activated.num_samples[1]"


def test_a_missing_message_names_its_field() -> None:
    message = types_pb2.Register(cluster="a", capacity=types_pb2.Capacity())
    with pytest.raises(ProtocolError, match=r"P001 Register\.fingerprint: malformed message: is missing"):
        from_proto(message, Register)


def test_an_optional_message_may_be_absent() -> None:
    assert from_proto(types_pb2.RunEvent(run_id="r"), RunEvent).round is None
    event = types_pb2.RunEvent(round=types_pb2.RoundResult(number=4))
    assert isinstance(from_proto(event, RunEvent).round, RoundResult)


def test_another_message_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a Heartbeat came; allowed: Register"):
        from_proto(types_pb2.Heartbeat(), Register)


def test_what_is_no_value_of_the_protocol_is_refused() -> None:
    with pytest.raises(ProtocolError, match="int is no message"):
        to_proto(7)


def test_fields_of_a_newer_version_are_ignored() -> None:
    newer = to_proto(Heartbeat("me")).SerializeToString() + b"\xfa\x3e\x03new"
    assert from_proto(parse(newer, types_pb2.Heartbeat), Heartbeat) == Heartbeat("me")


@settings(max_examples=300, derandomize=True, database=None)
@given(st.binary(max_size=64), st.sampled_from(VALUES))
def test_random_bytes_give_a_value_or_an_error_of_ours(raw: bytes, cls: typing.Any) -> None:
    try:
        value = from_proto(parse(raw, getattr(types_pb2, cls.__name__)), cls)
    except IcrfError as error:
        assert error.code == "P001"
    else:
        assert isinstance(value, cls)


@settings(max_examples=300, derandomize=True, database=None)
@given(st.sampled_from(ENVELOPES), st.integers(0, 11), st.binary(max_size=64))
def test_random_envelopes_give_a_value_or_an_error_of_ours(envelope: typing.Any, option: int, body: bytes) -> None:
    unpack, message_class = envelope
    raw = bytes([option << 3 | 2, len(body)]) + body
    try:
        unpack(parse(raw, message_class))
    except IcrfError as error:
        assert error.code == "P001"
