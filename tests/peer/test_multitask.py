"""MultiTask, and the adapters that are made for it: each row to the branch of its task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexheads
from flexheads.testing import randomise, tiny_inputs

from .library import adapters
from .pairs import copy_adapter, our_model, peer_model

pytestmark = pytest.mark.peer

CONFIGS = {
    "lora": "lora",
    "mtl_lora": "mtl_lora",
    "mtl_lora, three": "mtl_lora[n_up_projection=3, weights_sharpness=0.3, r=4]",
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("ids", [[2, 0, 1], [1, 1, 0], [0, 0, 0]])
@torch.no_grad()
def test_rows_go_to_the_branch_of_their_task(config: str, ids: list[int]) -> None:
    ours, theirs = our_model(), peer_model()
    for seed, name in enumerate("abc"):
        ours.add_adapter(name, CONFIGS[config])
        theirs.add_adapter(name, config=CONFIGS[config])
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
    ours.double().set_active_adapters(flexheads.MultiTask("a", "b", "c"))
    theirs.double().set_active_adapters(adapters.MultiTask("a", "b", "c"))
    inputs: dict[str, Any] = tiny_inputs(ours.config)
    found = ours(**inputs, task_ids=torch.tensor(ids))[0]
    torch.testing.assert_close(found, theirs(**inputs, task_ids=torch.tensor(ids))[0])


@torch.no_grad()
def test_shared_projections_with_a_matrix_for_each_task() -> None:
    ours, theirs = our_model(), peer_model()
    for seed, name in enumerate("abc"):
        ours.add_adapter(name, CONFIGS["mtl_lora, three"])
        theirs.add_adapter(name, config=CONFIGS["mtl_lora, three"])
        randomise(ours.adapters[name], seed=seed)
        copy_adapter(ours, theirs, name)
    ours.share_parameters(flexheads.MultiTask("a", "b", "c"))
    theirs.share_parameters(adapter_names=adapters.MultiTask("a", "b", "c"))
    ours.double().set_active_adapters(flexheads.MultiTask("a", "b", "c"))
    theirs.double().set_active_adapters(adapters.MultiTask("a", "b", "c"))
    inputs, ids = tiny_inputs(ours.config), torch.tensor([1, 2, 0])
    found = ours(**inputs, task_ids=ids)[0]
    torch.testing.assert_close(found, theirs(**inputs, task_ids=ids)[0])
