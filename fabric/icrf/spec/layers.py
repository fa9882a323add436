"""Where values come from: flag over environment over file over default."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrf.errors import ConfigError, ConfigErrors
from icrf.spec.documents import MAX_BYTES, Document, read_yaml
from icrf.spec.problems import Path as KeyPath
from icrf.spec.problems import Places, describe

SCHEMA_KEY, SCHEMA_ALIAS = "federated_learning_schema", "schema"
ENVIRONMENT_PREFIX = "ICRF_"
# Files that a configuration names; relative ones start from the configuration's folder, whoever sets them.
PATH_KEYS = ("adjacency_matrix_file_name", "mixing_matrix_file_name", "data_dir")
# Those that are read only where another key says `custom`.
MATRIX_KEYS = {"federated_learning_topology": "adjacency_matrix_file_name", "mixing": "mixing_matrix_file_name"}


@dataclass
class Layers:
    """Values of all layers, the strongest for each key, and where each was written.

    Attributes:
        values: by canonical key.
        places: where to send a reader who wants to correct a value.
        sources: canonical key -> ``digits.yaml:4``, ``ICRF_SEED`` or ``-o``; defaults are not in it.
        errors: what could not be read.
    """

    values: dict[str, Any]
    places: Places
    sources: dict[str, str] = field(default_factory=dict)
    errors: list[ConfigError] = field(default_factory=list)


def canonical_key(key: str) -> str:
    """The key's own name, for an alias of it."""
    return SCHEMA_KEY if key == SCHEMA_ALIAS else key


def read_layers(
    path: str | Path,
    keys: Iterable[str],
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Layers:
    """Read a file, the environment and overrides, without judging the values.

    Args:
        keys: canonical keys; the environment is asked for ``ICRF_<KEY>`` of each.
        overrides: ``key=value`` strings, the value in YAML; a later one wins.
        environment: instead of the process's own.

    Raises:
        ConfigErrors: C015 if the file cannot be read; C001 and C003 if it is not readable as YAML at all.
    """
    path = Path(path)
    builder = _Builder(path.name)
    builder.add_file(path)
    variables = os.environ if environment is None else environment
    for key in [*keys, SCHEMA_ALIAS]:
        name = f"{ENVIRONMENT_PREFIX}{key.upper()}"
        if name in variables:
            builder.add_scalar(key, variables[name], place=name, source=name)
    for override in overrides:
        builder.add_override(override)
    builder.check_matrix_files(path.parent)
    return builder.finish(path.parent)


def resolve_paths(values: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """`values` with absolute paths for the keys that name files."""
    resolved = dict(values)
    for key in PATH_KEYS:
        named = resolved.get(key)
        if isinstance(named, str) and named and named.isprintable():
            resolved[key] = os.path.abspath(base_dir / os.path.expanduser(named))
    return resolved


class _Builder:
    """Lays one source over another."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self.by_path: dict[KeyPath, str] = {}
        self.sources: dict[str, str] = {}
        self.errors: list[ConfigError] = []
        self.unreadable: set[str] = set()

    def add_file(self, path: Path) -> None:
        document = read_yaml(_file_bytes(path), self.source)
        self.errors += document.errors
        content = {} if document.value is None else document.value
        if not isinstance(content, dict):
            complaint = f"expected keys and values, got {describe(content)}"
            raise ConfigErrors([ConfigError("C006", complaint, place=f"{self.source}:1", allowed="key: value")])
        for key, value in content.items():
            self._set(key, value, document, place="", source="")
        both = [document.lines[(key,)] for key in (SCHEMA_KEY, SCHEMA_ALIAS) if key in content]
        if len(both) == 2:
            complaint = f"duplicate key: '{SCHEMA_ALIAS}' is '{SCHEMA_KEY}' (lines {min(both)}, {max(both)})"
            self.errors.append(ConfigError("C004", complaint, place=f"{self.source}:{max(both)}"))

    def add_override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        place = f"-o {override[:200]}"
        if equals and key.strip():
            self.add_scalar(key.strip(), text, place, source="-o")
        else:
            self.errors.append(ConfigError("C001", "not of the form key=value", place=place, allowed="-o key=value"))

    def add_scalar(self, key: str, text: str, place: str, source: str) -> None:
        try:
            document = read_yaml(text, place, with_lines=False)
        except ConfigErrors as invalid:
            self.errors += [e for e in invalid.errors if isinstance(e, ConfigError)]
            self.unreadable.add(canonical_key(key))
            return
        self.errors += document.errors
        if document.errors:
            self.unreadable.add(canonical_key(key))
        else:
            self.unreadable.discard(canonical_key(key))
        self._set(key, document.value, None, place, source)

    def _set(self, written: str, value: Any, document: Document | None, place: str, source: str) -> None:
        key = canonical_key(written)
        self.values[key] = value
        self.by_path = {path: known for path, known in self.by_path.items() if path[0] != key}
        if document is None:
            self.by_path[(key,)] = place
        else:
            self.by_path |= {
                (key, *path[1:]): f"{self.source}:{line}" for path, line in document.lines.items() if path[0] == written
            }
            if written in document.unreadable:
                self.unreadable.add(key)
        self.sources[key] = source or self.by_path[(key,)]

    def check_matrix_files(self, base_dir: Path) -> None:
        """C015 for each matrix file that is not there; only whoever reads the configuration can look."""
        for user, key in MATRIX_KEYS.items():
            resolved = resolve_paths(self.values, base_dir).get(key)
            if self.values.get(user) == "custom" and isinstance(resolved, str) and resolved.isprintable():
                self._check_file(key, resolved)

    def _check_file(self, key: str, resolved: str) -> None:
        if resolved and not Path(resolved).is_file():
            self.errors.append(
                ConfigError(
                    "C015",
                    f"{key}: no such file '{self.values[key]}'",
                    place=self.by_path[(key,)],
                    hint=f"Looked for {resolved}.",
                )
            )

    def finish(self, base_dir: Path) -> Layers:
        places = Places(self.source, self.by_path, frozenset(self.unreadable))
        return Layers(resolve_paths(self.values, base_dir), places, self.sources, self.errors)


def _file_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "is a directory")
        if path.exists() and not path.is_file():
            raise OSError(None, "is no regular file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigErrors(
            [ConfigError("C015", f"cannot read the configuration: {reason}", place=str(path), hint="Name a YAML file.")]
        ) from error
