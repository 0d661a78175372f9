"""Every architecture with a package: the peer's outputs and gradients, bottleneck and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexheads import load_config
from flexheads.models.with_heads import with_heads_class
from flexheads.plugins import registry
from flexheads.testing import randomise, tiny_config, tiny_inputs

from .comparing import assert_close, assert_same_outputs, gradients
from .library import PeerConfig, adapters
from .pairs import NAME, SEED, adapter_keys, copy_adapter

pytestmark = [
    pytest.mark.peer,
    # What the peer's copy of modelling code calls is on its way out of transformers.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
]

NAMES = [name for name in registry().architectures if name != "bert"]  # which has files of its own
CONFIGS = ("double_seq_bn", "par_bn", "seq_bn_inv[reduction_factor=4]", "lora")


def config_of(architecture: str) -> Any:
    """A tiny configuration without dropout."""
    plain = tiny_config(architecture).to_dict()
    drops = {k: 0.0 for k, v in plain.items() if "drop" in k or k.endswith("_pdrop")}
    drops = {key: zero for key, zero in drops.items() if isinstance(plain[key], float)}
    return tiny_config(architecture, attn_implementation="eager", **drops)


def models(architecture: str, fields: str) -> tuple[Any, Any]:
    """Our model and the peer's with the same weights in backbone and adapter."""
    ours = with_heads_class(registry().architecture(architecture).with_heads)(
        config_of(architecture)
    )
    theirs = adapters.AutoAdapterModel.from_config(config_of(architecture))
    randomise(ours, seed=SEED, std=0.1)
    theirs.base_model.load_state_dict(ours.base_model.state_dict(), strict=False)
    own = load_config(fields)
    if own.get("inv_adapter"):
        own = own.replace(inv_adapter_late=True)  # as the peer, which is wrong for new adapters
    ours.add_adapter(NAME, own, set_active=True)
    theirs.add_adapter(NAME, config=PeerConfig.load(fields), set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    copy_adapter(ours, theirs)
    if architecture == "albert":
        _swap_back(theirs)
    return ours.double().eval(), theirs.double().eval()


def _swap_back(theirs: Any) -> None:
    """Calls the adapters behind ALBERT's attention right; the peer swaps result and residual."""
    for module in theirs.modules():
        layer = getattr(module, "attention_adapters", None)
        if layer is not None:
            layer.forward = lambda r, x, norm, forward=layer.forward: forward(x, r, norm)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Double precision for all that is made: masks of transformers 4.57 overflow otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("fields", CONFIGS)
@pytest.mark.parametrize("architecture", NAMES)
def test_outputs_and_gradients(architecture: str, fields: str) -> None:
    if type(tiny_config(architecture)) not in adapters.AutoAdapterModel._model_mapping:
        pytest.skip("the peer has no class for it")
    if "inv" in fields and registry().architecture(architecture).inputs == "pixels":
        pytest.skip("the peer has no invertible adapters for images")
    if architecture == "xmod":
        pytest.skip("the peer takes the model's own language adapters out")
    if (architecture, fields) == ("deberta", "lora"):
        pytest.skip("the peer cuts a projection into thirds whose parts take turns by head")
    ours, theirs = models(architecture, fields)
    given = {
        key: value.double() if value.is_floating_point() else value
        for key, value in tiny_inputs(ours.config).items()
    }
    assert_same_outputs(ours.base_model, theirs.base_model, given)
    if fields == "lora" and any(layers.fused for layers in ours.spec.layers):
        return  # one parameter of the peer is several of ours
    one, other = (gradients(model.base_model, given) for model in (ours, theirs))
    prefix = f"{ours.base_model_prefix}."
    mine = {key: p.grad for key, p in ours.named_parameters()}
    for own, names in adapter_keys(ours).items():
        assert mine[own].abs().max() > 0, f"{own} has no part in the output"
        assert_close(mine[own], other[names[0].removeprefix(prefix)], own)
    shared = one.keys() & other.keys()
    assert any("embed" in key or "wte" in key for key in shared)
    for key in shared:
        assert_close(one[key], other[key], key)
