"""A wide-area network on one machine: userspace proxies that delay, pace, stall and reset what passes.

A :class:`WanLine` is the line of one cluster to the rest of the world. Whatever goes through its proxies shares its
rate in each direction, connection by connection in turns, as behind a fair router; bytes are counted as they pass. It
needs no privileges and shapes TCP connections to addresses of this machine only.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from icrf.errors import LocalError
from icrf.loop_thread import LoopThread

PACED_READ = 16 << 10
FREE_READ = 64 << 10
MIN_IN_FLIGHT = 256 << 10
FREE_IN_FLIGHT = 16 << 20
_CANCEL_AGAIN_S = 1.0

_PART = re.compile(r"(?:(jitter)=)?(\d+(?:\.\d+)?)(us|ms|s|kbit|mbit|gbit)")
_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}
_BYTES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
_ALLOWED = "ROUNDTRIP,RATE[,jitter=TIME], for example 80ms,50mbit"


@dataclass(frozen=True)
class WanShape:
    """What a line does to its traffic.

    Attributes:
        round_trip_s: added to the time of a round trip, half of it in each direction.
        jitter_s: each direction's half varies by up to this; what passes keeps its order.
        bytes_per_s: in each direction; 0: not limited.
    """

    round_trip_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0


def parse_wan(text: str, *, place: str = "--wan") -> WanShape:
    """Read ``80ms,50mbit`` or ``80ms,50mbit,jitter=5ms``; every part may be left out.

    Raises:
        LocalError: L009 for anything else.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip().lower())
        unit = match[3] if match else ""
        name = "" if match is None else match[1] or ("rate" if unit in _BYTES else "delay")
        if match is None or name in found or (name == "jitter" and unit in _BYTES):
            raise LocalError("L009", f"{part.strip()!r} says nothing about a line", place=place, allowed=_ALLOWED)
        value = float(match[2])
        found[name] = value * _BYTES[unit] if unit in _BYTES else value / _PER_SECOND[unit]
    return WanShape(found.get("delay", 0.0), found.get("jitter", 0.0), found.get("rate", 0.0))


class _Lane:
    """One direction of a line: paces and counts what all connections send in it."""

    def __init__(self, shape: WanShape, seed: int) -> None:
        self.shape = shape
        self.num_bytes = 0
        self._free_at = 0.0
        self._random = random.Random(seed)

    @property
    def in_flight(self) -> int:
        """Bytes of one connection that may be under way."""
        if not self.shape.bytes_per_s:
            return FREE_IN_FLIGHT
        return max(MIN_IN_FLIGHT, int(2 * self.shape.bytes_per_s * self.shape.round_trip_s))

    async def enter(self, size: int) -> None:
        """Wait until the line has taken `size` bytes. Whoever asks next gets the time after that."""
        if self.shape.bytes_per_s:
            now = asyncio.get_running_loop().time()
            self._free_at = max(now, self._free_at) + size / self.shape.bytes_per_s
            await asyncio.sleep(self._free_at - now)

    def travel_s(self) -> float:
        """How long the next bytes take from end to end."""
        jitter = self._random.uniform(-self.shape.jitter_s, self.shape.jitter_s) if self.shape.jitter_s else 0.0
        return max(0.0, self.shape.round_trip_s / 2 + jitter)


