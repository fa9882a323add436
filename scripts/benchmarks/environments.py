"""The peers' environments, one each because their pins exclude each other, in ``.bench`` of the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench"

# Torch comes first and by itself, so that a wheel for the CPU is taken where the index has one.
TORCH = "torch==2.13.0"
PACKAGES = {
    "pfl": ("pfl", "scikit-learn"),
    "flower": ("flwr[simulation]", "scikit-learn"),
    "flare": ("nvflare", "scikit-learn"),
}


def python_of(environment: str) -> Path:
    """The interpreter of a peer's environment, or of the project's."""
    return FOLDER / environment / "bin" / "python" if environment else Path(sys.executable)


def is_ready(environment: str) -> bool:
    """Whether an environment was completely installed."""
    return not environment or (FOLDER / environment / "ready").exists()


def set_up(environment: str) -> None:
    """Install a peer with pip, unless that was done; takes minutes.

    Raises:
        subprocess.CalledProcessError: the installation failed.
    """
    if is_ready(environment):
        return
    print(f"bench: installing {environment} into {FOLDER / environment}", file=sys.stderr)
    target, python = FOLDER / environment, python_of(environment)
    subprocess.run([sys.executable, "-m", "venv", "--clear", target], check=True)
    for packages in ((TORCH,), PACKAGES[environment]):
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", *packages]
        subprocess.run(pip, check=True)
    (target / "ready").touch()
