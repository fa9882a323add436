"""The folder that a run leaves: configuration, plan, rounds, model, summary, report.

``rounds.jsonl``, ``nodes.jsonl`` and ``profile.jsonl`` grow while the run goes on, one flushed line per round, so that
what was reached is there even if the process that watches dies. The other files are replaced in one step each.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from icrf.codecs import NONE
from icrf.console.format import clean_json, short_id
from icrf.errors import LocalError
from icrf.model_file import ARTIFACT, write_file
from icrf.profiling import profile_line
from icrf.protocol import COMPLETED, LinkBytes, MixingReport, Plan, RoundResult, RunEvent, RunInfo
from icrf.report import ReportData, render
from icrf.spec import FederationConfig
from icrf.spec.documents import dump_yaml

# What a plan has for "none" where its files have null.
_UNMIXED = {"slem": -1.0, "rounds_to_consensus": -1}
_LINES = ("rounds.jsonl", "nodes.jsonl", "profile.jsonl")
_FILES = ("config.yaml", "plan.json", *_LINES, ARTIFACT, "summary.json", "report.html")


def default_folder(run_id: str) -> Path:
    """``runs/ID`` in the working directory."""
    return Path("runs") / short_id(run_id)


class RunFolder:
    """Writes the folder of one run; a context manager.

    The files of an earlier run in the same folder are removed first: a folder never mixes two runs. Files of the same
    names that no run has written are left alone.

    Args:
        path: created with its parents where missing.

    Raises:
        LocalError: L005 if the folder cannot be written, or holds files of these names that are not a run's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rounds: list[RoundResult] = []
        self._plan: Plan | None = None
        self._moved = False
        require_writable(path)
        _require_own(path)
        with _writing(path):
            for name in _FILES:
                (path / name).unlink(missing_ok=True)
            self._lines: TextIO = (path / "rounds.jsonl").open("w", encoding="utf-8")

    @property
    def lacks_plan(self) -> bool:
        """Whether none was written, or nodes have moved since."""
        return self._plan is None or self._moved

    @property
    def plan(self) -> Plan | None:
        """The plan that was written, if any."""
        return self._plan

    @property
    def rounds(self) -> Sequence[RoundResult]:
        """The rounds that were added, without the values of single nodes."""
        return self._rounds

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """``config.yaml``: the resolved configuration, which runs again to the same bits."""
        self._replace("config.yaml", dump_yaml(in_order(config)).encode())

    def write_plan(self, plan: Plan) -> None:
        """``plan.json``."""
        self._plan, self._moved = plan, False
        self._replace("plan.json", json_bytes(plan_to_dict(plan)))

    def take(self, event: RunEvent) -> None:
        """What of an event goes into the folder."""
        if event.round is not None:
            self.add_round(event.round)
        self._moved = self._moved or event.kind == "move"

    def add_round(self, result: RoundResult) -> None:
        """Append a line to ``rounds.jsonl``, to ``nodes.jsonl`` if it has values of single nodes, and to
        ``profile.jsonl`` if it tells where its time went.

        They are with the operating system when this returns.
        """
        self._rounds.append(replace(result, node_metrics={}))
        with _writing(self.path):
            _append(self._lines, round_line(result))
            if result.node_metrics:
                with (self.path / "nodes.jsonl").open("a", encoding="utf-8") as nodes:
                    _append(nodes, nodes_line(result))
            if result.profile is not None:
                with (self.path / "profile.jsonl").open("a", encoding="utf-8") as profile:
                    _append(profile, profile_line(result, result.profile))

    def write_model(self, data: bytes) -> None:
        """``model.safetensors``, already verified."""
        self._replace(ARTIFACT, data)

    def finish(self, info: RunInfo) -> dict[str, Any]:
        """Write ``summary.json`` and ``report.html``; returns the summary."""
        config = in_order(json.loads(info.config_json)) if info.config_json else {}
        summary = summarize(info, self._rounds)
        self._replace("summary.json", json_bytes(summary))
        page = render(ReportData(summary, self._rounds, config, self._plan))
        self._replace("report.html", page.encode())
        return summary

    def _replace(self, name: str, data: bytes) -> None:
        with _writing(self.path):
            write_file(self.path / name, data)

    def close(self) -> None:
        """Close the open file; harmless when called twice."""
        self._lines.close()


