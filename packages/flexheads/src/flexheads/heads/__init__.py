"""Prediction heads: one file for each type; a head sees `Features`, never a backbone class."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "Features": "flexheads.heads.features",
        "FeedForwardConfig": "flexheads.heads.config",
        "FeedForwardHead": "flexheads.heads.base",
        "HeadConfig": "flexheads.heads.config",
        "LabelledConfig": "flexheads.heads.config",
        "MultiHeadOutput": "flexheads.heads.outputs",
        "PooledConfig": "flexheads.heads.config",
        "PooledHead": "flexheads.heads.base",
        "PredictionHead": "flexheads.heads.base",
        "Source": "flexheads.heads.source",
    },
)
