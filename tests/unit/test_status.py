"""Errors cross the wire unharmed, and whatever gRPC reports becomes an error of the tree."""

from __future__ import annotations

import json
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icrf.errors import CATALOGUE, ConfigErrors, IcrfError, LocalError, NodeError, ProtocolError, make_error
from icrf.wire.status import ERROR_KEY, RpcStatus, from_rpc_error, from_status, is_unreachable, to_status

ADDRESS = "127.0.0.1:7443"
METADATA_LIMIT = 128 << 10


class FakeRpcError(grpc.RpcError):
    """What a synchronous stub raises."""

    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> None:
        super().__init__()
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def received(status: RpcStatus) -> IcrfError:
    return from_rpc_error(FakeRpcError(status.code, status.details, status.trailing_metadata), ADDRESS)


@pytest.mark.parametrize("code", CATALOGUE)
def test_every_code_has_a_status_and_comes_back_as_itself(code: str) -> None:
    error = make_error(code, "it is wrong", place="a.yaml:3", value="é", allowed="b", hint="Do c.")
    status = to_status(error)
    assert status.code is grpc.StatusCode[CATALOGUE[code].status]
    assert status.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    back = received(status)
    assert type(back) is type(error)
    assert back.to_dict() == error.to_dict()


def test_several_errors_come_back_as_several() -> None:
    errors = ConfigErrors([make_error("C005", "unknown key", place=f"a.yaml:{i}") for i in range(3)])
    back = received(to_status(errors))
    assert isinstance(back, ConfigErrors)
    assert str(back) == str(errors)


def test_an_error_of_grpc_aio_is_read_too() -> None:
    metadata = grpc.aio.Metadata(*to_status(make_error("F001", "no such run")).trailing_metadata)
    error = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), metadata, "no such run")
    assert from_rpc_error(error, ADDRESS).code == "F001"


@pytest.mark.parametrize(
    "error",
    [
        NodeError("U001", "node raised\n" + "\u0000é😀" * 100_000, hint="x" * 100_000),
        ConfigErrors([make_error("C005", "unknown key " + "k" * 900, place=f"a:{i}") for i in range(1_000)]),
        NodeError("U001", "a lone surrogate \ud800"),
    ],
    ids=["long", "many", "surrogate"],
)
def test_the_largest_error_fits_into_the_metadata(error: IcrfError) -> None:
    status = to_status(error)
    ((_, raw),) = status.trailing_metadata
    assert len(raw) * 4 / 3 + len(status.details.encode()) * 3 < METADATA_LIMIT
    back = received(status)
    assert back.code == error.code
    assert str(back)[:15] == str(error)[:15]


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_every_bare_status_becomes_an_error_with_the_address(code: grpc.StatusCode) -> None:
    error = from_rpc_error(FakeRpcError(code, "details"), ADDRESS)
    assert isinstance(error, IcrfError)
    assert error.place == ADDRESS
    assert is_unreachable(error) == (
        code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    )


@pytest.mark.parametrize(
    "code, details, expected",
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", "L001"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", "L001"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", "P004"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max", "P026"),
        (grpc.StatusCode.INTERNAL, "Exception deserializing response!", "P001"),
        (grpc.StatusCode.INTERNAL, "stream broken", "X001"),
        (None, "boom", "X001"),
    ],
)
def test_bare_status(code: grpc.StatusCode | None, details: str, expected: str) -> None:
    assert from_status(code, details, (), ADDRESS).code == expected


def test_an_unreachable_mediator_is_named_with_what_to_do() -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "connection refused", (), ADDRESS)
    assert isinstance(error, LocalError)
    assert ADDRESS in str(error)
    assert "mediator unreachable" in str(error)
    assert error.hint
    assert error.exit_code == 69


def test_an_exception_that_is_no_rpc_error_is_mapped() -> None:
    assert from_rpc_error(grpc.aio.UsageError("Channel is closed."), ADDRESS).code == "X001"
    assert from_rpc_error(grpc.RpcError(), ADDRESS).code == "X001"


def test_another_kind_of_peer_can_be_named() -> None:
    error = from_rpc_error(FakeRpcError(grpc.StatusCode.UNAVAILABLE), ADDRESS, what="gateway of eu", unreachable="P030")
    assert isinstance(error, ProtocolError)
    assert "gateway of eu unreachable" in str(error)


def test_a_code_of_a_newer_version_stays_readable() -> None:
    raw = json.dumps({"code": "Q999", "message": "something new"}).encode()
    error = from_status(grpc.StatusCode.ABORTED, "", ((ERROR_KEY, raw),), ADDRESS)
    assert error.code == "X001"
    assert "something new" in error.message and "Q999" in error.message


@settings(max_examples=200, derandomize=True, database=None)
@given(
    st.one_of(
        st.binary(max_size=32),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["code", "message", "errors", "value", "hint"]), inner, max_size=4)
            ),
            max_leaves=6,
        ).map(lambda data: json.dumps(data).encode()),
    )
)
def test_garbage_in_the_metadata_is_no_trouble(raw: bytes) -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "", ((ERROR_KEY, raw),), ADDRESS)
    assert isinstance(error, IcrfError)
    assert str(error)


def test_an_unreadable_error_leaves_the_status_in_force() -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "", ((ERROR_KEY, b"\xff{"),), ADDRESS)
    assert error.code == "L001"
