"""Transformers' ``generate`` with adapters and heads: plans, rows, classes."""
