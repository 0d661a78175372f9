"""Which methods an architecture carries, as tried on a tiny model of each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from flexheads.errors import FlexheadsError
from flexheads.plugins import registry
from flexheads.testing import tiny_model

INVERTIBLE = "seq_bn_inv"


def columns() -> dict[str, str]:
    """What is tried: one configuration of each method but unions, and one with a coupling."""
    methods = [spec for spec in registry().methods.values() if spec.name != "union"]
    firsts = {spec.name: next(iter(spec.identifiers)) for spec in methods}
    found = {}
    for name, config in firsts.items():
        found[name] = config
        if not found.keys() & {"invertible"}:
            found["invertible"] = INVERTIBLE
    return found


def carried(architecture: str, fields: Mapping[str, str]) -> list[bool]:
    """For each configuration, whether a model of an architecture takes an adapter of it.

    Args:
        architecture: The architecture.
        fields: What stands in for configurations of which a field must be given.
    """
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about what tiny configurations lack
        model = tiny_model(architecture)
        for config in columns().values():
            try:
                model.add_adapter("tried", fields.get(config, config))
            except FlexheadsError:
                answers.append(False)
            else:
                answers.append(True)
                model.delete_adapter("tried")
    return answers
