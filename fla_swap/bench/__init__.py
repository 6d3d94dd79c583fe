"""Measurements of speed and accuracy, each a module that runs with `python -m`."""
