"""The frozen values that plugins hand to the core; paths and classes are strings, so no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from flexheads.errors import UnsupportedError

Path = str | tuple[str, ...]
"""A dotted module path, or alternatives of which the first that resolves is taken.

Alternatives are how one package serves several transformers releases. A path whose module is what
the AdapterHub files of 2020 to 2026 name comes first.
"""

Pooling = Literal["first_token", "last_token", "eos", "mean", "pooler"]
"""What stands for a sequence: the first token, the last one that is no padding, the last one that
is the end-of-sequence token, the mean over all that are no padding, or what the model itself says
(``pooler_output``). Heads can choose among more, see `flexheads.heads.config.POOLINGS`."""

Inputs = Literal["tokens", "pixels", "tokens_and_pixels", "features", "waveform"]
"""What a model reads; features of sound, or the sound itself."""

Side = Literal["encoder", "decoder"]

Need = Literal["tokens", "pixels", "sound", "decoder"]
"""What a type of head may need a model to read, or to have."""


@dataclass(frozen=True, kw_only=True)
class ResidualSite:
    """Where a sub-layer's result meets the residual stream.

    Attributes:
        output: The module whose output is the sub-layer result `x`, before the residual is added.
        residual: The module whose first input is the residual `r`.
        residual_from: Whether `r` is that module's first input or its output.
        norm: The layer norm that takes `x + r` (post-LN), or None where the norm comes first.
        norm_unless: The attribute of the configuration that says that the norm comes first after
            all.
        added: Whether the sub-layer adds `r` itself, so that the output of `output` is `x + r`.
        beside: Where sub-layers run side by side, so that no module gets what the layer adds to
            `x`: the module whose output, plus that of `residual`, is `r`. It runs earlier.
        beside_if: The attribute of the configuration that says whether they do; None is always.
        alone: Whether adapters that read `x + r` get `x` alone. So have adapters in files been
            trained where sub-layers run side by side, and the `adapters` library saw no `r`.
    """

    output: Path
    residual: Path
    residual_from: Literal["input", "output"] = "input"
    norm: Path | None = None
    norm_unless: str | None = None
    added: bool = False
    beside: Path | None = None
    beside_if: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class FusedBlock:
    """One of several blocks that a fused projection computes at once.

    Attributes:
        index: Which block of the output, from 0.
        of: How many there are.
        shares: For each block the attribute of the configuration that its size is proportional to,
            such as a number of heads; without them all have the same size.
        groups: The attribute of the configuration that says how many times the blocks take turns,
            each time with an equal part of every one; None is once.
    """

    index: int
    of: int
    shares: tuple[str, ...] = ()
    groups: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The sites in one stack of equal layers; every path is relative to one layer.

    Attributes:
        path: The ``ModuleList`` of layers, relative to the backbone. ``.*.`` stands for every
            number of an outer list.
        side: The side of an encoder-decoder model; None where there is only one.
        when: Attributes of the configuration, each with the value for which the layers are so; a
            model with another value has layers of another `LayerSpec` at that path.
        config: The attribute of the configuration that is the one of these layers, where a model
            has several parts with one each.
        attention: Residual site behind the self-attention.
        cross_attention: Residual site behind the cross-attention of a decoder.
        feed_forward: Residual site behind the feed-forward network.
        query, key, value, attention_output: Linear projections of the self-attention.
        cross_query, cross_key, cross_value, cross_attention_output: Those of the cross-attention.
        mlp_in, mlp_out: Linear projections of the feed-forward network.
        fused: For projections that share one module, the block of its output that is theirs.
        self_attention, encoder_attention: The modules that compute the self-attention and the
            cross-attention, from queries, keys and values.
        norms: The layer norms.
        folded: Whether some of these modules see the positions of all rows in one dimension,
            ``(batch * sequence, ...)``, or the windows of images as rows.
        adapterhub: For files in the AdapterHub layout: site role to module path inside the layer.
            Roles that are not named use the first alternative of their own path. An attention
            role with ``.prefix`` behind it is what files call the prefixes of that attention.
    """

    path: Path
    side: Side | None = None
    config: str | None = None
    when: Mapping[str, Any] = field(default_factory=dict)
    attention: ResidualSite | None = None
    cross_attention: ResidualSite | None = None
    feed_forward: ResidualSite | None = None
    query: Path | None = None
    key: Path | None = None
    value: Path | None = None
    attention_output: Path | None = None
    cross_query: Path | None = None
    cross_key: Path | None = None
    cross_value: Path | None = None
    cross_attention_output: Path | None = None
    mlp_in: Path | None = None
    mlp_out: Path | None = None
    fused: Mapping[str, FusedBlock] = field(default_factory=dict)
    self_attention: Path | None = None
    encoder_attention: Path | None = None
    norms: tuple[Path, ...] = ()
    folded: bool = False
    adapterhub: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> str | None:
        """What tells the layers of a model of several parts from those of the others."""
        return self.side or self.config


