"""What this package registers: two adapter methods."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import AdapterMethodSpec, hookimpl

_OFT = "flexheads_orthogonal.oft"
_BOFT = "flexheads_orthogonal.boft"


@hookimpl
def flexheads_register_adapter_methods() -> Iterable[AdapterMethodSpec]:
    """OFT and BOFT."""
    return [
        AdapterMethodSpec(
            name="oft",
            method=f"{_OFT}:OFTMethod",
            config=f"{_OFT}:OFTConfig",
            identifiers={"oft": (f"{_OFT}:OFTConfig", {})},
            tag="oft",
            description="A block-diagonal rotation of what a projection is given",
        ),
        AdapterMethodSpec(
            name="boft",
            method=f"{_BOFT}:BOFTMethod",
            config=f"{_BOFT}:BOFTConfig",
            identifiers={"boft": (f"{_BOFT}:BOFTConfig", {})},
            tag="boft",
            description="A product of sparse rotations of what a projection is given, and a scale",
        ),
    ]
