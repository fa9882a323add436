"""A whole fabric, mostly without Ray. A package, so that its modules share how runs are followed: see ``runs.py``."""
