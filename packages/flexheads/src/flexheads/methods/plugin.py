"""The core's own adapter methods, registered like anyone else's."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads.hookspecs import hookimpl
from flexheads.specs import AdapterMethodSpec

_BOTTLENECK = "flexheads.methods.bottleneck"
_LORA = "flexheads.methods.lora"
_SEQ = f"{_BOTTLENECK}:SeqBnConfig"
_DOUBLE = f"{_BOTTLENECK}:DoubleSeqBnConfig"
_PARALLEL = f"{_BOTTLENECK}:ParBnConfig"


@hookimpl
def flexheads_register_adapter_methods() -> Iterable[AdapterMethodSpec]:
    """Bottleneck adapters and low-rank adaptation."""
    return [
        AdapterMethodSpec(
            name="bottleneck",
            method=f"{_BOTTLENECK}:BottleneckMethod",
            config=f"{_BOTTLENECK}:BnConfig",
            identifiers={
                "seq_bn": (_SEQ, {}),
                "pfeiffer": (_SEQ, {}),
                "double_seq_bn": (_DOUBLE, {}),
                "houlsby": (_DOUBLE, {}),
                "par_bn": (_PARALLEL, {}),
                "parallel": (_PARALLEL, {}),
                "scaled_par_bn": (_PARALLEL, {"scaling": "learned"}),
                "scaled_parallel": (_PARALLEL, {"scaling": "learned"}),
                "seq_bn_inv": (f"{_BOTTLENECK}:SeqBnInvConfig", {}),
                "pfeiffer+inv": (f"{_BOTTLENECK}:SeqBnInvConfig", {}),
                "double_seq_bn_inv": (f"{_BOTTLENECK}:DoubleSeqBnInvConfig", {}),
                "houlsby+inv": (f"{_BOTTLENECK}:DoubleSeqBnInvConfig", {}),
                "adapter_plus": (f"{_BOTTLENECK}:AdapterPlusConfig", {}),
            },
            description="A small two-layer network behind a sub-layer, in sequence or in parallel",
        ),
        AdapterMethodSpec(
            name="lora",
            method=f"{_LORA}:LoRAMethod",
            config=f"{_LORA}:LoRAConfig",
            identifiers={"lora": (f"{_LORA}:LoRAConfig", {})},
            tag="lora",
            description="A low-rank product added to (or scaling) a projection",
        ),
    ]
