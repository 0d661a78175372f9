"""The contract: five hooks. A plugin is a module with any of them, named by an entry point.

A package announces its module in the entry-point group ``flexheads``::

    [project.entry-points.flexheads]
    acme = "flexheads_acme.plugin"

Every hook returns an iterable of frozen specs. None takes an argument, all answers are collected,
and two plugins that claim one name are an error, so the order of installation never matters.
Registration must import neither torch nor transformers: classes are named as ``"module:Class"``.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from flexheads.specs import (
    AdapterMethodSpec,
    ArchitectureSpec,
    CheckpointFormat,
    HeadConversion,
    HeadTypeSpec,
)

PROJECT = "flexheads"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def flexheads_register_architectures() -> Iterable[ArchitectureSpec]:
    """Name the sites of one or more backbones.

    Example::

        @flexheads.hookimpl
        def flexheads_register_architectures():
            return [
                ArchitectureSpec(
                    name="acme",
                    model_types=("acme",),
                    backbone="acme.modeling_acme:AcmeModel",
                    layers=(LayerSpec(path="layers", query="attn.q", value="attn.v"),),
                )
            ]
    """
    raise NotImplementedError


@hookspec
def flexheads_register_head_types() -> Iterable[HeadTypeSpec]:
    """Add types of prediction heads.

    Example::

        @flexheads.hookimpl
        def flexheads_register_head_types():
            return [HeadTypeSpec(name="acme-crf", head="flexheads_acme.crf:CrfHead")]
    """
    raise NotImplementedError


@hookspec
def flexheads_register_adapter_methods() -> Iterable[AdapterMethodSpec]:
    """Add methods of adaptation.

    Example::

        @flexheads.hookimpl
        def flexheads_register_adapter_methods():
            config = "flexheads_acme.shift:ShiftConfig"
            return [
                AdapterMethodSpec(
                    name="shift",
                    method="flexheads_acme.shift:ShiftMethod",
                    config=config,
                    identifiers={"shift": (config, {})},
                    tag="shift",
                )
            ]
    """
    raise NotImplementedError


@hookspec
def flexheads_register_conversions() -> Iterable[HeadConversion]:
    """Say which static transformers classes equal which flexible heads, weight by weight.

    Example::

        @flexheads.hookimpl
        def flexheads_register_conversions():
            return [
                HeadConversion(
                    architecture="acme",
                    static_class="AcmeForTokenClassification",
                    heads=(
                        HeadRule(
                            head_type="tagging",
                            weights={"classifier": "layers.0"},
                            config={"layers": 1, "activation_function": None},
                        ),
                    ),
                )
            ]
    """
    raise NotImplementedError


@hookspec
def flexheads_register_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Add layouts of files that adapters and heads are read from and written to.

    Example::

        @flexheads.hookimpl
        def flexheads_register_checkpoint_formats():
            return [CheckpointFormat(name="acme", format="flexheads_acme.files:AcmeFormat")]
    """
    raise NotImplementedError
