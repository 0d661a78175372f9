"""Files: every format reads into one value, the bundle, and writes from it."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "Bundle": "flexheads.checkpoints.bundle",
        "Format": "flexheads.checkpoints.bundle",
    },
)
