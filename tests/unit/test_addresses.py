"""Addresses: what is accepted, and what is said about the rest."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from icrf.errors import LocalError
from icrf.wire.addresses import dial_target, format_address, is_loopback, parse_address, refuse_plaintext


@pytest.mark.parametrize(
    "address, expected",
    [
        ("127.0.0.1:7443", ("127.0.0.1", 7443)),
        ("localhost:0", ("localhost", 0)),
        ("mediator.example:65535", ("mediator.example", 65535)),
        ("[::1]:7443", ("::1", 7443)),
    ],
)
def test_an_address_is_split_and_put_together(address: str, expected: tuple[str, int]) -> None:
    assert parse_address(address) == expected
    assert format_address(*expected) == address


@pytest.mark.parametrize(
    "address, hint",
    [
        ("::1:7443", "write [::1]:7443"),
        ("::1", "write [::1]:7443"),
        ("fe80::2:7443", "write [fe80::2]:7443"),
        ("http://localhost:7443", "write it without http://: localhost:7443"),
        ("https://m.example:1/path", "write it without https://: m.example:1"),
        ("grpc://", "HOST:PORT"),
        ("localhost", "write localhost:7443"),
        ("localhost:", "write localhost:7443"),
        ("", "write 127.0.0.1:7443"),
        (":7443", "127.0.0.1:7443"),
        ("localhost:abc", "from 0 to 65535"),
        ("localhost:70000", "from 0 to 65535"),
        ("localhost:-1", "from 0 to 65535"),
        ("localhost:٣", "from 0 to 65535"),
        ("[::1]", "write [::1]:7443"),
        ("[::1:7443", "write [::1]:7443"),
        ("[localhost]:7443", "write [::1]:7443"),
        ("a b:7443", "127.0.0.1:7443"),
        ("a/b:7443", "127.0.0.1:7443"),
    ],
)
def test_a_malformed_address_is_named_with_what_to_write(address: str, hint: str) -> None:
    with pytest.raises(LocalError) as caught:
        parse_address(address, place="--mediator")
    assert caught.value.code == "L003"
    assert caught.value.place == "--mediator"
    assert hint in caught.value.hint
    assert repr(address) in str(caught.value)


@given(st.text(max_size=30))
@example("[" + "1" * 9)
def test_any_text_is_an_address_or_an_error_of_ours(text: str) -> None:
    try:
        host, port = parse_address(text)
    except LocalError as error:
        assert error.code == "L003"
    else:
        assert parse_address(format_address(host, port)) == (host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST", "localhost."])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    refuse_plaintext(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "example.org", "localhost.example.org"])
def test_off_loopback_plaintext_is_refused(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(LocalError) as caught:
        refuse_plaintext(host)
    assert caught.value.code == "L002"


def test_what_is_dialled() -> None:
    assert dial_target("[::1]:1") == "[::1]:1"
    with pytest.raises(LocalError, match="port 0 cannot be dialled"):
        dial_target("localhost:0")
    with pytest.raises(LocalError, match="L002"):
        dial_target("10.0.0.1:7443")
