"""Proposing the specification of an architecture that no package knows."""
