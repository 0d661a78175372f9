"""Prediction heads: one file for each type; a head sees `Features`, never a backbone class."""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "IGNORED": "flexheads.heads.losses",
        "CustomHead": "flexheads.heads.custom",
        "Choices": "flexheads.heads.inputs",
        "Features": "flexheads.heads.features",
        "FeedForwardConfig": "flexheads.heads.config",
        "FeedForwardHead": "flexheads.heads.base",
        "HeadConfig": "flexheads.heads.config",
        "InputShape": "flexheads.heads.labels",
        "LabelledConfig": "flexheads.heads.config",
        "MultiHeadOutput": "flexheads.heads.outputs",
        "NamedLabelsConfig": "flexheads.heads.config",
        "PooledConfig": "flexheads.heads.config",
        "PooledHead": "flexheads.heads.base",
        "PredictionHead": "flexheads.heads.base",
        "Questions": "flexheads.heads.inputs",
        "Samples": "flexheads.heads.inputs",
        "Source": "flexheads.heads.source",
        "TaggingHead": "flexheads.heads.tagging",
        "Texts": "flexheads.heads.inputs",
        "check_indices": "flexheads.heads.labels",
        "check_numbers": "flexheads.heads.labels",
        "check_shape": "flexheads.heads.labels",
        "check_shares": "flexheads.heads.labels",
        "head_output": "flexheads.heads.outputs",
        "real_positions": "flexheads.heads.pooling",
        "register_custom_head": "flexheads.heads.custom",
        "word_starts_of": "flexheads.heads.dependency_parsing",
    },
)