_NO_ROLES = ("path", "side", "config", "when", "fused", "folded", "adapterhub")


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """One architecture: where its sites are and how its features are pooled.

    Attributes:
        name: The architecture's name; `AutoModelWithHeads` prints it.
        model_types: The values of ``config.model_type`` that this spec answers to.
        backbone: The transformers base model, as ``"module:Class"``.
        entry: The module inside the backbone that is called with its inputs, where classes with a
            static head call that instead of the backbone.
        layers: The stacks of layers. Layer numbers count through them in this order.
        embeddings: The module whose output enters the first layer; invertible adapters act on it.
        late_embeddings: The module behind which positions have been added too, where that is not
            `embeddings`; invertible adapters of the `adapters` library have been trained there.
        embeddings_from: Whether those of `embeddings` act on that module's output, or on its first
            input.
        norms: Layer norms outside of the layers.
        inputs: What the model reads.
        first_patch: In a model of images, the first position that stands for a patch; those that
            the configuration calls registers stand before it too.
        pooling: What stands for the sequence where a head asks for one vector. None where there is
            no sequence of states that a head could read.
        pooler: Whether the base model has a trained pooler (``pooler_output``).
        composed: Whether the model is made of two others, which it holds as ``encoder`` and
            ``decoder``; the sites are those of their architectures.
        decoder_starts_with: What the decoder's input begins with where it is made of labels or of
            the encoder's tokens: the start token of the configuration, or the last token of each
            row that is no padding, which tells the language.
        prompts: Where prompts join: behind `embeddings`, without positions of their own, or the
            embeddings of tokens, with them; None is the latter where a model is pooled at the last
            token.
        fixed_positions_if: Attributes of the configuration; where one is set the model looks
            positions up by their number in the input, so that no prompt can join.
        scaled_if: The attribute of the configuration (or alternatives) that says whether
            language-model heads read the hidden states over the square root of their size.
        shares_layers: Whether branches of `Parallel` can share the layers below the first one in
            which they differ: each layer is called once, one behind the other, and what depends on
            rows between the first and the last of them has the batch as its first dimension. The
            checks for architectures try it.
        prefixes: Names under which classes with a static head hold the backbone, beside the
            backbone's own ``base_model_prefix``.
        requires: Attributes of the configuration, each with the value that these sites are for;
            a model with another value is refused.
        adapterhub: For files in the AdapterHub layout: ``"embeddings"`` to the path of the module
            that holds the invertible adapters there; without it they hang at the backbone.
        tiny: Configuration overrides that make a tiny random model, for tests.
    """

    name: str
    model_types: tuple[str, ...]
    backbone: str
    layers: tuple[LayerSpec, ...] = ()
    entry: Path | None = None
    embeddings: Path | None = None
    late_embeddings: Path | None = None
    embeddings_from: Literal["input", "output"] = "output"
    norms: tuple[Path, ...] = ()
    inputs: Inputs = "tokens"
    first_patch: int = 1
    pooling: Pooling | None = "first_token"
    pooler: bool = False
    composed: bool = False
    decoder_starts_with: Literal["start_token", "last_token"] = "start_token"
    prompts: Literal["embeddings", "tokens"] | None = None
    fixed_positions_if: tuple[str, ...] = ()
    scaled_if: Path | None = None
    shares_layers: bool = False
    prefixes: tuple[str, ...] = ()
    requires: Mapping[str, Any] = field(default_factory=dict)
    adapterhub: Mapping[str, str] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> frozenset[str]:
        """The roles of the sites that it names; see `LayerSpec`."""
        named = {
            field.name
            for layers in self.layers
            for field in fields(layers)
            if field.name not in _NO_ROLES and getattr(layers, field.name)
        }
        return frozenset(named | ({"embeddings"} if self.embeddings is not None else set()))

    @property
    def gives(self) -> frozenset[Need]:
        """What types of heads can need, as far as this architecture has it."""
        read: dict[Inputs, tuple[Need, ...]] = {
            "tokens": ("tokens",),
            "pixels": ("pixels",),
            "tokens_and_pixels": ("tokens", "pixels"),
            "features": ("sound",),
            "waveform": ("sound",),
        }
        decodes = self.composed or any(layers.side == "decoder" for layers in self.layers)
        written: tuple[Need, ...] = ("tokens", "decoder") if decodes else ()
        return frozenset((*read[self.inputs], *written))

    def fixed_positions(self, config: Any) -> bool:
        """Whether a model looks positions up by their number in the input."""
        names = self.fixed_positions_if
        return any(getattr(config, name, None) not in (None, False) for name in names)

    def fitting(self, config: Any) -> ArchitectureSpec:
        """This spec without the layers that a model of that configuration does not have."""
        layers = tuple(
            own
            for own in self.layers
            if all(getattr(config, name, value) == value for name, value in own.when.items())
        )
        return self if layers == self.layers else replace(self, layers=layers)

    def check(self, config: Any) -> None:
        """Refuses a model that this spec is not about.

        Raises:
            UnsupportedError: If its configuration has another value than `requires` says.
        """
        for name, value in self.requires.items():
            if (given := getattr(config, name, value)) != value:
                raise UnsupportedError(
                    f"Models of architecture {self.name!r} are supported with {name}={value!r}; "
                    f"this one has {name}={given!r}, and is built in another way."
                )

    @property
    def with_heads(self) -> str:
        """Name of the class with flexible heads: ``<backbone class>WithHeads``."""
        return self.backbone.partition(":")[2] + "WithHeads"


