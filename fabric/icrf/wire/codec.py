"""Frozen values <-> protobuf messages of the same name, field by field, driven by the type hints.

A dataclass ``X`` becomes the message ``icrf.v1.X``. Its fields are scalars (``str``, ``int``, ``float``, ``bool``,
``bytes``), other dataclasses, ``X | None``, ``tuple[T, ...]``, ``dict[str, T]``, tuples of fixed length, which are
messages whose fields in the order of their numbers are the items, or mappings inside mappings, which are messages with
one field ``values``. How to convert a class is worked out once.

Whatever a peer sends, decoding raises nothing but :class:`icrf.errors.ProtocolError`, which names the field.
"""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NoReturn, TypeVar, Union

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from icrf.errors import ProtocolError
from icrf.protocol import Instruction, Report
from icrf.wire._generated.icrf.v1 import types_pb2

T = TypeVar("T")

_SCALARS = (str, int, float, bool, bytes)
_BAD_VALUE = (TypeError, ValueError, OverflowError, AttributeError)


class _BadField(Exception):
    """Carries the path of a field outwards, one level at a time; never leaves this module."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def under(self, outer: str) -> _BadField:
        return _BadField(f"{outer}.{self.path}" if self.path else outer, self.reason)


@dataclass(frozen=True)
class _Field:
    """How one field travels. `encode` and `decode` of ``None`` mean: as it is."""

    name: str
    encode: Callable[[Any], Any] | None
    decode: Callable[[Any], Any] | None
    is_message: bool = False
    optional: bool = False


@dataclass(frozen=True)
class _ClassCodec:
    """How one dataclass travels."""

    cls: type
    message_class: type[Message]
    fields: tuple[_Field, ...]

    def encode(self, value: Any) -> Message:
        parts: dict[str, Any] = {}
        for spec in self.fields:
            part = getattr(value, spec.name)
            if spec.encode is not None and part is not None:
                try:
                    part = spec.encode(part)
                except _BadField as bad:
                    raise bad.under(spec.name) from None
                except _BAD_VALUE as error:
                    raise _BadField(spec.name, str(error)) from None
            parts[spec.name] = part
        try:
            return self.message_class(**parts)
        except _BAD_VALUE as error:
            raise self._culprit(parts, error) from None

    def decode(self, message: Any) -> Any:
        parts: dict[str, Any] = {}
        for spec in self.fields:
            if spec.is_message and not message.HasField(spec.name):
                if not spec.optional:
                    raise _BadField(spec.name, "is missing")
                parts[spec.name] = None
                continue
            part = getattr(message, spec.name)
            if spec.decode is not None:
                try:
                    part = spec.decode(part)
                except _BadField as bad:
                    raise bad.under(spec.name) from None
            parts[spec.name] = part
        return self.cls(**parts)

    def _culprit(self, parts: dict[str, Any], error: Exception) -> _BadField:
        """Protobuf names no field when it refuses a value: find it, only now that something is wrong."""
        for name, part in parts.items():
            try:
                self.message_class(**{name: part})
            except _BAD_VALUE as reason:
                return _BadField(name, str(reason))
        return _BadField("", str(error))


# ---------------------------------------------------------------- values


def to_proto(value: Any) -> Message:
    """The message of a frozen value.

    Raises:
        ProtocolError: P001 if a field holds what its type does not allow, for instance an int beyond 64 bits.
    """
    name = type(value).__name__
    if not is_dataclass(value):
        raise ProtocolError("P001", f"{name} is no message", allowed="a value of icrf.protocol")
    try:
        return _codec(typing.cast(Any, type(value))).encode(value)
    except _BadField as bad:
        _refuse(bad.under(name))


def from_proto(message: Message, cls: type[T]) -> T:
    """The frozen value of a message; unknown fields are ignored, absent scalars are zero.

    Raises:
        ProtocolError: P001 if `message` is of another type or a nested message is missing.
    """
    codec = _codec(typing.cast(Any, cls))
    if message.DESCRIPTOR.full_name != codec.message_class.DESCRIPTOR.full_name:
        raise ProtocolError(
            "P001", f"a {message.DESCRIPTOR.name} came", place=cls.__name__, allowed=codec.message_class.DESCRIPTOR.name
        )
    try:
        return typing.cast(T, codec.decode(message))
    except _BadField as bad:
        _refuse(bad.under(cls.__name__))


def parse(raw: bytes, message_class: type[Message]) -> Any:
    """Parse bytes of a peer into a protobuf message.

    Raises:
        ProtocolError: P001 if they are no such message.
    """
    try:
        return message_class.FromString(raw)
    except DecodeError as error:
        name = message_class.DESCRIPTOR.name
        hint = "the peer speaks another version or the bytes were damaged"
        raise ProtocolError("P001", f"not a {name}: {error}", place=name, hint=hint) from None


# ---------------------------------------------------------------- envelopes


def pack_instruction(instruction: Instruction) -> Message:
    """Put an instruction into its envelope."""
    return _pack(instruction, types_pb2.Instruction)


def unpack_instruction(message: Message) -> Instruction:
    """Take an instruction out of its envelope; P001 if it is empty or of a kind unknown to this version."""
    return typing.cast(Instruction, _unpack(message, _kinds(types_pb2.Instruction, Instruction)))


def dump_instruction(instruction: Instruction) -> bytes:
    """An instruction in its envelope as bytes, for the journals of agents."""
    return pack_instruction(instruction).SerializeToString(deterministic=True)


def load_instruction(raw: bytes) -> Instruction:
    """The inverse of :func:`dump_instruction`; P001 if the bytes are no instruction."""
    return unpack_instruction(parse(raw, types_pb2.Instruction))


def pack_report(report: Report) -> Message:
    """Put a report into its envelope."""
    return _pack(report, types_pb2.Report)


def unpack_report(message: Message) -> Report:
    """Take a report out of its envelope; P001 if it is empty or of a kind unknown to this version."""
    return typing.cast(Report, _unpack(message, _kinds(types_pb2.Report, Report)))


def _pack(value: Any, envelope: Any) -> Message:
    name = type(value).__name__
    for option in envelope.DESCRIPTOR.oneofs_by_name["body"].fields:
        if option.message_type.name == name:
            return typing.cast(Message, envelope(**{option.name: to_proto(value)}))
    raise ProtocolError("P001", f"{name} is no {envelope.DESCRIPTOR.name}", place=envelope.DESCRIPTOR.name)


def _unpack(message: Any, kinds: dict[str, type]) -> Any:
    option = message.WhichOneof("body")
    if option is None:
        raise ProtocolError(
            "P001",
            "it is empty or of a kind that this version does not know",
            place=message.DESCRIPTOR.name,
            allowed=", ".join(kinds),
        )
    return from_proto(getattr(message, option), kinds[option])


@functools.cache
def _kinds(envelope: Any, union: Any) -> dict[str, type]:
    """Name of the option in the envelope -> dataclass."""
    classes = {cls.__name__: cls for cls in typing.get_args(union)}
    return {
        option.name: classes[option.message_type.name] for option in envelope.DESCRIPTOR.oneofs_by_name["body"].fields
    }


# ---------------------------------------------------------------- working out a class


@functools.cache
def _codec(cls: Any) -> _ClassCodec:
    descriptor = descriptor_pool.Default().FindMessageTypeByName(f"icrf.v1.{cls.__name__}")
    hints = typing.get_type_hints(cls)
    specs = tuple(_field(descriptor.fields_by_name[f.name], hints[f.name]) for f in fields(cls))
    return _ClassCodec(cls, message_factory.GetMessageClass(descriptor), specs)


def _field(descriptor: Any, hint: Any) -> _Field:
    inner, optional = _strip_optional(hint)
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is tuple and args[-1] is Ellipsis:
        one = _item(args[0], descriptor.message_type)
        return _Field(descriptor.name, *((None, tuple) if one is None else _sequence(*one)))
    if origin is dict:
        one = _item(args[1], descriptor.message_type.fields_by_name["value"].message_type)
        return _Field(descriptor.name, *((None, dict) if one is None else _mapping(*one)))
    one = _item(inner, descriptor.message_type)
    if one is None:
        return _Field(descriptor.name, None, None)
    return _Field(descriptor.name, *one, is_message=True, optional=optional)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], True
    return hint, False


def _item(hint: Any, descriptor: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """(encode, decode) of one item, or None for a scalar, which protobuf converts itself."""
    if hint in _SCALARS:
        return None
    if is_dataclass(hint):
        codec = _codec(typing.cast(type, hint))
        return codec.encode, codec.decode
    if typing.get_origin(hint) is dict:
        inner = message_factory.GetMessageClass(descriptor)
        return lambda values: inner(values=values), lambda message: dict(message.values)
    if typing.get_origin(hint) is tuple:
        names = [field.name for field in sorted(descriptor.fields, key=operator.attrgetter("number"))]
        record = message_factory.GetMessageClass(descriptor)
        return (
            lambda items: record(**dict(zip(names, items, strict=True))),
            lambda message: tuple(getattr(message, name) for name in names),
        )
    raise TypeError(f"{hint} has no form on the wire")


def _sequence(
    encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return (
        lambda values: [_at(f"[{i}]", encode, value) for i, value in enumerate(values)],
        lambda messages: tuple(_at(f"[{i}]", decode, message) for i, message in enumerate(messages)),
    )


def _mapping(
    encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return (
        lambda values: {key: _at(f"[{key!r}]", encode, value) for key, value in values.items()},
        lambda messages: {key: _at(f"[{key!r}]", decode, message) for key, message in messages.items()},
    )


def _at(key: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except _BadField as bad:
        raise bad.under(key) from None
    except _BAD_VALUE as error:
        raise _BadField(key, str(error)) from None


def _refuse(bad: _BadField) -> NoReturn:
    raise ProtocolError("P001", f"malformed message: {bad.reason}", place=bad.path.replace(".[", "[")) from None
