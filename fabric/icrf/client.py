"""The SDK: a :class:`Fabric` that takes federations, the :class:`Run` that follows one, its :class:`Result`.

The same objects work on an embedded fabric and on a remote mediator: what differs is the port that was injected.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from icrf.comparison import COMPARED, compare_plans
from icrf.console.format import short_id
from icrf.errors import ConfigError, IcrfError, LocalError, ResourceError, RunError, error_from_dict
from icrf.model_file import ARTIFACT, receive_model, write_file
from icrf.ports import MediatorPort
from icrf.protocol import (
    CANCELLED,
    FAILED,
    STOP,
    TERMINAL,
    ClusterInfo,
    MeasuredLink,
    Plan,
    RoundResult,
    RunEvent,
    RunInfo,
    Submission,
)
from icrf.report import curve_svg, summary_table
from icrf.run_folder import RunFolder, default_folder, plan_from_dict, summarize
from icrf.sinks import MetricsSink, Sinks, opened
from icrf.spec import FederationConfig
from icrf.submission import build_submission, on_path

if TYPE_CHECKING:
    import torch

# A wait with a time limit asks this often; without one it follows the event stream.
_POLL_S = 0.1
_PLAN_ARTIFACT = "plan.json"


class LocalHandle(Protocol):
    """An embedded fabric: the port of its mediator core, and how to end all that was started."""

    @property
    def port(self) -> MediatorPort: ...

    @property
    def templates(self) -> dict[str, type]:
        """Node classes of this process by ``local:NAME``; filled by those who submit."""

    @property
    def takes_classes(self) -> bool:
        """Whether node classes of this process can run there."""

    def node_handle(self, run_id: str, index: int) -> tuple[Any, bool] | None:
        """The actor of a node's host and whether the node has it alone; None from another process."""

    def close(self) -> None:
        """End every process and thread of it; harmless when called twice."""


class OpenLocal(Protocol):
    """Starts an embedded fabric. `on_progress` is called with what has just become true, e.g. ``cluster a ready``."""

    def __call__(
        self, clusters: int, *, state_dir: Path | None, on_progress: Callable[[str], None] | None
    ) -> LocalHandle: ...


def connect(
    address: str | None = None,
    *,
    clusters: int = 1,
    state_dir: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
    open_local: OpenLocal | None = None,
    tls: Path | str | None = None,
) -> Fabric:
    """Open a fabric.

    Args:
        address: ``host:port`` of a mediator; without it an embedded fabric is started.
        clusters: how many local Ray clusters an embedded fabric has.
        state_dir: where an embedded fabric keeps its state; a temporary folder by default.
        on_progress: told each step of an embedded start when it is done.
        open_local: starts the embedded fabric; ``icrf.connect`` hands it in.
        tls: folder of a user's certificate (``fabric-mediator certs issue --user NAME``), for a mediator that wants
            one; by default what ``$ICRF_TLS_DIR`` names, and plaintext on this machine without it.

    Raises:
        LocalError: L001 mediator unreachable, L002 plaintext to another machine, L003 malformed address, L009
            `clusters` together with `address`, or `tls` without it.
        SecurityError: S001, S002 or S004 for a certificate that cannot be used.
    """
    if address is not None:
        if clusters != 1:
            raise LocalError("L009", "clusters= is for an embedded fabric; it has no meaning with an address")
        from icrf.wire.mediator_client import GrpcMediator  # noqa: PLC0415 - keeps gRPC out of light commands
        from icrf.wire.tls import ENVIRONMENT, TlsFiles  # noqa: PLC0415

        return Fabric(GrpcMediator(address, tls=TlsFiles.at(tls or os.environ.get(ENVIRONMENT) or None)))
    if tls is not None:
        raise LocalError("L009", "tls= is for a mediator's address; an embedded fabric needs no certificate")
    if open_local is None:
        raise LocalError("L009", "no address and no way to open an embedded fabric", hint="use icrf.connect()")
    handle = open_local(clusters, state_dir=state_dir, on_progress=on_progress)
    return Fabric(handle.port, local=handle, code_path=_own_folder())


