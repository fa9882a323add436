"""Readers of data files: they turn bytes into arrays and know nothing of data sets, models or configurations."""
