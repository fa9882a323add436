"""Values survive encoding unchanged, and no bytes can make the decoder do anything but refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from icrf.errors import ConfigError, ProtocolError
from icrf.values import MAX_DEPTH, decode, encode


def same(a: Any, b: Any) -> bool:
    """Equal in type, in structure and in bits (nan equals nan, -0.0 differs from 0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


numeric = st.sampled_from(["?", "i1", "u1", "<i2", "<u4", "<i8", "<f2", "<f4", "<f8", "<c8"])
arrays = numeric.flatmap(lambda d: npst.arrays(np.dtype(d), npst.array_shapes(min_dims=0, max_dims=3, min_side=0)))
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | arrays.map(lambda a: np.asarray(a))
    | st.floats(width=32).map(np.float32)
    | st.integers(-5, 5).map(np.int64)
)
plain_values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain_values)
@settings(max_examples=200)
def test_round_trip(value: Any) -> None:
    assert same(decode(encode(value)), value)


UNUSUAL = [math.nan, math.inf, -math.inf, -0.0, 10**5000, -(2**63), 2**63, "\ud800", {"t": [1]}]


@pytest.mark.parametrize("value", UNUSUAL, ids=range(len(UNUSUAL)))
def test_unusual_scalars(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_containers_come_back_as_the_plain_kind() -> None:
    point = namedtuple("point", "x y")(1, 2)
    assert decode(encode(OrderedDict(b=1, a=2))) == {"b": 1, "a": 2}
    assert list(decode(encode(OrderedDict(b=1, a=2)))) == ["b", "a"]
    assert decode(encode(point)) == (1, 2)
    assert decode(encode(bytearray(b"xy"))) == b"xy"


def test_arrays_of_any_layout_come_back_contiguous_writable_and_little_endian() -> None:
    source = np.arange(12, dtype=">i4").reshape(3, 4).T[::2]
    result = decode(encode({"x": source}))["x"]
    assert np.array_equal(result, source)
    assert result.dtype == np.dtype("<i4")
    result[0, 0] = 7


def test_buffers_are_aligned_to_64_bytes() -> None:
    marker = np.full(4, 0x0123456789ABCDEF, dtype=np.int64)
    assert encode([b"odd", marker]).index(marker.tobytes()) % 64 == 0


def test_tensors_come_back_as_arrays() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.arange(6, dtype=torch.float32).reshape(2, 3).T)
    result = decode(encode([weight]))[0]
    assert isinstance(result, np.ndarray)
    assert np.array_equal(result, weight.detach().numpy())
    with pytest.raises(ConfigError, match=r"value\['w'\]: torch tensor of torch.bfloat16") as caught:
        encode({"w": torch.zeros(2, dtype=torch.bfloat16)})
    assert caught.value.code == "C006"


def test_torch_is_not_imported() -> None:
    code = "import sys, icrf.values as v; v.decode(v.encode({'x': 1})); sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"x": [0, 1, 2, object()]}, r"body\['x'\]\[3\]: values of type builtins.object"),
        ({"x": {1: 2}}, r"body\['x'\]: key 1 of type int"),
        ({"x": ({1, 2},)}, r"body\['x'\]\[0\]: values of type builtins.set"),
        (np.array(["a"]), "body: array of dtype <U1"),
        (np.array([object()]), "body: array of dtype object"),
        (np.ma.masked_array([1], mask=[True]), "body: values of type numpy.ma"),
        (lambda: 0, "body: values of type builtins.function"),
    ],
)
def test_what_cannot_be_sent_is_named_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(ConfigError, match=place) as caught:
        encode(value, root="body")
    assert caught.value.code == "C006"


def test_depth_is_limited_on_both_sides() -> None:
    def nested(depth: int) -> Any:
        value: Any = []
        for _ in range(depth):
            value = [value]
        return value

    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(ConfigError, match="deeper than 64"):
        encode(nested(MAX_DEPTH + 1))
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="deeper than 64"):
        encode(loop)
    for depth in (MAX_DEPTH + 2, 100_000):
        assert_refused(frame(b'{"value":' + b"[" * depth + b"]" * depth + b',"buffers":[]}'))


