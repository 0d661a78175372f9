"""What takes part: no fewer cases than there were, and a known reason for each one left out."""

from __future__ import annotations

import collections

from .cases import all_cases
from .common import GOLDEN, MARKS
from .legacy import all_legacy

pytestmark = MARKS

# Fewest cases that take part, of the folders that are there.
COVERED = {"adapters130/bert": 120, "legacy/adapters1.0.1/bert": 36}
COVERED |= {"adapters130/gpt2": 130, "adapters130/llama": 140, "adapters130/t5": 130}
COVERED |= {"adapters130/vit": 100, "legacy/adapters1.0.1/gpt2": 36}
COVERED |= {"adapters130/bart": 130, "adapters130/clip": 70}
COVERED_LEGACY = {"legacy/1.1.1/bert": 20, "legacy/2.1.2/bert": 22, "legacy/3.2.1/bert": 24}
COVERED_LEGACY |= {"legacy/2.1.2/gpt2": 12, "legacy/3.2.1/gpt2": 14, "legacy/3.2.1/t5": 9}
# Everything that may be left out begins with one of these words.
REASONS = ("action", "block", "field", "head", "method", "no outputs", "refused", "whole model")


def test_coverage() -> None:
    """The cases that take part are not fewer than they were, and the others have a known reason."""
    found = [(c.folder, c.left_out()) for c in all_cases()]
    found += [(c.folder.parent, c.left_out()) for c in all_legacy()]
    reasons = {reason for _, reason in found if reason is not None}
    assert not {reason for reason in reasons if not reason.startswith(REASONS)}
    counts = collections.Counter(
        folder.relative_to(GOLDEN).as_posix() for folder, reason in found if reason is None
    )
    wanted = {f: n for f, n in {**COVERED, **COVERED_LEGACY}.items() if (GOLDEN / f).is_dir()}
    assert wanted, "the folder holds nothing of what this test is about"
    assert {f: n for f, n in wanted.items() if counts[f] < n} == {}
