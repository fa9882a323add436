"""The one way from a file, the environment and flags to a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from icrf.spec.config import FederationConfig
from icrf.spec.layers import read_layers


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, environment: Mapping[str, str] | None = None
) -> FederationConfig:
    """Read a configuration; override > environment (``ICRF_<KEY>``) > file > default.

    Args:
        overrides: ``key=value`` strings, the value written as in the file.
        environment: instead of the process's own.

    Raises:
        ConfigErrors: everything that is wrong, each with its place (``file.yaml:4``, ``-o key=value``, ``ICRF_KEY``).
    """
    return FederationConfig.from_layers(read_layers(path, FederationConfig.model_fields, overrides, environment))


def explain_sources(
    path: str | Path, overrides: Sequence[str] = (), *, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Say where each key's value comes from: ``digits.yaml:4``, ``ICRF_SEED``, ``-o`` or ``default``.

    Raises:
        ConfigErrors: if the file cannot be read; values are not judged.
    """
    layers = read_layers(path, FederationConfig.model_fields, overrides, environment)
    return {key: layers.sources.get(key, "default") for key in FederationConfig.model_fields}
