"""The vocabulary of the named keys: what runs today, what is declared but not built yet, what may be plugged in."""

from __future__ import annotations

from dataclasses import dataclass

from icrf.codecs import BF16, NONE, TOP_K, ZSTD
from icrf.registry import did_you_mean, is_import_path, registered_names
from icrf.spec.problems import Problem
from icrf.waves import ALL, WAVES

TRADITIONAL = "TraditionalFederatedLearning"
DECENTRALIZED = "DecentralizedFederatedLearning"
HIERARCHICAL = "HierarchicalFederatedLearning"
CLUSTERED = "ClusterFederatedLearning"
# Schemas in which one node, the server, aggregates.
WITH_SERVER = (TRADITIONAL, CLUSTERED)
HIERARCHY = "hierarchy"
# How the graph of peers changes between rounds.
STATIC, COSINE_SIMILARITY = "static", "cosine_similarity"


def in_groups(schema: str, topology: str) -> bool:
    """Whether the nodes of a federation form groups with a server each; of a clustered one, communities do."""
    return schema == HIERARCHICAL or (schema == CLUSTERED and topology == HIERARCHY)


@dataclass(frozen=True)
class Choice:
    """The values of one key.

    Attributes:
        built: what works today.
        declared: names the fabric reserves for what it cannot do yet; refused by name (C012).
        kind: registry kind whose registered names are accepted as well; empty for a closed vocabulary.
        import_path: whether ``module:attr`` is accepted.
    """

    built: tuple[str, ...]
    declared: tuple[str, ...] = ()
    kind: str = ""
    import_path: bool = False

    @property
    def allowed(self) -> str:
        """What works today, in words."""
        words = [*self.built]
        if self.kind:
            words.append("a registered name")
        if self.import_path:
            words.append("module:attr")
        return ", ".join(words)

    def problem(self, key: str, value: str) -> Problem | None:
        """Why `value` cannot be used for `key`, or ``None``."""
        if value in self.built:
            return None
        if value in self.declared:
            return not_built(key, value, self.allowed)
        if self.import_path and is_import_path(value):
            return None
        registered = registered_names(self.kind) if self.kind else frozenset()
        if value in registered:
            return None
        known = {*self.built, *self.declared, *registered}
        hint = did_you_mean(value, known)
        if self.kind and not hint:
            hint = "If a plug-in package brings this name, install the package first, here and on every cluster."
        return Problem("C010", (key,), f"{key}: '{value}' unknown", allowed=self.allowed, hint=hint)


def not_built(key: str, value: object, works: str) -> Problem:
    """A value that is in the vocabulary but has no code behind it yet (C012)."""
    text = f"'{value}'" if isinstance(value, str) else str(value).lower()
    return Problem("C012", (key,), f"{key}: {text} is not built yet", allowed=works)


CHOICES: dict[str, Choice] = {
    "federated_learning_schema": Choice(
        (TRADITIONAL, "StarFederatedLearning", DECENTRALIZED, CLUSTERED, HIERARCHICAL), kind="schema"
    ),
    "federated_learning_topology": Choice(
        (
            "star",
            HIERARCHY,
            "ring",
            "line",
            "mesh",
            "k_connected",
            "torus",
            "hypercube",
            "tree",
            "exponential",
            "random_regular",
            "small_world",
            "erdos_renyi",
            "custom",
        ),
        kind="topology",
        import_path=True,
    ),
    "model_type": Choice(
        ("logistic", "mlp", "2nn", "cnn", "lenet", "resnet8", "resnet8_bn"),
        ("lstm", "resnet18"),
        kind="model",
        import_path=True,
    ),
    "dataset_type": Choice(
        ("digits", "breast_cancer", "mnist", "fmnist", "cifar10", "csv", "parquet"),
        ("text",),
        kind="dataset",
        import_path=True,
    ),
    "data_distribution_kind": Choice(
        ("iid", "dir", "20", "50", "90", "shards", "pathological", "quantity", "natural"),
        kind="partitioner",
        import_path=True,
    ),
    "metrics": Choice(("balanced_accuracy", "macro_f1", "top_5_accuracy"), kind="metric", import_path=True),
    # What these leave out of torch.optim needs a closure (LBFGS), sparse gradients or matrices only (Muon).
    "optimizer": Choice(
        (
            "SGD",
            "Adam",
            "AdamW",
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
        ),
        ("LBFGS", "SparseAdam", "Muon"),
    ),
    "aggregation_strategy": Choice(
        (
            "FedAvg",
            "FedProx",
            "FedAvgM",
            "FedAdagrad",
            "FedAdam",
            "FedYogi",
            "FedNova",
            "SCAFFOLD",
            "DiLoCo",
            "Median",
            "TrimmedMean",
            "Krum",
            "MultiKrum",
        ),
        ("FedBuff", "Bulyan"),
        kind="aggregator",
        import_path=True,
    ),
    "mixing": Choice(
        (
            "metropolis_hastings",
            "lazy_metropolis",
            "max_degree",
            "uniform",
            "sample_weighted",
            "push_sum",
            "custom",
        ),
        kind="mixing",
        import_path=True,
    ),
    "assignment_strategy": Choice(
        ("locality", "round_robin", "capacity", "random", "metis", "louvain"), kind="assignment"
    ),
    "placement_group_strategy": Choice(("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")),
    "topology_adaptation_strategy": Choice(
        (STATIC, COSINE_SIMILARITY, "random_rewire", "prune_unavailable", "densify", "sparsify"),
        ("random", "similarity", "dissimilarity", "affinity"),
        kind="adapter",
        import_path=True,
    ),
    "on_cluster_loss": Choice(("wait", "reassign", "exclude", "fail")),
    "late_updates": Choice(("drop", "weigh")),
    "inter_cluster_codec": Choice((NONE, ZSTD, BF16, TOP_K), ("fp16", "int8")),
    "device": Choice(("cpu", "cuda"), ("mps",)),
    "group_by": Choice(("contiguous", "labels"), kind="grouping", import_path=True),
    "first_choice": Choice(("drawn", "loss")),
    "activation": Choice((ALL, WAVES), kind="criterion", import_path=True),
    "client_sampler": Choice(("uniform",), kind="sampler", import_path=True),
    "determinism": Choice(("strict", "recorded")),
}
