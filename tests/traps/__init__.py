"""Traps: what libraries do around a model and its calls, and what must come of it."""
