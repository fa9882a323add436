"""Validation errors of pydantic in the fabric's own words and codes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from icrf.registry import did_you_mean
from icrf.spec.problems import Path, Problem, describe

_OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_WORDS: Mapping[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_YAML_1_1_BOOLS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def invalid(code: str, message: str, allowed: str = "", hint: str = "") -> PydanticCustomError:
    """What a field's own validator raises; the key is put in front of `message`."""
    return PydanticCustomError(
        "icrf", "{message}", {"code": code, "message": message, "allowed": allowed, "hint": hint}
    )


def problems_of(error: ValidationError, model: type[BaseModel], tags: frozenset[str] = frozenset()) -> list[Problem]:
    """Every complaint of a validation.

    Args:
        tags: labels of union members, which are no part of the path that a user wrote.
    """
    return [_problem(detail, model, tags) for detail in error.errors(include_url=False)]


def _problem(detail: ErrorDetails, model: type[BaseModel], tags: frozenset[str]) -> Problem:
    path: Path = tuple(str(part) for part in detail["loc"] if part not in tags or len(detail["loc"]) == 1)
    key, found, kind = ".".join(path), detail["input"], detail["type"]
    owner, name = _owner(model, path)
    if kind == "missing":
        return Problem("C016", path, f"{key} is missing", hint="It has no default.")
    if kind == "extra_forbidden":
        guess = did_you_mean(path[-1], owner.model_fields)
        return Problem("C005", path, f"unknown key '{key}'" + (f"; {guess[0].lower()}{guess[1:]}" if guess else ""))
    if kind == "icrf":
        said = detail.get("ctx", {})
        return Problem(said["code"], path, f"{key}: {said['message']}", said["allowed"], said["hint"])
    field = owner.model_fields.get(name)
    types_, limits = _shape(field) if field else ([], "")
    if kind == "finite_number":
        return Problem("C009", path, f"{key}: must be finite, got {describe(found)}", allowed=limits)
    if kind in _OUT_OF_RANGE:
        return Problem("C007", path, f"{key}: {describe(found).removeprefix('number ')} not in {limits}")
    words = (_words(t, item=len(path) > 1) for t in types_)
    expected = " or ".join(dict.fromkeys(filter(None, words))) or "another type"
    expected += f" in {limits}" if limits else ""
    expected += " or null" if type(None) in types_ else ""
    return Problem("C006", path, f"{key}: expected {expected}, got {describe(found)}", hint=_hint(types_, found))


def _words(type_: Any, *, item: bool) -> str:
    """What a value should be, empty for a type without a word; `item`: the value is one of a list's."""
    if get_origin(type_) is not list:
        return _WORDS.get(type_, "")
    inner = next(_leaf_types(get_args(type_)[0]))
    return _words(inner, item=item) if item else f"a list of {_words(inner, item=item)}"


def _hint(types_: list[Any], found: object) -> str:
    if bool in types_ and isinstance(found, str) and found.lower() in _YAML_1_1_BOOLS:
        return f"In YAML 1.2 '{found}' is a string; write {_YAML_1_1_BOOLS[found.lower()]}."
    if int in types_ and isinstance(found, float) and found.is_integer():
        return f"Write {int(found) if abs(found) < 1e18 else 'it'} without point or exponent."
    if {int, float} & {*types_} and isinstance(found, str) and found.replace(".", "", 1).isdecimal():
        return "Write the number without quotes or leading zeros."
    return ""


def _owner(model: type[BaseModel], path: Path) -> tuple[type[BaseModel], str]:
    """The model and the field name that the end of `path` belongs to."""
    parts = iter(path[:-1])
    for part in parts:
        field = model.model_fields.get(part)
        leaves = list(_leaf_types(field.annotation)) if field else []
        values = [get_args(leaf)[1] for leaf in leaves if get_origin(leaf) is dict]
        inner = next((t for t in (*leaves, *values) if _is_model(t)), None)
        if inner is None:
            return model, path[0]
        if inner in values:
            next(parts, None)  # the key of the mapping
        model = inner
    return model, path[-1]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _shape(field: FieldInfo) -> tuple[list[Any], str]:
    """The leaf types of a field, and its range as an interval such as ``[1, 100]`` or an empty string."""
    bounds = {type(rule): rule for rule in _rules(field)}
    low, high = "(-inf", "inf)"
    if ge := bounds.get(annotated_types.Ge):
        low = f"[{ge.ge}"
    if gt := bounds.get(annotated_types.Gt):
        low = f"({gt.gt}"
    if le := bounds.get(annotated_types.Le):
        high = f"{le.le}]"
    if lt := bounds.get(annotated_types.Lt):
        high = f"{lt.lt})"
    return list(_leaf_types(field.annotation)), f"{low}, {high}" if bounds else ""


_BOUNDS = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)


def _rules(field: FieldInfo) -> Iterator[Any]:
    nested = [rule for annotation in _annotations(field.annotation) for rule in get_args(annotation)[1:]]
    for rule in [*field.metadata, *nested]:
        yield from (r for r in (rule.metadata if isinstance(rule, FieldInfo) else [rule]) if isinstance(r, _BOUNDS))


def _annotations(annotation: Any) -> Iterator[Any]:
    """The ``Annotated`` parts of a type, unions opened."""
    if get_origin(annotation) is Annotated:
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _annotations(part)


def _leaf_types(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _leaf_types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _leaf_types(part)
    else:
        yield annotation
