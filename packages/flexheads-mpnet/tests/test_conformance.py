"""MPNet passes the checks that every architecture passes."""

import pytest

from flexheads.errors import UnsupportedError
from flexheads.testing import architecture_checks, tiny_model


@architecture_checks("mpnet")
def test_conformance(check):
    check()


@pytest.mark.parametrize("config", ["prefix_tuning", "mam", "unipelt"])
def test_prefixes_are_refused_by_name(config):
    model = tiny_model("mpnet")
    with pytest.raises(UnsupportedError, match=r"MPNetSelfAttention .* no way in for a prefix"):
        model.add_adapter("a", config)
    assert not list(model.adapters)
