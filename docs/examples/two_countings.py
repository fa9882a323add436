"""Clients that do not agree what the classes mean, named in digits-clustered.yaml as ``two_countings:Counter``.

The folder of a configuration is on the path of local runs; on a standing fabric the agents have to allow the name.
"""

from typing import Any

from icrf import FederatedNode


class Counter(FederatedNode):
    """Every other client counts from one: it calls the digit 0 class 1, and the digit 9 class 0."""

    def build(self, **kwargs: Any) -> None:
        first = self.context.index % 2
        features, labels = self.context.train_data
        self.context.train_data = (features, (labels + first) % 10)
        features, labels = self.context.test_data
        self.context.test_data = (features, (labels + first) % 10)
