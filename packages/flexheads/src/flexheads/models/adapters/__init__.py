"""Adapters on a model: adding, activating, training, merging, averaging, sharing them."""