class Fabric:
    """Takes federations; a context manager.

    Args:
        port: the mediator; closed with this object.
        local: the embedded fabric behind it, which ends with this object.
        code_path: folder of the user's own modules, for configurations submitted without one.
    """

    def __init__(self, port: MediatorPort, *, local: LocalHandle | None = None, code_path: str = "") -> None:
        self._port = port
        self._code_path = code_path
        self._local = local

    @property
    def port(self) -> MediatorPort:
        """The mediator behind this fabric."""
        return self._port

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, federation: FederationConfig | Submission, *, sinks: Sequence[MetricsSink | str] = (), **options: Any
    ) -> Run:
        """Submit a federation; it starts as soon as its clusters have room.

        Args:
            federation: a configuration, or a submission that was built before.
            sinks: where its metrics go while it is followed, objects or descriptions, see :mod:`icrf.sinks`.
            options: those of :func:`icrf.submission.build_submission`, for a configuration.
        """
        submission = self._resolved(federation, options)
        chosen = opened(sinks)
        return Run(self._port, self._port.submit(submission).run_id, submission, chosen)

    def plan(self, federation: FederationConfig | Submission, **options: Any) -> Plan:
        """Dry run on the clusters registered now: where nodes would go and what would cross. Changes nothing."""
        return self._port.plan(self._resolved(federation, options))

    def compare(
        self, federation: FederationConfig | Submission, strategies: Sequence[str] = COMPARED, **options: Any
    ) -> dict[str, Plan | IcrfError]:
        """Dry runs of a federation under several assignment strategies, by strategy, its own first; of one that makes
        no plan, the error."""
        return compare_plans(self._port.plan, self._resolved(federation, options), strategies)

    def _resolved(self, federation: FederationConfig | Submission, options: Mapping[str, Any]) -> Submission:
        if not isinstance(federation, Submission):
            return build_submission(federation, **{"code_path": self._code_path, **options})
        if options:
            raise LocalError("L009", f"a built submission takes no options: {', '.join(options)}")
        return federation

    def runs(self) -> list[Run]:
        """All runs the mediator knows, newest first."""
        return [Run(self._port, info.run_id) for info in self._port.list_runs()]

    def run(self, id_prefix: str, *, sinks: Sequence[MetricsSink | str] = ()) -> Run:
        """The run whose id begins with `id_prefix`; F001 if there is none, F004 if there are several."""
        return Run(self._port, self._port.get(id_prefix).run_id, sinks=opened(sinks))

    def clusters(self) -> list[ClusterInfo]:
        """The registered clusters by name."""
        return self._port.clusters()

    def links(self) -> list[MeasuredLink]:
        """What was last measured between the registered clusters; empty where nobody has measured."""
        return self._port.links()

    def measure_links(self) -> list[MeasuredLink]:
        """Measure every link between connected clusters, which takes seconds for each; placement goes by it from then
        on. A link that could not be measured carries its error; A005 for fewer than two clusters."""
        return self._port.measure_links()

    @property
    def takes_classes(self) -> bool:
        """Whether node classes of this process can run on it: only where no cluster boundary is crossed."""
        return self._local is not None and self._local.takes_classes

    def add_template(self, template: type) -> str:
        """Make a node class of this process known; the name by which a configuration means it."""
        if self._local is None or not self._local.takes_classes:
            return f"{template.__module__}:{template.__qualname__}"
        templates = self._local.templates
        for name, known in templates.items():
            if known is template:
                return name
        name = f"local:{template.__name__}_{len(templates)}"
        templates[name] = template
        return name

    def host_of(self, run_id: str, index: int) -> tuple[Any, bool] | None:
        """The Ray actor of a node's host and whether the node has it alone; None where it lives in another process."""
        return None if self._local is None else self._local.node_handle(run_id, index)

    def close(self) -> None:
        """Close the connection; ends an embedded fabric. Harmless when called twice."""
        try:
            self._port.close()
        finally:
            local, self._local = self._local, None
            if local is not None:
                local.close()