class WanLine:
    """The line of one cluster; a context manager.

    Args:
        shape: how it behaves.
        seed: of the jitter.
    """

    def __init__(self, shape: WanShape, *, seed: int = 0) -> None:
        self._up, self._down = _Lane(shape, 2 * seed), _Lane(shape, 2 * seed + 1)
        self._thread = LoopThread("icrf-wan")
        self._servers: list[asyncio.Server] = []
        self._writers: dict[asyncio.StreamWriter, str] = {}
        self._passed: Counter[str] = Counter()
        self._limits: dict[str, int] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._running = self._thread.call(_open_gate())

    @property
    def bytes_up(self) -> int:
        """Bytes that have left the cluster."""
        return self._up.num_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes that have come to the cluster."""
        return self._down.num_bytes

    def passed(self, way: str) -> int:
        """Bytes that have passed one of the ways in or out, in both directions."""
        return self._passed[way]

    def way_out(self, target: str) -> str:
        """An address that leads the cluster's own connections to `target`, which is ``HOST:PORT``."""
        return self._thread.call(self._listen(target, self._up, self._down))

    def way_in(self, target: str) -> str:
        """An address at which others reach what the cluster itself listens on at `target`."""
        return self._thread.call(self._listen(target, self._down, self._up))

    def stall(self) -> None:
        """Nothing comes out of the line any more, and no connection ends."""
        self._thread.call(self._run(self._running.clear))

    def go_on(self) -> None:
        """End of a stall."""
        self._thread.call(self._run(self._running.set))

    def reset(self, way: str = "") -> None:
        """End all connections, or those of one way, with a reset; what is under way is lost. New ones are taken."""
        self._thread.call(self._run(lambda: self._reset(way)))

    def reset_after(self, num_bytes: int, way: str) -> None:
        """Reset the connections of a way once, as soon as so many more bytes have passed it."""
        self._limits[way] = self._passed[way] + num_bytes

    def close(self) -> None:
        """End all connections and the thread; harmless when called twice."""
        if not self._thread.loop.is_closed():
            self._thread.call(self._close())
            self._thread.close()

    def __enter__(self) -> WanLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ on the loop

    async def _run(self, work: Callable[[], object]) -> None:
        work()

    def _reset(self, way: str) -> None:
        for writer in [writer for writer, its in self._writers.items() if way in ("", its)]:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        while serving := set(self._serving):
            # Again and again: a task group that is about to end by itself may lose a cancellation.
            for task in serving:
                task.cancel()
            await asyncio.wait(serving, timeout=_CANCEL_AGAIN_S)
        await asyncio.gather(*(server.wait_closed() for server in self._servers))

    async def _listen(self, target: str, there: _Lane, back: _Lane) -> str:
        host, _, port = target.rpartition(":")

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._serve(reader, writer, (host.strip("[]"), int(port)), (there, back)))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        target: tuple[str, int],
        lanes: tuple[_Lane, _Lane],
    ) -> None:
        """One connection, until an end of it is gone."""
        host, port = writer.get_extra_info("sockname")
        way, ends = f"{host}:{port}", [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*target)
            ends.append(far_writer)
            self._writers.update(dict.fromkeys(ends, way))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, lanes[0], way))
                group.create_task(self._pump(far_reader, writer, lanes[1], way))
        except* (OSError, asyncio.CancelledError):
            # An end is gone, or the line is being closed: either way this connection is over.
            pass
        finally:
            for end in ends:
                self._writers.pop(end, None)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: _Lane, way: str) -> None:
        """Bytes of one connection in one direction, until its sender ends it."""
        pipe = _Pipe(lane.in_flight)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(reader, pipe, lane))
            group.create_task(self._give(writer, pipe, lane, way))

    async def _take(self, reader: asyncio.StreamReader, pipe: _Pipe, lane: _Lane) -> None:
        clock = asyncio.get_running_loop().time
        while data := await reader.read(PACED_READ if lane.shape.bytes_per_s else FREE_READ):
            await lane.enter(len(data))
            await pipe.put(clock() + lane.travel_s(), data)
        await pipe.put(clock(), b"")

    async def _give(self, writer: asyncio.StreamWriter, pipe: _Pipe, lane: _Lane, way: str) -> None:
        while data := await pipe.get():
            await self._running.wait()
            writer.write(data)
            await writer.drain()
            lane.num_bytes += len(data)
            self._passed[way] += len(data)
            if self._passed[way] >= self._limits.get(way, self._passed[way] + 1):
                del self._limits[way]
                self._reset(way)
        if writer.can_write_eof():
            writer.write_eof()


class WanLines:
    """A line for each cluster, and what a fabric needs to lead its traffic over them.

    Args:
        clusters: their names.
        shape: of every line, or by cluster those that do more than count.
    """

    def __init__(self, clusters: Iterable[str], shape: WanShape | Mapping[str, WanShape]) -> None:
        shapes = {name: shape if isinstance(shape, WanShape) else shape.get(name, WanShape()) for name in clusters}
        self.lines = {name: WanLine(its, seed=number) for number, (name, its) in enumerate(shapes.items())}
        self._ways: dict[tuple[str, str], str] = {}

    def way_out(self, cluster: str, target: str) -> str:
        """Where a cluster's agent reaches `target`."""
        return self.lines[cluster].way_out(target)

    def reach(self, cluster: str, address: str) -> str:
        """Where others reach the gateway that listens at `address` on a cluster; the same each time it is asked."""
        if not address or cluster not in self.lines:
            return address
        if (cluster, address) not in self._ways:
            self._ways[cluster, address] = self.lines[cluster].way_in(address)
        return self._ways[cluster, address]

    def payload_bytes(self) -> int:
        """What gateways have exchanged without the mediator, in both directions of all connections."""
        return sum(self.lines[cluster].passed(way) for (cluster, _), way in self._ways.items())

    def close(self) -> None:
        """Close all lines; harmless when called twice."""
        for line in self.lines.values():
            line.close()


class _Pipe:
    """What is under way: it comes out in order and not before its time, and takes a limited number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._items: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._room = asyncio.Event()

    async def put(self, due: float, data: bytes) -> None:
        self._size += len(data)
        self._items.put_nowait((due, data))
        while self._size > self._limit:
            self._room.clear()
            await self._room.wait()

    async def get(self) -> bytes:
        due, data = await self._items.get()
        left_s = due - asyncio.get_running_loop().time()
        if left_s > 0.0:
            await asyncio.sleep(left_s)
        self._size -= len(data)
        self._room.set()
        return data


async def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate
