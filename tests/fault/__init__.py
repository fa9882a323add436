"""Faults on real processes. A package, so that its modules share one fabric: see ``conftest.py``."""
