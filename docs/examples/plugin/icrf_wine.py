"""Plug-ins of a package of its own: what a configuration names, pyproject.toml maps to these functions."""

import numpy as np
from sklearn.datasets import load_wine
from torch import nn


def wheel(num_nodes: int) -> np.ndarray:
    """Node 0 is the hub of a ring of all others; parameters are injected by name from the configuration."""
    matrix = np.zeros((num_nodes, num_nodes), dtype=int)
    rim = np.arange(1, num_nodes)
    matrix[0, rim] = matrix[rim, 0] = 1
    matrix[rim, np.roll(rim, 1)] = matrix[np.roll(rim, 1), rim] = 1
    return matrix


def wine() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and classes, then those to test on: 178 wines, 13 standardized measurements, 3 growers."""
    features, labels = load_wine(return_X_y=True)
    features = ((features - features.mean(0)) / features.std(0)).astype(np.float32)
    test = np.arange(len(labels)) % 4 == 0
    return features[~test], labels[~test], features[test], labels[test]


def linear(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Linear(input_shape[0], num_classes)


def striped(labels: np.ndarray, num_parts: int, seed: int, beta: float) -> list[np.ndarray]:
    """Every node gets every num_parts-th sample."""
    return [np.arange(len(labels))[part::num_parts] for part in range(num_parts)]


def brier(scores: np.ndarray, labels: np.ndarray) -> float:
    """The Brier score: mean squared distance of the predicted probabilities from the truth."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    truth = np.eye(scores.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())
