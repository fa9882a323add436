"""The SDK's side of the wire: :class:`icrf.ports.MediatorPort` over gRPC."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
import tenacity

from icrf.errors import IcrfError, LocalError, ProtocolError
from icrf.protocol import ClusterInfo, MeasuredLink, Plan, RunEvent, RunInfo, Submission
from icrf.wire._generated.icrf.v1 import federation_pb2 as pb
from icrf.wire._generated.icrf.v1 import federation_pb2_grpc
from icrf.wire.addresses import dial_target
from icrf.wire.codec import from_proto, to_proto
from icrf.wire.handshake import explain
from icrf.wire.identity import THE_MEDIATOR
from icrf.wire.status import ACCEPTED_KEY, from_rpc_error, is_unreachable
from icrf.wire.tls import TlsFiles, open_channel

T = TypeVar("T")

CONTACT_S = 5.0
"""How long an idempotent call is repeated while the mediator does not answer."""

GIVE_UP_S = 120.0
"""How long `watch` looks for a mediator that it has lost."""

_HEAVY_TIMEOUT_S = 120.0  # submit and plan: a graph of 100,000 nodes is sent, validated and assigned
_CALL_TIMEOUT_S = 600.0  # a node's method may train; many links take long to measure
_STREAM_TIMEOUT_S = 3_600.0  # a watch is opened anew after that; a download of that length has failed

_PAUSE_S = 0.1
_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_FULL_JITTER = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)


class GrpcMediator:
    """:class:`icrf.ports.MediatorPort` over one channel, which is opened at the first call. Thread-safe.

    Idempotent calls are repeated for :data:`CONTACT_S` while the mediator does not answer, then L001 is raised;
    `call_node` and `send_message` are sent once, as nobody can tell whether a lost call was carried out.

    Args:
        address: ``host:port`` of the mediator.
        timeout_s: deadline of one short call.
        contact_s: how long to try before L001.
        give_up_s: how long `watch` tries after it lost a mediator that it had reached.
        tls: the caller's certificate, one of a user; None: plaintext.

    Raises:
        LocalError: L003 for a malformed address, L002 for one that is not on this machine, without `tls`.
        SecurityError: S001, S002 or S004 for a certificate that cannot be used; calls raise S003 where mediator and
            caller do not get along about TLS.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 20.0,
        contact_s: float = CONTACT_S,
        give_up_s: float = GIVE_UP_S,
        tls: TlsFiles | None = None,
    ) -> None:
        if tls is not None:
            tls.load()
        self._address, self._target = address, dial_target(address, encrypted=tls is not None)
        self._tls = tls
        self._timeout_s, self._contact_s, self._give_up_s = timeout_s, contact_s, give_up_s
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._opened: Any = None
        self._closed = threading.Event()

    # ------------------------------------------------------------ calls

    def submit(self, submission: Submission) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.submit`; repeated safely by its ``client_request_id``."""
        return from_proto(self._repeat("Submit", to_proto(submission), self._heavy_s), RunInfo)

    def plan(self, submission: Submission) -> Plan:
        """See :meth:`icrf.ports.MediatorPort.plan`."""
        return from_proto(self._repeat("Plan", to_proto(submission), self._heavy_s), Plan)

    def get(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.get`."""
        return from_proto(self._repeat("Get", _request(pb.RunRequest, run_id=run_id)), RunInfo)

    def list_runs(self) -> list[RunInfo]:
        """See :meth:`icrf.ports.MediatorPort.list_runs`."""
        return [from_proto(run, RunInfo) for run in self._repeat("ListRuns", pb.ListRunsRequest()).runs]

    def clusters(self) -> list[ClusterInfo]:
        """See :meth:`icrf.ports.MediatorPort.clusters`."""
        return [from_proto(one, ClusterInfo) for one in self._repeat("Clusters", pb.ClustersRequest()).clusters]

    def links(self) -> list[MeasuredLink]:
        """See :meth:`icrf.ports.MediatorPort.links`."""
        return [from_proto(one, MeasuredLink) for one in self._repeat("Links", pb.LinksRequest()).links]

    def measure_links(self) -> list[MeasuredLink]:
        """See :meth:`icrf.ports.MediatorPort.measure_links`."""
        reply = self._repeat("MeasureLinks", pb.LinksRequest(), _CALL_TIMEOUT_S)
        return [from_proto(one, MeasuredLink) for one in reply.links]

    def cancel(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.cancel`."""
        return from_proto(self._repeat("Cancel", _request(pb.RunRequest, run_id=run_id)), RunInfo)

    def advance(self, run_id: str, stage: str, rounds: int = 0) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.advance`; `rounds` is a total, so repeating it is safe."""
        request = _request(pb.AdvanceRequest, run_id=run_id, stage=stage, rounds=rounds)
        return from_proto(self._repeat("Advance", request), RunInfo)

    def change_nodes(self, run_id: str, add: Sequence[str] = (), remove: Sequence[str] = ()) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.change_nodes`."""
        request = _request(pb.ChangeNodesRequest, run_id=run_id, add=list(add), remove=list(remove))
        return from_proto(self._repeat("ChangeNodes", request), RunInfo)

    def finish(self, run_id: str) -> RunInfo:
        """See :meth:`icrf.ports.MediatorPort.finish`."""
        return from_proto(self._repeat("Finish", _request(pb.RunRequest, run_id=run_id)), RunInfo)

    def call_node(self, run_id: str, node_id: str, method: str, arguments: bytes) -> bytes:
        """See :meth:`icrf.ports.MediatorPort.call_node`. Sent once: L001 may come although the node was called."""
        self.get(run_id)  # finds an absent mediator or an unknown run while trying again is still harmless
        request = _request(pb.CallNodeRequest, run_id=run_id, node_id=node_id, method=method, arguments=arguments)
        chunks = self._once(lambda: self._stub().CallNode(request, timeout=_CALL_TIMEOUT_S))
        return b"".join(self._chunks(chunks))

    def send_message(self, run_id: str, recipients: Sequence[str], message: bytes) -> None:
        """See :meth:`icrf.ports.MediatorPort.send_message`. Sent once: L001 may come although it was delivered."""
        self.get(run_id)
        request = _request(pb.SendMessageRequest, run_id=run_id, recipients=recipients, message=message)
        self._once(lambda: self._stub().SendMessage(request, timeout=_CALL_TIMEOUT_S))

    # ------------------------------------------------------------ streams

    def fetch(self, run_id: str, artifact: str) -> Iterator[bytes]:
        """See :meth:`icrf.ports.MediatorPort.fetch`. F006 is raised here, not at the first chunk."""
        request = _request(pb.FetchRequest, run_id=run_id, artifact=artifact)

        def begin() -> tuple[Any, bytes]:
            call = self._stub().Fetch(request, timeout=_STREAM_TIMEOUT_S)
            first = next(call, None)
            return call, b"" if first is None else first.data

        call, first = self._retrying(lambda: self._once(begin), self._contact_s)
        return self._chunks(call, first)

    def watch(self, run_id: str, after_seq: int = 0) -> Iterator[RunEvent]:
        """See :meth:`icrf.ports.MediatorPort.watch`.

        A lost stream is opened anew after the last event that came. Meanwhile events of kind ``warning`` with seq 0
        tell that the mediator is unreachable; after `give_up_s` L001 is raised.
        """
        last_contact: float | None = None
        while True:
            budget_s = self._contact_s if last_contact is None else self._give_up_s
            for attempt in self._retry_policy(budget_s):
                if last_contact is not None and attempt.retry_state.attempt_number > 1:
                    yield self._warning(run_id, last_contact)
                with attempt:
                    call = self._once(functools.partial(self._open_watch, run_id, after_seq))
            last_contact = time.monotonic()
            try:
                for message in call:
                    event = from_proto(message, RunEvent)
                    last_contact, after_seq = time.monotonic(), event.seq
                    yield event
                    if event.kind == "end":
                        return
                return  # the mediator has no more to say: the run had ended before `after_seq`
            except grpc.RpcError as error:
                lost = from_rpc_error(error, self._address)
                if not self._worth_repeating(lost):
                    raise lost from None
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:  # that is a long watch being renewed
                    yield self._warning(run_id, last_contact)
            finally:
                call.cancel()
            # A moment's pause: a mediator that ends every stream at once must not be asked in a tight loop.
            self._closed.wait(_PAUSE_S)

    def _open_watch(self, run_id: str, after_seq: int) -> Any:
        """A watch that the mediator has accepted, which it says in the initial metadata."""
        request = _request(pb.WatchRequest, run_id=run_id, after_seq=after_seq)
        call = self._stub().Watch(request, timeout=_STREAM_TIMEOUT_S)
        if not any(key == ACCEPTED_KEY for key, _ in call.initial_metadata()):
            next(call, None)  # raises what went wrong, and nothing went right
            raise ProtocolError("P004", "the mediator did not accept the watch", place=self._address)
        return call

    def _warning(self, run_id: str, last_contact: float) -> RunEvent:
        text = f"mediator unreachable, retrying (last contact {time.monotonic() - last_contact:.0f} s ago)"
        return RunEvent(run_id=run_id, seq=0, at=time.time(), kind="warning", text=text)

    def _chunks(self, call: Any, first: bytes = b"") -> Iterator[bytes]:
        try:
            if first:
                yield first
            while (chunk := self._once(lambda: next(call, None))) is not None:
                yield chunk.data
        finally:
            call.cancel()

    # ------------------------------------------------------------ connection

    def close(self) -> None:
        """Release the connection; harmless when called twice."""
        self._closed.set()
        with self._lock:
            channel, self._channel, self._opened = self._channel, None, None
        if channel is not None:
            channel.close()

    @property
    def _heavy_s(self) -> float:
        return max(self._timeout_s, _HEAVY_TIMEOUT_S)

    def _stub(self) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise self._closed_error()
            if self._opened is None:
                self._channel = open_channel(self._target, self._tls, THE_MEDIATOR)
                self._opened = federation_pb2_grpc.FederationStub(self._channel)
            return self._opened

    def _repeat(self, method: str, request: Any, timeout_s: float = 0.0) -> Any:
        """An idempotent unary call."""
        deadline_s = timeout_s or self._timeout_s
        return self._retrying(
            lambda: self._once(lambda: getattr(self._stub(), method)(request, timeout=deadline_s)), self._contact_s
        )

    def _retrying(self, call: Callable[[], T], budget_s: float) -> T:
        return self._retry_policy(budget_s)(call)

    def _retry_policy(self, budget_s: float) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._worth_repeating),
            wait=_FULL_JITTER,
            stop=tenacity.stop_after_delay(budget_s),
            sleep=self._pause,
            reraise=True,
        )

    def _pause(self, delay_s: float) -> None:
        """Sleep that `close` ends."""
        self._closed.wait(delay_s)

    def _worth_repeating(self, error: BaseException) -> bool:
        return isinstance(error, IcrfError) and is_unreachable(error) and not self._closed.is_set()

    def _once(self, call: Callable[[], T]) -> T:
        """Run one gRPC operation; whatever it raises becomes an error of the tree."""
        try:
            return call()
        except grpc.RpcError as error:
            failure = from_rpc_error(error, self._address)
            if is_unreachable(failure) and isinstance(error, grpc.Call) and error.code() is _UNAVAILABLE:
                failure = explain(self._target, self._tls, THE_MEDIATOR) or failure
            raise failure from None
        except ValueError as error:
            # What grpc raises for a channel that another thread has closed meanwhile.
            if self._closed.is_set():
                raise self._closed_error() from None
            raise from_rpc_error(error, self._address) from error

    def _closed_error(self) -> LocalError:
        hint = "open a new one with connect()"
        return LocalError("L001", "this connection to the mediator is closed", place=self._address, hint=hint)


def _request(message_class: Callable[..., T], **fields: object) -> T:
    """A request; P001 if a value cannot travel, for instance a run id that is no valid text."""
    try:
        return message_class(**fields)
    except (TypeError, ValueError) as error:
        raise ProtocolError("P001", f"the request cannot be sent: {error}", place=", ".join(fields)) from None
