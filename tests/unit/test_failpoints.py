"""Fail-points: what they are called, that each fires once, and that a process without them knows nothing of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from icrf.errors import ConfigError
from icrf.failpoints import FOLDER_VARIABLE, VARIABLE, Point, arm, fired, parse, reached, release

SCRIPT = """
import sys
from icrf import failpoints
failpoints.set_role(sys.argv[1])
for number in (1, 2, 3):
    for phase in ("train", "commit"):
        failpoints.reached(phase, number)
print("through")
"""


def run(role: str, points: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {VARIABLE: points, FOLDER_VARIABLE: str(folder)}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, role], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_each_point_kills_its_process_once(tmp_path: Path) -> None:
    points = "train:2, mediator@commit:3"
    assert run("mediator", points, tmp_path).returncode == -signal.SIGKILL
    assert fired(tmp_path) == ["train:2"]
    assert run("mediator", points, tmp_path).returncode == -signal.SIGKILL
    assert fired(tmp_path) == ["mediator@commit:3", "train:2"]
    assert run("mediator", points, tmp_path).stdout == "through\n"


def test_a_role_keeps_the_others_alive(tmp_path: Path) -> None:
    assert run("agent-b", "agent-a@train:1", tmp_path).stdout == "through\n"
    assert fired(tmp_path) == []


def test_a_held_process_goes_on_when_it_is_let(tmp_path: Path) -> None:
    release(tmp_path, "agent-a@train:1")
    assert run("agent-a", "agent-a@train:1!hold", tmp_path).stdout == "through\n"
    assert fired(tmp_path) == ["agent-a@train:1"]


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    reached("train", 1)
    assert parse({}) == ((), Path())


def test_points_as_they_are_written(tmp_path: Path) -> None:
    points, folder = parse({VARIABLE: "submit:0,agent-us-east@exchange:3!hold", FOLDER_VARIABLE: str(tmp_path)})
    assert points == (Point("", "submit", 0, False), Point("agent-us-east", "exchange", 3, True))
    assert folder == tmp_path


@pytest.mark.parametrize(
    "text", ["train", "trian:3", "train:x", "train:-1", ",", "a b@train:1", "train:1!stop", "@train:1"]
)
def test_malformed_points_are_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE) as caught:
        parse({VARIABLE: text, FOLDER_VARIABLE: str(tmp_path)})
    assert caught.value.code == "C006"


def test_armed_points_are_read_from_the_folder(tmp_path: Path) -> None:
    assert run("mediator", "@armed", tmp_path).stdout == "through\n"
    arm(tmp_path, "train:2")
    assert run("mediator", "@armed", tmp_path).returncode == -signal.SIGKILL
    assert fired(tmp_path) == ["train:2"]
    arm(tmp_path, "")
    assert fired(tmp_path) == []
    assert run("mediator", "@armed", tmp_path).stdout == "through\n"


def test_points_need_their_folder(tmp_path: Path) -> None:
    for folder in ("", str(tmp_path / "absent")):
        with pytest.raises(ConfigError, match=FOLDER_VARIABLE) as caught:
            parse({VARIABLE: "train:1", FOLDER_VARIABLE: folder})
        assert caught.value.code == "C006"
