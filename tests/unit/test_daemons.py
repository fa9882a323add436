"""The daemons of a test environment: lives, readiness, supervision, and an end that leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from icrf.errors import AgentError, LocalError
from icrf.testing.daemons import Daemon, Supervisor
from icrf.testing.processes import await_end, command_line, end_all, marked
from icrf.testing.waiting import until

SERVE = "import time; print('ready at 1234', flush=True); time.sleep(600)"
CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""
MARK = "ICRF_TEST"


class Made:
    """A daemon with a mark of its own."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.script = SERVE
        environment = {**os.environ, MARK: self.mark}
        command = lambda: [sys.executable, "-c", self.script]  # noqa: E731 - it asks for the script each time
        self.daemon = Daemon("d", command, environment, folder / "d.log", re.compile(r"ready at (\d+)"), "A003")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    found = Made(tmp_path)
    yield found
    found.daemon.terminate(5)
    end_all(MARK, found.mark)


def test_it_is_ready_when_it_says_so_and_ends_when_told(made: Made) -> None:
    made.daemon.start()
    assert made.daemon.wait_ready(20)[1] == "1234"
    made.daemon.start()
    assert made.daemon.starts == 1
    assert made.daemon.terminate() == -signal.SIGTERM
    assert not made.daemon.alive


def test_each_life_has_its_own_log_and_all_are_kept(made: Made) -> None:
    for _ in range(2):
        made.daemon.restart()
        made.daemon.wait_ready(20)
    assert made.daemon.log().count("ready") == 2
    assert made.daemon.log(this_life=True).count("ready") == 1


def test_one_that_does_not_come_up_shows_the_end_of_its_log(made: Made) -> None:
    made.script = "import sys; sys.exit('no such thing')"
    made.daemon.start()
    with pytest.raises(AgentError, match=r"A003 d: d ended with 1\. The end of .*d\.log:\nno such thing"):
        made.daemon.wait_ready(20)
    made.script = "import time; time.sleep(600)"
    made.daemon.restart()
    with pytest.raises(AgentError, match="was not ready within 0 s"):
        made.daemon.wait_ready(0.2)


def test_a_supervisor_starts_it_again_unless_it_was_ended_on_purpose(made: Made) -> None:
    made.daemon.start()
    made.daemon.wait_ready(20)
    supervisor = Supervisor([made.daemon])
    try:
        first = made.daemon.pid
        made.daemon.kill()
        made.daemon.wait_ready(20, supervised=True)
        assert made.daemon.pid != first
        assert made.daemon.starts == 2
        made.daemon.terminate()
        made.daemon.revive()
        assert not made.daemon.alive
    finally:
        supervisor.close()


def test_nothing_marked_outlives_the_end_not_even_in_another_session(made: Made) -> None:
    made.script = CHILD + SERVE
    made.daemon.start()
    made.daemon.wait_ready(20)
    until(lambda: len(marked(MARK, made.mark)) >= 2, 20)
    pids = marked(MARK, made.mark)
    assert len(pids) == 2
    assert all("time.sleep(600)" in command_line(pid) for pid in pids)
    end_all(MARK, made.mark)
    made.daemon.kill()
    assert all(await_end(pid) for pid in pids)
    assert marked(MARK, made.mark) == []


def test_unknown_victims_are_refused_by_name() -> None:
    from icrf.testing.environment import FabricEnvironment  # noqa: PLC0415 - loads the agent's code

    environment = FabricEnvironment.__new__(FabricEnvironment)
    for call in (environment.ray_pids, environment.actor_pids):
        with pytest.raises(LocalError, match="L009"):
            call("local-1", "nobody")
