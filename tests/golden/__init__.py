"""What the peer libraries wrote and the outputs they gave: we read the files and get the same.

``FLEXHEADS_GOLDEN`` names the folder. Every file there of an installed architecture takes part,
as far as this version has the methods, blocks and heads; `left_out` says what is not, and why.
Where a peer is wrong its numbers are no target: those cases assert the right outcome instead.
"""

import pytest

# Helpers with assertions, which pytest explains as it does those of tests.
for helper in ("common", "cases", "mistakes", "magnitudes"):
    pytest.register_assert_rewrite(f"{__name__}.{helper}")