def frame(tree: bytes, buffers: bytes = b"") -> bytes:
    head = b"ICRV" + (1).to_bytes(2, "little") + bytes(2) + len(tree).to_bytes(4, "little") + tree
    return head + (bytes(-len(head) % 64) + buffers if buffers else b"")


def assert_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert caught.value.code == "P001"


@pytest.mark.parametrize(
    "tree",
    [
        b"",
        b"null",
        b"{",
        b"\xff",
        b'{"value":1}',
        b'{"value":1,"buffers":{}}',
        b'{"value":1,"buffers":[],"more":1}',
        b'{"value":NaN,"buffers":[]}',
        b'{"value":{"d":{"a":1,"a":2}},"buffers":[]}',
        b'{"value":{"q":1},"buffers":[]}',
        b'{"value":{"d":1},"buffers":[]}',
        b'{"value":{"d":{},"t":[]},"buffers":[]}',
        b'{"value":{},"buffers":[]}',
        b'{"value":{"i":"12"},"buffers":[]}',
        b'{"value":{"i":"0x"},"buffers":[]}',
        b'{"value":{"f":"1"},"buffers":[]}',
        b'{"value":{"f":[]},"buffers":[]}',
        b'{"value":{"b":0},"buffers":[]}',
        b'{"value":{"b":true},"buffers":[8]}',
        b'{"value":{"b":-1},"buffers":[8]}',
        b'{"value":[{"b":0},{"b":0}],"buffers":[8]}',
        b'{"value":1,"buffers":[8]}',
        b'{"value":{"b":0},"buffers":[9]}',
        b'{"value":{"b":0},"buffers":[7]}',
        b'{"value":{"b":0},"buffers":[-8]}',
        b'{"value":{"b":0},"buffers":[99999999999999999999]}',
        b'{"value":{"b":0},"buffers":["8"]}',
        b'{"value":{"a":[0,"<f4",[3]]},"buffers":[8]}',
        b'{"value":{"a":[0,"<f4",[-2]]},"buffers":[8]}',
        b'{"value":{"a":[0,"<f4",2]},"buffers":[8]}',
        b'{"value":{"a":[0,"<f4",[2.0]]},"buffers":[8]}',
        b'{"value":{"a":[0,"<f4",[true,2]]},"buffers":[8]}',
        b'{"value":{"a":[0,"|O",[1]]},"buffers":[8]}',
        b'{"value":{"a":[0,"<V8",[1]]},"buffers":[8]}',
        b'{"value":{"a":[0,["<f4"],[2]]},"buffers":[8]}',
        b'{"value":{"a":[0,"<f4",[4611686018427387904,4611686018427387904,0]]},"buffers":[8]}',
        b'{"value":{"a":[0,"|b1",[8]]},"buffers":[8]}',
        b'{"value":{"s":[0,"<f4",[2]]},"buffers":[8]}',
        b'{"value":' + b"9" * 5000 + b',"buffers":[]}',
    ],
)
def test_malformed_trees_are_refused(tree: bytes) -> None:
    assert_refused(frame(tree, b"\x02" * 8))
    if b'"buffers":[8]' not in tree:
        assert_refused(frame(tree))


def test_an_empty_array_of_absurd_shape_is_refused() -> None:
    assert_refused(frame(b'{"value":{"a":[0,"<f4",[9223372036854775807,9223372036854775807,0]]},"buffers":[0]}', b""))


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_value_is_decoded_or_refused(data: st.DataObject) -> None:
    good = encode({"a": [1, 2.5, "x", (None, b"12")], "w": np.arange(3.0), "n": math.nan})
    assert_refused(good[: data.draw(st.integers(0, len(good) - 1))])
    assert_refused(good + b"\0")
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decode(bad)
    except ProtocolError as error:
        assert error.code == "P001"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert_refused(data)
