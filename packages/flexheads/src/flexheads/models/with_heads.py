"""Classes with flexible heads: ``<backbone>WithHeads``, made from an architecture's spec."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from flexheads.composition import Rows, Setup
from flexheads.errors import UnsupportedError
from flexheads.heads.features import Features
from flexheads.heads.labels import check_shape
from flexheads.heads.language_modeling import LanguageModelHead
from flexheads.heads.outputs import MultiHeadOutput
from flexheads.models.adapters.averaging import AveragingMixin
from flexheads.models.calls.encoding import encode
from flexheads.models.calls.inputs import (
    flatten_choices,
    repeat_rows,
    with_decoder_inputs,
)
from flexheads.models.calls.labels import USUAL, Labels, labels_by_route, take_labels
from flexheads.models.calls.scores import ARGUMENTS, take_asked, with_scores
from flexheads.models.calls.signature import signed
from flexheads.models.calls.task_ids import check_rows, told_by_tensor
from flexheads.models.calls.tasks import Tasks, take_tasks
from flexheads.models.container import NamedModules
from flexheads.models.features.cache import FeatureCacheMixin
from flexheads.models.features.given import FEATURES, backbone_output
from flexheads.models.features.lower_layers import states_given, upper_backbone, without_features
from flexheads.models.generating.classes import configure_generation, generation_bases
from flexheads.models.generating.rows import GenerationPlan, joined, keeping, step_of
from flexheads.models.heads.by_row import run_by_row
from flexheads.models.heads.loss_weights import LossWeightsMixin
from flexheads.models.heads.predicting import PredictMixin
from flexheads.models.heads.seen import features_of, undoing
from flexheads.models.heads.stacking import HeadStacks
from flexheads.models.saving.whole import WholeModelMixin, load_backbone, restore
from flexheads.plan import HeadRoute, Plan
from flexheads.plugins import registry, resolve
from flexheads.sites.attach import TOKENS
from flexheads.sites.base import argument_names
from flexheads.sites.prompt import POOLED, PROMPT
from flexheads.specs import ArchitectureSpec

_TASKS = ("task", "tasks")
_ARGUMENTS = (
    *USUAL,
    "adapter_names",
    "head",
    "task_ids",
    *_TASKS,
    FEATURES,
    "return_dict",
    *ARGUMENTS,
)


class ModelWithHeads(
    WholeModelMixin, AveragingMixin, PredictMixin, LossWeightsMixin, FeatureCacheMixin
):
    """A backbone with named adapters and named heads; see `with_heads_class`."""

    spec: ClassVar[ArchitectureSpec]
    backbone_class: ClassVar[type[PreTrainedModel]]
    input_names: ClassVar[tuple[str, ...]]
    # The loss is a mean over the batch at hand, so a trainer must not rescale it.
    accepts_loss_kwargs = False
    tasks: Tasks | None = None
    """What the numbers in ``task`` mean in calls that do not say it."""

    def __init__(
        self, config: PretrainedConfig, *, backbone: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if backbone is None:
            backbone_class: Any = self.backbone_class
            backbone = backbone_class(config)
        assert backbone is not None
        setattr(self, self.base_model_prefix, backbone)
        self._two_sided = bool(getattr(config, "is_encoder_decoder", False))
        self.heads = NamedModules("head")
        self._stacks = HeadStacks()
        self.loss_weights = NamedModules("head")
        self._attach(self.spec, backbone)
        self.post_init()  # type: ignore[operator]

    def _changed(self) -> None:
        super()._changed()
        self._stacks.clear()

    def init_weights(self) -> None:
        """Nothing: the backbone has initialised itself, and heads and adapters come later."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> Any:
        """Loads a backbone, and the adapters and heads that were saved with it.

        The backbone is loaded by its own transformers class, so everything that transformers does
        for that class is done here: renamed checkpoints, dtypes, devices, quantisation.

        Args:
            path: A directory or the id of a repository on the hub; a plain backbone, a model with
                a static head (whose head is left out), or what `save_pretrained` wrote.
            args: As for transformers' ``from_pretrained``.
            kwargs: As for transformers' ``from_pretrained``.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if not cls.backbone_class.base_model_prefix:  # or it would not find itself in a file
            kwargs.setdefault("key_mapping", {rf"^{cls.base_model_prefix}\.": ""})
        how_to_generate = kwargs.pop("generation_config", None)
        backbone, info = load_backbone(cls.backbone_class, path, *args, **kwargs)
        model = cls(backbone.config, backbone=backbone)
        configure_generation(model, how_to_generate, path, kwargs)
        restore(model, path, kwargs)
        model.training = False
        for own in model.children():
            if own is not backbone:  # which transformers has given in that mode
                own.eval()
        return (model, info) if wants_info else model

    def forward(
        self,
        *args: Any,
        adapter_names: Setup = None,
        head: str | list[str] | Rows | None = None,
        task_ids: Tensor | Sequence[Any] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone under a plan, and the heads of that plan on its output.

        Args:
            args: The backbone's inputs, in its own order.
            adapter_names: The adapters of this call; None is the active setup, an empty list none.
            head: The head or heads of this call; None is the active one, an empty list none, `Rows`
                one for each row.
            task_ids: The task of each row, ``(batch,)``, where the setup has a `MultiTask`.
            return_dict: False for a plain tuple.
            kwargs: The backbone's inputs, and labels: ``labels``, ``start_positions`` and
                ``end_positions`` for one head, or ``labels={head: ...}`` for several; ``task``, the
                task of each row, in place of ``head``, and ``tasks``, see
                `flexheads.training.Tasks`;
                ``output_adapter_gating_scores`` and ``output_adapter_fusion_attentions``.

        Returns:
            The output of the head, a `MultiHeadOutput` of several, or the backbone's own output
            without any.

        Raises:
            UnknownNameError: If an adapter or a head does not exist.
            CompositionError: If the setup does not fit the batch.
            LabelError: If labels are given and there is no head for them.
        """
        if asked := take_asked(kwargs):
            how: Any = {"adapter_names": adapter_names, "head": head, "task_ids": task_ids}
            how["return_dict"] = return_dict
            return with_scores(self, asked, lambda: self.forward(*args, **how, **kwargs))
        adapter_names, head = take_tasks(kwargs, self, adapter_names, head)
        plan = self._plan_of_call(adapter_names, head, task_ids)
        inputs = dict(zip(self.input_names, args, strict=False)) | kwargs
        keep = inputs.pop("logits_to_keep", 0)
        plan, inputs = step_of(plan, self.input_names, inputs)
        labels = take_labels(inputs, plan, self.heads, self._stacks.facts(plan, self.heads))
        output = self._answer(plan, self._with_decoder(plan, labels, inputs), labels, keep)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else _as_tuple(output)

    def _answer(
        self, plan: Plan, given: Mapping[str, Any], labels: Mapping[str, Labels], keep: Any
    ) -> Any:
        """What the backbone or the heads of a plan answer, for inputs and the labels of heads."""
        inputs, choices = flatten_choices(given)
        check_rows(plan, inputs)
        own_labels: list[Labels] = []
        if plan.heads:
            own_labels = labels_by_route(labels, plan, self.heads, inputs, choices)
        if plan.routing.repeat > 1:
            inputs = repeat_rows(inputs, plan.routing.repeat)
        with self._enter(plan):
            output, states = self._run_backbone(plan, inputs)
            if plan.heads:
                features = self._features(plan, inputs, output, choices, states)
                kept_labels = keeping(keep, own_labels, plan, self.heads)
                output = self._run_heads(plan, features, kept_labels)
        return output

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resizes the embeddings, and every language-model head of that size; see transformers."""
        before = self._attachment.backbone.get_input_embeddings().num_embeddings
        embeddings = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        for head in self.heads.values():
            if isinstance(head, LanguageModelHead) and head.num_outputs == before:
                head.resize(embeddings.num_embeddings, self._embeddings())
        self._changed()
        return embeddings

    def _with_decoder(
        self, plan: Plan, labels: Mapping[str, Labels], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The inputs, with the decoder's own where it runs and has none."""
        if not self._two_sided or self._only_encodes(plan):
            return inputs
        starts_with, written = self.spec.decoder_starts_with, self._written(plan, labels)
        return with_decoder_inputs(inputs, written, self.config, starts_with)

    def _run_backbone(
        self, plan: Plan, inputs: Mapping[str, Any]
    ) -> tuple[Any, tuple[Tensor, ...] | None]:
        """The backbone's output, and the states of every layer where a head reads them."""
        backbone, heads = self._attachment.backbone, self.heads
        if (given := inputs.get(FEATURES)) is not None:
            if (lower := states_given(given)) is None:
                return backbone_output(self, plan, given)
            backbone, inputs = upper_backbone(self, plan, *lower), without_features(inputs)
        if self._only_encodes(plan):
            backbone = functools.partial(encode, backbone)
        if not self._stacks.facts(plan, heads).read_layers:
            return backbone(**inputs, return_dict=True), None
        output = backbone(**{**inputs, "output_hidden_states": True}, return_dict=True)
        name = "hidden_states" if "hidden_states" in output else "decoder_hidden_states"
        states = output[name]
        if not inputs.get("output_hidden_states", self.config.output_hidden_states):
            encoded = any(heads[route.head].config.side == "encoder" for route in plan.heads)
            unasked = (name,) if encoded else (name, "encoder_hidden_states")
            output = type(output)(**{k: v for k, v in output.items() if k not in unasked})
        return output, states

    def _only_encodes(self, plan: Plan) -> bool:
        """Whether all heads read the encoder, so that the decoder need not run.

        Prompts join where the whole backbone is called.
        """
        if not self._two_sided or not plan.heads:
            return False
        sides = {self.heads[route.head].config.side for route in plan.heads}
        return sides == {"encoder"} and PROMPT not in plan.ops

    def _features(
        self,
        plan: Plan,
        inputs: Mapping[str, Any],
        output: Any,
        choices: int | None,
        states: tuple[Tensor, ...] | None,
    ) -> Features:
        tokens = plan.ops.get(TOKENS)
        return Features(
            output,
            pooling=self.spec.pooling,
            pad=getattr(self.config, "pad_token_id", None),
            eos=getattr(self.config, "eos_token_id", None),
            scale=self._scale(),
            attention_mask=self._mask(inputs, output.last_hidden_state),
            input_ids=inputs.get("decoder_input_ids" if self._reads_sound() else "input_ids"),
            choices=choices,
            embeddings=self._embeddings(),
            undo=undoing(plan),
            rescore=None if tokens is None else tokens.scores,
            first=self._attachment.runtime.take(POOLED),
            hidden_states=states,
            # Registers stand between the first position and the patches (arXiv:2309.16588).
            patches_from=self.spec.first_patch
            + (getattr(self.config, "num_register_tokens", None) or 0),
            read=self._encoder_positions(inputs),
        )

    def _encoder_positions(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """Mask and ids of the encoder's positions; sound has become fewer, and is not masked."""
        if self._reads_sound():
            return None, None
        return inputs.get("attention_mask"), inputs.get("input_ids")

    def _reads_sound(self) -> bool:
        """Whether an encoder reads sound, so that the tokens of heads are the decoder's own."""
        return self.spec.inputs == "features"

    def _mask(self, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor | None:
        """The mask of the positions that heads read, ``(batch, sequence)``, or None."""
        if self._reads_sound():
            return inputs.get("decoder_attention_mask")
        mask, backbone = inputs.get("attention_mask"), self._attachment.backbone
        if mask is None or self.spec.inputs != "waveform":
            return mask
        # Samples become fewer positions, in a way that only the model knows.
        found: Tensor = backbone._get_feature_vector_attention_mask(hidden.shape[1], mask)
        return found

    def _scale(self) -> float:
        """What language-model heads multiply the hidden states by."""
        names = self.spec.scaled_if
        for name in (names,) if isinstance(names, str) else names or ():
            if hasattr(self.config, name):
                return float(self.config.hidden_size**-0.5) if getattr(self.config, name) else 1.0
        return 1.0

    def _written(self, plan: Plan, labels: Mapping[str, Mapping[str, Any]]) -> Any:
        """The labels of the first head whose labels a decoder writes, or None."""
        for name in (route.head for route in plan.heads):
            given = labels.get(name, {}).get("labels")
            if self.heads[name].writes_labels and given is not None:
                check_shape(f"labels of head {name!r}", given, [(None, None)])
                return given
        return None

    def _run_heads(self, plan: Plan, features: Features, labels: Sequence[Labels]) -> Any:
        if told_by_tensor(plan):
            return run_by_row(plan, self.heads, features)

        def seen(route: HeadRoute) -> Features:
            rows = plan.rows_of(route, features.hidden.shape[0])
            return features if rows is None else features_of(features, plan, route, rows)

        found = self._stacks.run(plan, self.heads, seen, labels)
        if callable(found) and not isinstance(plan, GenerationPlan):
            return MultiHeadOutput.when_read(functools.partial(_named, plan, found))
        found = found() if callable(found) else found
        if isinstance(plan, GenerationPlan):
            return joined(list(zip(plan.heads, found, strict=True)), plan, features.output)
        outputs = [(route.head, own) for route, own in zip(plan.heads, found, strict=True)]
        if len(outputs) == 1 and _is_whole(plan):
            return outputs[0][1]
        return MultiHeadOutput(outputs, self._total_loss(outputs))


def _named(plan: Plan, outputs: Callable[[], Sequence[Any]]) -> list[tuple[str, Any]]:
    """The outputs of a plan with the names of their heads."""
    return [(route.head, output) for route, output in zip(plan.heads, outputs(), strict=True)]


def _is_whole(plan: Plan) -> bool:
    """Whether the only head sees every row, so that its output is that of the call."""
    (route,) = plan.heads
    return route.chain is None or (route.routing or plan.routing).single


def _as_tuple(output: Any) -> Any:
    if isinstance(output, MultiHeadOutput):
        return tuple(_as_tuple(o) for o in output.ordered)
    return output.to_tuple() if isinstance(output, ModelOutput) else output


@functools.cache
def with_heads_class(name: str) -> type[ModelWithHeads]:
    """The class with flexible heads of one architecture.

    Args:
        name: The class name, ``<backbone class>WithHeads``.

    Raises:
        UnknownNameError: If no installed package has such an architecture.
    """
    spec = registry().with_heads(name)
    backbone = resolve(spec.backbone)
    if not issubclass(backbone, PreTrainedModel):
        raise UnsupportedError(f"{spec.backbone} is no transformers model.")
    module = registry().provider_of(spec).module
    base = next(c for c in backbone.__mro__ if c.__name__.endswith("PreTrainedModel"))
    generating = generation_bases(spec, backbone)
    further = ("logits_to_keep",) if generating else ()
    body: dict[str, Any] = {
        # What transformers asks a class for; some backbones differ from their family in it.
        **{n: getattr(backbone, n) for n in dir(backbone) if n.startswith("_supports_")},
        "__module__": module.rpartition(".")[0] or module,
        "__qualname__": name,
        "__doc__": f"A `{backbone.__name__}` with named adapters and named prediction heads.",
        "spec": spec,
        "backbone_class": backbone,
        "input_names": argument_names(backbone.forward),
        "config_class": backbone.config_class,
        # Some classes name no place where others hold them.
        "base_model_prefix": backbone.base_model_prefix or spec.prefixes[0],
        "main_input_name": backbone.main_input_name,
        "forward": signed(ModelWithHeads.forward, backbone.forward, (*_ARGUMENTS, *further)),
    }
    return type(name, (*generating[:1], ModelWithHeads, base, *generating[1:]), body)
