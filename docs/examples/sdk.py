"""Submit a federation, follow its rounds live, keep the model.

``python sdk.py`` runs it on a fabric inside this process, ``python sdk.py HOST:PORT`` on the fabric of a mediator.
"""

import sys
from pathlib import Path

from icrf import FederationConfig, connect

CONFIG = Path(__file__).with_name("digits-star.yaml")


def main(address: str | None = None) -> None:
    with connect(address) as fabric:
        print("clusters:", ", ".join(cluster.name for cluster in fabric.clusters()))
        run = fabric.submit(FederationConfig.from_yaml(CONFIG))
        for r in run.rounds():
            print(f"round {r.number}: accuracy {r.metrics['accuracy']:.4f}, {r.wall_s:.2f} s")
        result = run.result()

    # The result outlives the fabric.
    path = result.save("model.safetensors")
    print(f"{path}: sha256 {result.model_sha256}")
    print(f"as a torch module: {type(result.load_model()).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
