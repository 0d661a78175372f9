"""Files of a model: one adapter or head, a fusion, a setup, the whole model."""
