"""The peers' environments, one each because their pins exclude each other, in ``.bench`` of the repository."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".bench"

# Torch comes first and by itself, so that a wheel for the CPU is taken where the index has one.
TORCH = "torch==2.13.0"
PACKAGES: Mapping[str, Sequence[Sequence[str]]] = {
    "pfl": ((TORCH,), ("pfl", "scikit-learn")),
    "flower": ((TORCH,), ("flwr[simulation]", "scikit-learn")),
    "flare": ((TORCH,), ("nvflare", "scikit-learn")),
    # Its releases of the last years have this name only. It wants an old Ray, which wants an old NumPy.
    "rayfed": (("ray==2.35.0", "rayfed-nightly", "numpy<2", "setuptools"),),
}
"""What is installed in an environment, one call of pip after the other."""


def python_of(environment: str) -> Path:
    """The interpreter of a peer's environment, or of the project's."""
    return FOLDER / environment / "bin" / "python" if environment else Path(sys.executable)


def why_not(environment: str) -> str:
    """Why nothing can run in an environment; empty if it was completely installed."""
    target = FOLDER / environment
    if not environment or (target / "ready").exists():
        return ""
    problem = target / "problem"
    return problem.read_text(encoding="utf-8") if problem.exists() else f"{environment} is not installed: add --setup"


def set_up(environment: str) -> None:
    """Install a peer with pip, unless that was done; takes minutes. What goes wrong, :func:`why_not` tells."""
    if not why_not(environment):
        return
    print(f"bench: installing {environment} into {FOLDER / environment}", file=sys.stderr)
    target, python = FOLDER / environment, python_of(environment)
    subprocess.run([sys.executable, "-m", "venv", "--clear", target], check=True)
    for packages in PACKAGES[environment]:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", *packages]
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            problem = f"pip install {' '.join(packages)}: {' '.join(said) or f'exit {done.returncode}'}"
            (target / "problem").write_text(problem, encoding="utf-8")
            print(f"bench: {problem}", file=sys.stderr)
            return
    (target / "ready").touch()
