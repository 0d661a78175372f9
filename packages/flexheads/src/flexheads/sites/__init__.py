"""Sites: the places in a backbone where adapters act, and the hooks that let them in.

A method builds parts for attached sites. Each kind of site has a base class for its parts, which
says what they are called with.
"""

from flexheads._lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "AttachedAttention": "flexheads.sites.attention",
        "AttachedEmbedding": "flexheads.sites.embedding",
        "AttachedHidden": "flexheads.sites.hidden",
        "AttachedLinear": "flexheads.sites.linear",
        "AttachedOutput": "flexheads.sites.output",
        "AttachedResidual": "flexheads.sites.residual",
        "AttachedSite": "flexheads.sites.base",
        "AttachedTokens": "flexheads.sites.tokens",
        "EmbeddingPart": "flexheads.sites.embedding",
        "LinearPart": "flexheads.sites.linear",
        "OutputPart": "flexheads.sites.output",
        "Projection": "flexheads.sites.projection",
        "ResidualPart": "flexheads.sites.residual",
        "Stream": "flexheads.sites.residual",
        "TokensPart": "flexheads.sites.tokens",
    },
)
