"""What every test gets: a quiet, private environment, the slow tier, and guards against leaked work.

Nothing a test starts may outlive it. Threads are checked after each test; processes at the end of the session:
children of pytest by their parentage, and those that left it (keepers, daemons) by a mark in their environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from benchmarks.document import read_part, table, write_part
from icrf.testing.processes import marked

MARK = "ICRF_TEST_SESSION"
PROCESS_GRACE_S = 20.0
THREAD_GRACE_S = 5.0
KILL_GRACE_S = 5.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", default=False, help="run the tests marked slow too")
    parser.addoption("--seeds", type=int, default=300, help="how many histories the simulation tests (default: 300)")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports torch or Ray; they read it when they are loaded."""
    # Examples take as long as they take: a busy machine is no reason to fail.
    settings.register_profile("without a deadline", deadline=None)
    settings.load_profile("without a deadline")
    # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Short on purpose: sockets lie below it, and a Unix socket's path has at most 107 bytes.
    state = tempfile.mkdtemp(prefix="icrf-")
    environment = {
        MARK: uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
        "XDG_STATE_HOME": state,
    }
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    # A mediator that happens to run on this machine is none of the tests' business.
    patch.delenv("ICRF_MEDIATOR", raising=False)
    config.add_cleanup(patch.undo)
    config.add_cleanup(lambda: shutil.rmtree(state, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: only with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def _write_table(
    variable: str, script: str, header: Sequence[str], rows: Sequence[Sequence[str]], keep_others: bool = False
) -> None:
    """Write the table that `script` measures into the document that an environment variable names, if it is set.

    With `keep_others` only rows of the same first two cells are replaced, and those that are new come last.
    """
    if not (target := os.environ.get(variable)):
        return
    path = Path(target)
    if keep_others:
        lines = read_part(path, script).splitlines()[2:]
        found = [tuple(line.strip("| ").split(" | ")) for line in lines]
        rows = list({tuple(row[:2]): row for row in (*found, *rows)}.values())
    write_part(path, script, table(header, rows))


@pytest.fixture(scope="session")
def write_table() -> Callable[..., None]:
    """The way in which what tests measure gets into a document; see :func:`_write_table`."""
    return _write_table


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "<ended>"


def _marked(mark: str) -> Iterator[psutil.Process]:
    """Processes that carry the mark in the environment they were started with, wherever they hang in the tree."""
    for pid in marked(MARK, mark):
        try:
            yield psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile


def _leaked_processes(mark: str) -> list[psutil.Process]:
    me = psutil.Process()
    found = {*me.children(recursive=True), *_marked(mark)} - {me}
    # The standard library's own helper of multiprocessing; it ends with the interpreter and not before.
    return [p for p in found if "multiprocessing.resource_tracker" not in _command_line(p)]


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_session() -> Iterator[None]:
    mark = os.environ[MARK]
    yield
    _, alive = psutil.wait_procs(_leaked_processes(mark), timeout=PROCESS_GRACE_S)
    # Asked again: one that was waited for may have started another.
    alive = list({*alive, *_leaked_processes(mark)})
    if not alive:
        return
    text = "\n".join(f"  pid {p.pid}: {_command_line(p)[:300]}" for p in alive)
    for process in alive:
        try:
            process.kill()  # ours by parentage or mark, and a leak must not disturb the next run
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=KILL_GRACE_S)
    pytest.fail(f"{len(alive)} processes outlive the tests (killed now):\n{text}", pytrace=False)


@pytest.fixture(autouse=True)
def _no_thread_outlives_its_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    started = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in started:
        thread.join(THREAD_GRACE_S)
    alive = [t.name for t in started if t.is_alive()]
    if alive:
        pytest.fail(f"threads outlive the test: {', '.join(alive)}", pytrace=False)
