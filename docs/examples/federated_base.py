"""A federation in the hands of a program: reserve, start, train, test, ask a node, stop.

``python federated_base.py`` runs it on a Ray cluster inside this process.
"""

from pathlib import Path

from icrf import FederationConfig, StarFederatedLearningSchema

CONFIG = Path(__file__).with_name("digits-star.yaml")


def main() -> None:
    config = FederationConfig.from_yaml(CONFIG)
    roles = ["train-eval"] * 10
    with StarFederatedLearningSchema(roles=roles, config=config) as base:
        print(f"{len(base)} nodes, {base['client_7']} among them")  # nothing lives yet

        base.allocate_resources()  # all slots or none
        print(f"reserved: {base.resources['all']}")
        base.materialize_all()
        print(f"client_7 lives: {base['client_7'].call('ping')}")

        future = base.train()  # goes on by itself
        print(f"rounds done: {future.result().rounds_done}")
        base.train(rounds=1, blocking=True)  # one more

        accuracy = base.test()["server"]["accuracy"]
        print(f"accuracy of the global model: {accuracy:.4f}")
        (version,) = base.pull_version(["client_7"])
        shapes = {name: weights.shape for name, weights in version["model"].items()}
        print(f"{version['id']} at version {version['version']}: {shapes}")


if __name__ == "__main__":
    main()
