"""A model and a data set of one's own, named in digits-user-model.yaml as ``user_model:ATTR``.

The folder of a configuration is on the path of local runs; on a standing fabric the agents have to allow both names.
"""

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

NUM_TEST = 360


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits as images, shape (n, 1, 8, 8) in 0..1, and their classes: training, then test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # the same on every cluster
    features, labels = (data.images[order] / 16.0).astype(np.float32)[:, None], data.target[order]
    return features[:-NUM_TEST], labels[:-NUM_TEST], features[-NUM_TEST:], labels[-NUM_TEST:]


def small_cnn(num_classes: int) -> nn.Module:
    """Two convolutions; `num_classes` is passed by name, `input_shape` would be too."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, num_classes),
    )
