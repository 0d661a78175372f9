"""Every case of a manifest gives the outputs that the peer recorded, or the right ones."""

from __future__ import annotations

import pytest

from .cases import Case, all_cases, model_for, run
from .common import MARKS, assert_close
from .mistakes import CHECKS

pytestmark = MARKS


@pytest.mark.parametrize(
    "case", [c for c in all_cases() if c.left_out() is None], ids=lambda case: case.name
)
def test_case(case: Case) -> None:
    model = model_for(case)
    if "merge" in case.entry:
        model.merge_adapter(case.entry["merge"])
    check = CHECKS.get(case.entry["id"]) or CHECKS.get(case.entry["id"].rpartition("/")[2])
    if check is not None:
        check(case, model)
    else:
        assert "quirk" not in case.entry, "the peer is known to be wrong here; say what is right"
        assert_close(run(case, model), case.expected())
    if "parameters" in case.entry:
        (adapter,) = model.adapters.values()
        assert sum(p.numel() for p in adapter.parameters()) == case.entry["parameters"]
    if "config" in case.entry:
        (head,) = model.heads.values()
        ours, theirs = head.to_dict(), dict(case.entry["config"])
        if not model.spec.pooler:
            theirs.pop("use_pooler", None)  # where there is none, that library ignores it
        assert {k: ours[k] for k in theirs if k in ours} == {
            k: theirs[k] for k in theirs if k in ours
        }


def test_every_known_mistake_of_the_peer_has_a_check() -> None:
    flagged = {c.entry["id"] for c in all_cases() if c.left_out() is None and "quirk" in c.entry}
    assert flagged <= set(CHECKS)
