"""Names in files of adapters whose method the `adapters` library does not have."""

import torch

from flexheads.checkpoints.bundle import Layout
from flexheads.checkpoints.hub.methods import adapter_names

PATHS = {"layers.0.query": "l.0.qv", "layers.0.value": "l.0.qv", "layers.0.mlp_in": "l.0.up"}


def test_every_tensor_has_a_name_of_its_own_and_comes_back():
    layout = Layout(
        architecture="toy", model_types=("toy",), hidden_size=8, prefix="toy", paths=PATHS
    )
    names = adapter_names("a.b", {"architecture": "of a stranger"}, layout)
    addresses = [f"{site}.{word}" for site in PATHS for word in ("weight", "inner.bias")]
    addresses += ["shared.one.weight", "shared.two.weight"]
    tensors = {address: torch.tensor(number) for number, address in enumerate(addresses)}
    written = names.write(tensors)
    assert written.keys() == {
        "toy.l.0.qv.flexheads_adapters.a.b.query.weight",
        "toy.l.0.qv.flexheads_adapters.a.b.query.inner.bias",
        "toy.l.0.qv.flexheads_adapters.a.b.value.weight",
        "toy.l.0.qv.flexheads_adapters.a.b.value.inner.bias",
        "toy.l.0.up.flexheads_adapters.a.b.weight",
        "toy.l.0.up.flexheads_adapters.a.b.inner.bias",
        "toy.shared_parameters.a.b.one.weight",
        "toy.shared_parameters.a.b.two.weight",
    }
    assert names.read(written) == (tensors, [])
    stray = {"toy.l.0.qv.flexheads_adapters.a.b.key.weight": torch.tensor(0)}
    assert names.read(stray) == ({}, list(stray))
