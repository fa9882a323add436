"""Plug-ins are found by name, by import path or as entry points; what cannot be found or loaded is explained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from icrf.errors import ConfigError
from icrf.registry import Registry, did_you_mean, is_import_path, load_attr, nearest, register, registered_names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; modules imported from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_registered_objects_are_found_by_name() -> None:
    registry: Registry[object] = Registry("colour")

    @registry.register("red")
    def red() -> None: ...

    registry.add("blue", 3)
    assert registry.get("red") is red
    assert registry.get("blue") == 3
    assert registry.names() == ("blue", "red")
    assert registered_names("colour") == {"blue", "red"}
    assert registered_names("taste") == set()


def test_a_name_is_taken_once_but_its_definition_may_come_again() -> None:
    registry: Registry[object] = Registry("colour")

    def definition() -> object:
        def red() -> None: ...

        return red

    registry.add("red", definition())
    again = definition()
    registry.add("red", again)
    assert registry.get("red") is again
    with pytest.raises(ConfigError, match="colour 'red' is registered already") as caught:
        registry.add("red", pytest)
    assert caught.value.code == "C008"


def test_an_unknown_name_lists_what_is_known_and_the_nearest() -> None:
    registry: Registry[int] = Registry("colour")
    registry.add("red", 1)
    registry.add("green", 2)
    with pytest.raises(ConfigError) as caught:
        registry.get("gren")
    assert caught.value.code == "C010"
    assert str(caught.value) == "C010 colour 'gren' unknown; allowed: green, red. Did you mean 'green'?"


def test_import_paths_and_entry_points(package: Path) -> None:
    (package / "mine_plugin.py").write_text("class Outer:\n    class Inner: ...\nvalue = 5\n")
    info = package / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[icrf.colour]\npurple = mine_plugin:value\nbroken = mine_plugin:nothing\n")
    registry: Registry[object] = Registry("colour")
    assert registry.get("mine_plugin:Outer.Inner") is sys.modules["mine_plugin"].Outer.Inner
    assert registry.get("purple") == 5
    assert registry.names() == ("broken", "purple")
    assert "purple" in registered_names("colour")
    with pytest.raises(ConfigError, match="broken") as caught:
        registry.get("broken")
    assert caught.value.code == "C017"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_thing_at_all", "No module named 'no_such_thing_at_all'"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_code_that_fails_to_import_gives_the_reason(package: Path, source: str, reason: str) -> None:
    (package / "failing_plugin.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_attr("failing_plugin:thing")
    assert caught.value.code == "C017"
    assert reason in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_is_missing_is_named(package: Path) -> None:
    (package / "tidy_plugin.py").write_text("def build_model(): ...\n")
    with pytest.raises(ConfigError, match=r"has no 'build_modl'.*Did you mean 'build_model'"):
        load_attr("tidy_plugin:build_modl")
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        load_attr("absent_plugin:thing")


@pytest.mark.parametrize("path", ["", ":", "a", "a:", ":b", "a:b:c", "a b:c", "../a:b", "a.:b", "1a:b", "a:b()"])
def test_malformed_import_paths(path: str) -> None:
    assert not is_import_path(path)
    with pytest.raises(ConfigError) as caught:
        load_attr(path)
    assert caught.value.code == "C017"


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("rounds", "federated_learning_rounds"),
        ("lr", "learning_rate"),
        ("Seed", "seed"),
        ("epochs", "number_of_epochs"),
        ("batchsize", "batch_size"),
    ],
)
def test_suggestions(name: str, best: str) -> None:
    keys = ("federated_learning_rounds", "learning_rate", "seed", "number_of_epochs", "batch_size", "device")
    assert nearest(name, keys)[:1] == (best,)
    assert f"'{best}'" in did_you_mean(name, keys)
    assert did_you_mean("xyzzy", keys) == ""


def test_a_plug_in_is_known_to_the_registry_of_its_kind_whichever_was_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icrf.registry.KINDS", ("flavour",))
    early, late = object(), object()
    register("flavour", "early")(early)
    assert "early" in registered_names("flavour")
    registry: Registry[object] = Registry("flavour")
    register("flavour", "late")(late)
    assert (registry.get("early"), registry.get("late")) == (early, late)
    with pytest.raises(ConfigError, match="C008 flavour 'late' is registered already"):
        register("flavour", "late")(early)


def test_an_unknown_kind_of_plug_in_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"C010 kind of plug-in 'data set' unknown.*Did you mean 'dataset'"):
        register("data set", "mine")
