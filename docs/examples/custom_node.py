"""A node class of one's own: peers tell each other their loss, and whoever is behind trains once more.

``python custom_node.py`` runs it on a Ray cluster inside this process. The class needs no file of its own there; on a
fabric of several clusters it is named as ``client_template: custom_node:Eager`` and allowed by each cluster's agent.
"""

from typing import Any

from icrf import FederatedNode, FederationConfig, RingFederatedLearningSchema

CONFIG = FederationConfig.from_mapping(
    {
        "federation_id": "eager-peers",
        "schema": "DecentralizedFederatedLearning",
        "federated_learning_topology": "ring",
        "federated_learning_rounds": 15,
        "learning_rate": 0.2,
        "momentum": 0.9,
        "data_distribution_kind": "dir",
        "dirichlet_beta": 1.0,
        "evaluate_every": 5,
    }
)


class Eager(FederatedNode):
    """Trains a second time in rounds in which its neighbours did better in the round before.

    What it counts is in ``state``: committed with the round, in the checkpoints, undone when a round is run again.
    """

    def setup(self) -> None:
        self.state["extra"] = 0

    def train(self, **kwargs: Any) -> dict[str, float]:
        heard = [message.body["loss"] for message in self.sync()]
        metrics = super().train(**kwargs)
        if heard and metrics["loss"] > sum(heard) / len(heard):
            metrics = super().train(**kwargs)
            self.state["extra"] += 1
        self.send("my loss", {"loss": metrics["loss"]})  # to all neighbours; they read it in the next round
        return metrics

    def extra_trainings(self) -> int:
        return int(self.state["extra"])


def main() -> None:
    with RingFederatedLearningSchema(Eager, ["train-eval-test"] * 6, CONFIG) as base:
        base.train(blocking=True)
        for name in base:
            print(f"{name} trained {base[name].call('extra_trainings')} times more than it had to")
        result = base.result()
        print(f"accuracy of the mean of all peers: {result.metrics['accuracy']:.4f}")


if __name__ == "__main__":
    main()
