"""Federations that are shipped with the package; the same files as in ``docs/examples``."""
