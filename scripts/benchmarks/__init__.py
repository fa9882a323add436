"""The side-by-side benchmarks of ``scripts/bench``. What runs inside a peer's environment uses torch, NumPy and
scikit-learn, and nothing of this project."""
