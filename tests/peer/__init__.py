"""The same weights in the `adapters` library and in ours: the same outputs, gradients and files.

Both libraries run in one process, in double precision where numbers are compared, so that what is
left between them is no rounding.
"""

import pytest

# Helpers with assertions, which pytest explains as it does those of tests.
for helper in ("pairs", "comparing", "exchange"):
    pytest.register_assert_rewrite(f"{__name__}.{helper}")
