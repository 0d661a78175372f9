"""Heads on a model: adding, activating, naming labels, weighting losses, predicting."""