@dataclass(frozen=True, kw_only=True)
class HeadTypeSpec:
    """A type of prediction head.

    Attributes:
        name: The ``head_type`` that is written into saved heads.
        head: The head class, as ``"module:Class"``; a subclass of `flexheads.heads.PredictionHead`.
        description: One line for tables.
    """

    name: str
    head: str
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class AdapterMethodSpec:
    """A method of adaptation.

    Attributes:
        name: The method's name.
        method: The class that builds and applies it, as ``"module:Class"``; a subclass of
            `flexheads.methods.AdapterMethod`.
        config: The configuration class that saved configurations load into, as ``"module:Class"``.
        identifiers: Short names that users write, each with its configuration class and the fields
            it sets: ``{"scaled_par_bn": ("module:ParBnConfig", {"scaling": "learned"})}``.
        tag: Value of the key ``"architecture"`` in saved configurations; None is the method's name.
        description: One line for tables.
    """

    name: str
    method: str
    config: str
    identifiers: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    tag: str | None = None
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """How (a part of) a static head and one flexible head correspond; read in both directions.

    Attributes:
        head_type: The type of the flexible head.
        weights: Prefix of the static tensors to prefix in the flexible head, for example
            ``{"classifier": "layers.0"}``. Every static tensor is covered by exactly one prefix. Of
            several that mean the same in the flexible head, each release of the class has one.
        config: The flexible head's configuration, as far as the static class fixes it.
        config_from: Head configuration key to the attribute (or alternatives) of the model's
            configuration that sets it.
        config_by: Head configuration key to the attribute of the model's configuration that says
            what it is, and what each value of that means; no other value can be converted.
        mixed_by: The static tensor that weighs the hidden states of all layers, where the class
            reads a mix of them; without that tensor it reads the last layer.
        aliases: Static tensors that repeat another one: ``{"cls.predictions.bias": "..."}``.
        added_bias: A static tensor ``(1, outputs)`` that is added to the logits. It becomes a bias
            of the flexible head, which has none where the tensor is zero.
        zero_unless: Tensors of the flexible head that the static class has only if an attribute of
            the configuration says so; without they are zero.
        suffix: Appended to the name where a static class becomes several flexible heads.
        output: The field of the static model's output that equals the head's logits.
    """

    head_type: str
    weights: Mapping[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    config_from: Mapping[str, Path] = field(default_factory=dict)
    config_by: Mapping[str, tuple[str, Mapping[Any, Any]]] = field(default_factory=dict)
    mixed_by: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    added_bias: str | None = None
    zero_unless: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""
    output: str = "logits"


@dataclass(frozen=True, kw_only=True)
class HeadConversion:
    """A static transformers class and the flexible heads that it equals.

    Attributes:
        architecture: The `ArchitectureSpec.name` that the class belongs to.
        static_class: The class name, for example ``"AcmeForSequenceClassification"``.
        heads: One rule for each flexible head.
        model_type: The model type of the class, where that is not one of the architecture: so of a
            class that is made of one part of a model of several.
    """

    architecture: str
    static_class: str
    heads: tuple[HeadRule, ...]
    model_type: str | None = None

    @property
    def name(self) -> str:
        """The key under which the registry holds this conversion."""
        return self.static_class


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """A layout of files on disk.

    Attributes:
        name: The format's name.
        format: The class that detects, reads and writes it, as ``"module:Class"``; a subclass of
            `flexheads.checkpoints.Format`.
        description: One line for tables.
    """

    name: str
    format: str
    description: str = ""


Spec = ArchitectureSpec | HeadTypeSpec | AdapterMethodSpec | HeadConversion | CheckpointFormat
