"""Prediction heads: one file for each type; a head sees `Features`, never a backbone class."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "Features": "flexheads.heads.base",
        "HeadConfig": "flexheads.heads.base",
        "LabelledConfig": "flexheads.heads.base",
        "MultiHeadOutput": "flexheads.heads.outputs",
        "PredictionHead": "flexheads.heads.base",
    },
)