def require_writable(path: Path) -> None:
    """Create the folder if it is missing; L005 if nothing can be written there. Cheap: ask before a long start."""
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def require_free(path: Path) -> None:
    """:func:`require_writable`, and L005 if a run was completed there: its model shall not be lost by a new run."""
    require_writable(path)
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        done, run_id = summary["status"] == COMPLETED, str(summary["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # no run, or one that has not ended: RunFolder looks whose files these are
    if done:
        raise LocalError(
            "L005",
            f"{path} holds the completed run {short_id(run_id)}",
            place="--out",
            hint="name another folder with --out, or remove this one",
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalError(
            "L005",
            f"{path} cannot be written: {error.strerror or error}",
            place="--out",
            hint="name another folder with --out",
        ) from error


def in_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with its keys in the order in which they are documented.

    It is not checked: a run can be fetched where the names that its author registered are unknown.
    """
    known = {key: config[key] for key in FederationConfig.model_fields if key in config}
    return {**known, **{key: value for key, value in config.items() if key not in known}}


def round_line(result: RoundResult) -> dict[str, Any]:
    """A line of ``rounds.jsonl``: the fields of the round, its number under ``round``."""
    fields = asdict(result)
    number = fields.pop("number")
    for name in ("node_metrics", "profile"):  # have files of their own
        fields.pop(name)
    # Off the wire a mapping comes in any order; the same round shall always be the same line.
    fields |= {name: dict(sorted(value.items())) for name, value in fields.items() if isinstance(value, dict)}
    line: dict[str, Any] = clean_json({"round": number, **fields})
    return line


def nodes_line(result: RoundResult) -> dict[str, Any]:
    """A line of ``nodes.jsonl``: under ``nodes`` what each node reported in the round, in the order of their numbers.

    ``rounds.jsonl`` has the means.
    """
    found = result.node_metrics
    ordered = {node: dict(sorted(found[node].items())) for node in sorted(found, key=lambda n: (len(n), n))}
    line: dict[str, Any] = clean_json({"round": result.number, "nodes": ordered})
    return line


def summarize(info: RunInfo, rounds: list[RoundResult]) -> dict[str, Any]:
    """The values of ``summary.json``.

    ``accuracy``, ``loss`` and ``metrics`` are those of the last evaluated round, null or empty without one.
    ``rounds_to_target`` is there only where a target is set, null if it was not reached. ``wall_s`` runs from
    submission to the end. Where the graph changes, ``edges_added`` and ``edges_removed`` are sums over all rounds.

    ``model_sha256`` is that of the model in ``model.safetensors``: the global one, or the mean of all peers or groups.
    In ``rounds.jsonl`` that one is the ``consensus_sha256`` of an evaluated or merging round, and ``model_sha256`` is
    the identity of all nodes' states; with one server the two are the same model.
    """
    config = json.loads(info.config_json) if info.config_json else {}
    evaluated = next((r.metrics for r in reversed(rounds) if "accuracy" in r.metrics or "loss" in r.metrics), {})
    wall_s = info.finished_at - info.created_at if info.finished_at else sum(r.wall_s for r in rounds)
    summary: dict[str, Any] = {
        "federation": info.federation,
        "run_id": info.run_id,
        "status": info.status,
        "rounds": info.rounds_done,
        "clusters": len(info.clusters),
        "cluster_names": list(info.clusters),
        "accuracy": evaluated.get("accuracy"),
        "loss": evaluated.get("loss"),
        "train_loss": rounds[-1].metrics.get("train_loss") if rounds else None,
        "metrics": dict(sorted(evaluated.items())),
        "model_sha256": info.model_sha256,
        "bytes_inter_cluster": info.bytes_inter_cluster,
        "bytes_intra_cluster": sum(r.bytes_intra_cluster for r in rounds),
        "wall_s": round(max(0.0, wall_s), 6),
        "flow": info.flow,
        "seed": config.get("seed"),
    }
    if config.get("inter_cluster_codec", NONE) != NONE:
        summary["inter_cluster_codec"] = config["inter_cluster_codec"]
        summary["bytes_saved"] = sum(r.bytes_saved for r in rounds)
    if config.get("topology_adaptation_strategy", "static") != "static":
        summary |= {name: sum(getattr(r, name) for r in rounds) for name in ("edges_added", "edges_removed")}
    if config.get("target_accuracy") is not None:
        summary["rounds_to_target"] = info.rounds_to_target or None
    if info.error_json:
        summary["error"] = json.loads(info.error_json)
    result: dict[str, Any] = clean_json(summary)
    return result


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as ``plan.json`` and ``fabric plan --json`` have it: ``slem`` and ``rounds_to_consensus`` are null where
    no peers mix, and the latter where they never agree."""
    values: dict[str, Any] = clean_json(asdict(plan))
    for mixed in (values, values["mixing"] or {}):
        mixed |= {key: None for key in _UNMIXED if mixed.get(key) == _UNMIXED[key]}
    return values


def plan_from_dict(values: Mapping[str, Any]) -> Plan:
    """The inverse of :func:`plan_to_dict`."""
    mixing = values.get("mixing")
    fields = {
        **_with_numbers(values),
        "clusters": tuple(values["clusters"]),
        "problems": tuple(values["problems"]),
        "links": tuple(LinkBytes(**link) for link in values["links"]),
        "mixing": MixingReport(**_with_numbers(mixing)) if mixing else None,
    }
    return Plan(**fields)


def _with_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a plan with what stands for null in JSON."""
    return {key: _UNMIXED[key] if value is None and key in _UNMIXED else value for key, value in values.items()}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A mapping as the folder's JSON files hold it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _append(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def _require_own(path: Path) -> None:
    """Refuse to replace somebody else's files."""
    if (path / "rounds.jsonl").exists() or (path / "summary.json").exists():
        return
    foreign = [name for name in _FILES if (path / name).exists()]
    if foreign:
        raise LocalError(
            "L005",
            f"{path} holds a {foreign[0]} that no run has written",
            place=str(path),
            hint="name another folder with --out",
        )
