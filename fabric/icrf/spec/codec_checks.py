"""What a lossy ``inter_cluster_codec`` goes together with."""

from __future__ import annotations

from collections.abc import Iterator

from icrf.codecs import BF16, LOSSY, NONE, TOP_K, ZSTD
from icrf.spec.choices import DECENTRALIZED, TRADITIONAL, not_built
from icrf.spec.problems import Problem, Values
from icrf.staleness import WEIGH

_KEY = "inter_cluster_codec"


def codec_problems(values: Values) -> Iterator[Problem]:
    """C012 for combinations that have no code: of each the codecs that it has."""
    codec, schema = values[_KEY], values["federated_learning_schema"]
    if codec not in LOSSY:
        return
    without_loss = f"{NONE}, {ZSTD}"
    if schema not in (TRADITIONAL, DECENTRALIZED):
        yield not_built(_KEY, codec, f"{without_loss} with {schema}")
    elif schema == DECENTRALIZED and codec == TOP_K:
        yield not_built(_KEY, codec, f"{without_loss}, {BF16} with {schema}")
    elif schema == DECENTRALIZED and values["mixing"] == "push_sum":
        yield not_built(_KEY, codec, f"{without_loss} with mixing push_sum")
    if values["late_updates"] == WEIGH:
        yield not_built(_KEY, codec, f"{without_loss} with late_updates {WEIGH}")