class Run:
    """One run of a federation.

    Attributes:
        id: the full run id; any unique prefix of it finds the run again.
    """

    def __init__(
        self,
        port: MediatorPort,
        run_id: str,
        submission: Submission | None = None,
        sinks: Sequence[MetricsSink] = (),
    ) -> None:
        self._port = port
        self._submission = submission
        self._sinks = Sinks(sinks)
        self.id = run_id

    def __repr__(self) -> str:
        return f"Run({short_id(self.id)})"

    def info(self) -> RunInfo:
        """Where the run stands now, and what it waits for."""
        return self._port.get(self.id)

    @property
    def submission(self) -> Submission | None:
        """What was submitted, where that was done with this object."""
        return self._submission

    def clusters(self) -> list[ClusterInfo]:
        """The clusters that are registered now, by name."""
        return self._port.clusters()

    def events(self, after_seq: int = 0) -> Iterator[RunEvent]:
        """Every event with a larger number than `after_seq`, past ones first, then live, until the run has ended."""
        if not self._sinks:
            return self._port.watch(self.id, after_seq)
        return self._events_told(after_seq)

    def _events_told(self, after_seq: int) -> Iterator[RunEvent]:
        """The events, each told to the sinks before it is handed out."""
        for event in self._port.watch(self.id, min(after_seq, self._sinks.seen)):
            self._sinks.show(event, self.info)
            if event.seq > after_seq:
                yield event

    def rounds(self) -> Iterator[RoundResult]:
        """Committed rounds, past ones first, then live; ends with the run, however it ends (see :meth:`result`)."""
        for event in self.events():
            if event.round is not None:
                yield event.round

    def committed_rounds(self) -> list[RoundResult]:
        """The rounds committed so far, without waiting for more."""
        expected = self.info().rounds_done
        found: list[RoundResult] = []
        if expected:
            for result in self.rounds():
                found.append(result)
                if result.number >= expected:
                    break
        return found

    def plan(self) -> Plan | None:
        """Where the nodes were placed; None if the mediator kept no plan of this run."""
        try:
            return plan_from_dict(json.loads(b"".join(self._port.fetch(self.id, _PLAN_ARTIFACT))))
        except RunError as error:
            if error.code != "F006":
                raise
        try:
            return self._port.plan(self._submission) if self._submission is not None else None
        except ResourceError:
            # The clusters it ran on are gone; a plan for others would be no plan of this run.
            return None

    def wait(self, timeout_s: float | None = None) -> RunInfo:
        """Wait for the end and return the last state; after `timeout_s`, the state reached by then."""
        if timeout_s is None:
            for _ in self.events():
                pass
            return self.info()
        deadline_s = time.monotonic() + timeout_s
        while (info := self.info()).status not in TERMINAL:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            time.sleep(min(_POLL_S, left_s))
        if info.status in TERMINAL and self._sinks:
            return self.wait()  # which tells the sinks what was not read yet
        return info

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the end and download the model.

        Raises:
            RunError: F002 if the run failed, with the error that ended it as ``__cause__``; F003 if it was cancelled;
                F005 if it has not ended after `timeout_s`.
            ProtocolError: P021 if the model is not the one that was committed.
        """
        info = self.wait(timeout_s)
        if info.status not in TERMINAL:
            raise RunError(
                "F005",
                f"run {short_id(self.id)} has not ended after {timeout_s:g} s",
                value=info.status,
                hint=f"it waits for {info.waiting_for}" if info.waiting_for else "",
            )
        raise_unless_completed(info)
        return Result(info, self.committed_rounds(), self.model())

    def model(self) -> bytes:
        """The stored model, verified against the hash of the run."""
        info = self.info()
        return receive_model(self._port.fetch(self.id, ARTIFACT), info.model_sha256)

    def cancel(self) -> RunInfo:
        """Ask for the end; a run that has ended stays as it is."""
        return self._port.cancel(self.id)

    def add_nodes(self, *node_ids: str) -> RunInfo:
        """Let nodes that were taken out take part again, from the next round on."""
        return self._port.change_nodes(self.id, add=node_ids)

    def remove_nodes(self, *node_ids: str) -> RunInfo:
        """Take nodes out: from the next round on they take part in none. They stay where they are."""
        return self._port.change_nodes(self.id, remove=node_ids)

    def stop(self) -> RunInfo:
        """End in order and soon: after the open round the model is stored; whoever is away is not waited for."""
        return self._port.advance(self.id, STOP)

    def finish(self) -> RunInfo:
        """End a run that was submitted with ``keep=True``: store its model, release its resources."""
        return self._port.finish(self.id)

    def save(self, out_dir: Path | str | None = None) -> Path:
        """Wait for the end and write the run folder, ``runs/ID`` by default; returns it.

        The folder of a failed or cancelled run has no model.
        """
        with RunFolder(Path(out_dir) if out_dir is not None else default_folder(self.id)) as folder:
            self.save_into(folder, lambda event: None)
            return folder.path

    def save_into(self, folder: RunFolder, on_event: Callable[[RunEvent], None]) -> dict[str, Any]:
        """Follow the run to its end, writing `folder` on the way; returns the summary."""
        folder.write_config(json.loads(self.info().config_json))
        for event in self.events():
            folder.take(event)
            on_event(event)
        return self.close_folder(folder)

    def close_folder(self, folder: RunFolder) -> dict[str, Any]:
        """Write what is known only at the end, as far as the run came; returns the summary."""
        info = self.info()
        if folder.lacks_plan and info.clusters and (plan := self.plan()) is not None:
            folder.write_plan(plan)
        if info.model_sha256:
            folder.write_model(self.model())
        return folder.finish(info)


class Result:
    """What a completed run gave. The model is in memory: it stays usable after the fabric was closed.

    Attributes:
        info: the last state of the run.
        rounds: its committed rounds.
    """

    def __init__(self, info: RunInfo, rounds: Sequence[RoundResult], model: bytes) -> None:
        self.info = info
        self.rounds = tuple(rounds)
        self._model = model

    @property
    def config(self) -> FederationConfig:
        """The resolved configuration that ran."""
        return FederationConfig.from_json(self.info.config_json)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the last evaluated round, and the last training loss."""
        metrics: dict[str, float] = {}
        for result in self.rounds:
            metrics.update(result.metrics)
        return metrics

    @property
    def model_sha256(self) -> str:
        """Hex sha256 over the tensors' bytes in name order."""
        return self.info.model_sha256

    def save(self, path: Path | str) -> Path:
        """Write the model as a safetensors file."""
        target = Path(path)
        try:
            write_file(target, self._model)
        except OSError as error:
            raise LocalError("L005", f"{target} cannot be written: {error.strerror}", place=str(target)) from error
        return target

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by name; those of several models under ``model_0.NAME``, ``model_1.NAME``, ..."""
        from safetensors.torch import load  # noqa: PLC0415 - torch takes seconds to load

        state: dict[str, torch.Tensor] = load(self._model)
        return state

    def load_model(self, number: int = 0, *, code_path: str = "") -> torch.nn.Module:
        """The trained model as a module in evaluation mode.

        Args:
            number: which one, where the federation has learned several.
            code_path: folder of the user's own modules, if the configuration names ``module:attr``.

        Raises:
            ConfigError: C007 if there is no such model.
        """
        from icrf.learning import build_model, configured_dataset  # noqa: PLC0415 - torch takes seconds to load
        from icrf.learning.layout import model_names  # noqa: PLC0415

        config, state = self.config, self.state_dict()
        if not 0 <= number < config.num_models:
            allowed = f"0 to {config.num_models - 1}"
            raise ConfigError("C007", "no such model", place="number", value=number, allowed=allowed)
        if config.num_models > 1:
            prefix = f"{model_names(config.num_models)[number]}."
            state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        with on_path(code_path):
            dataset = configured_dataset(config)
            module = build_model(config.model_type, dataset.input_shape, dataset.num_classes, config.seed)
        # The file does not have what stayed with the nodes.
        module.load_state_dict(state, strict=not config.private_keys)
        return module.eval()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"Result({self.info.federation}: {shown})"

    def _repr_html_(self) -> str:
        """The summary and the curve, as notebooks show it."""
        summary = summarize(self.info, list(self.rounds))
        return f"<div>{summary_table(summary)}{curve_svg(self.rounds)}</div>"


def raise_unless_completed(info: RunInfo) -> None:
    """Raise F002 with its cause for a failed run, F003 for a cancelled one."""
    if info.status == CANCELLED:
        raise RunError("F003", f"run {short_id(info.run_id)} of {info.federation} was cancelled")
    if info.status == FAILED:
        cause = cause_of(info)
        error = RunError("F002", f"run {short_id(info.run_id)} of {info.federation} failed: {cause}")
        raise error from cause


def cause_of(info: RunInfo) -> IcrfError:
    """The error that ended a failed run."""
    if not info.error_json:
        return RunError("F002", f"run {short_id(info.run_id)} failed without saying why")
    return error_from_dict(json.loads(info.error_json))


def _own_folder() -> str:
    """The folder of the running script, where its own modules lie; the working directory of an interactive session."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return os.path.dirname(os.path.abspath(script)) if script else os.getcwd()
