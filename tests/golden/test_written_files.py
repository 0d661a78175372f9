"""An adapter or a head that we read and save again is, key by key, what the peer had written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .cases import Case, all_cases, model_for
from .common import MARKS, assert_tensor_close, read_config, tensors_of
from .mistakes import projection_of

pytestmark = MARKS


def saved_once(part: str) -> list[Case]:
    """For each adapter (or head) of the newest release, one case that loads it."""
    found: dict[tuple[Path, str], Case] = {}
    for case in all_cases():
        folders = list(case.entry.get(part, {}).values())
        alone = len(folders) == 1 and case.entry["level"] != "static" and "full" not in case.entry
        if alone and case.newest and case.left_out() is None:
            found.setdefault((case.folder, folders[0]), case)
    return list(found.values())


@pytest.mark.parametrize("case", saved_once("adapters"), ids=lambda case: case.name)
def test_an_adapter_is_written_as_the_peer_writes_it(case: Case, tmp_path: Path) -> None:
    model, ((name, folder),) = model_for(case), case.entry["adapters"].items()
    model.save_adapter(tmp_path, name, with_head=False)
    theirs, ours = tensors_of(case.folder / folder), tensors_of(tmp_path)
    # The peer repeats prefixes once for every attention module.
    theirs = {key: tensor for key, tensor in theirs.items() if ".prefix_tuning.pool." not in key}
    # The peer's base models, unlike its models with heads, leave out the backbone's own name.
    prefix = f"{model.base_model_prefix}."
    assert {k.removeprefix(prefix): t for k, t in ours.items()}.keys() == {
        k.removeprefix(prefix) for k in theirs
    }
    for key, tensor in theirs.items():
        if ".parametrizations." not in key:
            assert torch.equal(tensor, ours.get(key, ours.get(prefix + key)))
        elif key.endswith(stem := "parametrizations.weight.original"):
            # Many forms say the same; ours has another than the peer's.
            whole = {k.removeprefix(prefix): t for k, t in ours.items()}
            start = key.removesuffix(stem)
            got = projection_of(whole, start.removeprefix(prefix), tensor.shape[0])
            assert_tensor_close(got, projection_of(theirs, start, tensor.shape[0]), key)
    written, read = read_config(tmp_path), read_config(case.folder / folder)
    assert {k: written["config"][k] for k in read["config"]} == read["config"]
    assert written["model_type"] == read["model_type"]
    assert written["hidden_size"] == read["hidden_size"]


@pytest.mark.parametrize("case", saved_once("heads"), ids=lambda case: case.name)
def test_a_head_is_written_as_the_peer_writes_it(case: Case, tmp_path: Path) -> None:
    model, ((name, folder),) = model_for(case), case.entry["heads"].items()
    model.save_head(tmp_path, name)
    theirs = tensors_of(case.folder / folder, "model_head")
    ours = tensors_of(tmp_path, "model_head")
    saved_as = read_config(case.folder / folder)["name"]
    renamed = {k.replace(f"heads.{saved_as}.", f"heads.{name}.", 1): t for k, t in theirs.items()}
    assert ours.keys() == renamed.keys()
    for key, tensor in renamed.items():
        assert torch.equal(tensor, ours[key])
    written, read = read_config(tmp_path)["config"], read_config(case.folder / folder)["config"]
    assert written == read
