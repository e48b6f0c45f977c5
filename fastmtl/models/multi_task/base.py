"""What all multi-task models have in common: features, tasks, outside names, folders to save to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...basic.batched import BatchedModule, View
from ...basic.embedding import EmbeddingLayer, input_width
from ...basic.features import Feature, SequenceFeature
from ...basic.layers import check_task_type
from ...errors import ConfigError, NotBuiltError
from . import packed
from .columns import BatchSchema, Schema, resolve_feature


class LossWeights(BatchedModule):
    """One learned loss weight a task (uncertainty weighting, GradNorm); keys ``loss weight.<task>`` as in torch-rechub.

    Args:
        n_task: T.
        start: initial value.
    """

    def __init__(self, n_task: int, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n_task,), float(start)))
        self.views = tuple(View(str(task), "weight", task, task + 1, (1,)) for task in range(n_task))


#: Name of the submodule that trainers add for learned loss weights.
LOSS_WEIGHT = "loss weight"


class MTLModel(nn.Module):
    """Base of the multi-task models.

    A model computes ``[B, T]`` predictions (probabilities for classification) from a batch of columns. Its parameters
    are stored batched; ``state_dict``, ``load_state_dict`` and :meth:`named_gradients` speak torch-rechub's names.

    A model whose features are plain column names (or concatenated sequences of unknown length) has no parameters until
    it has seen data: ``MTLTrainer.fit`` builds it, or :meth:`build`.

    Args:
        feature_lists: the constructor's feature arguments by name, each a list of features or column names.
        task_types: ``"classification"`` or ``"regression"`` for each task.
        config: the constructor's other arguments, plain data.
        embedding_dim: width of the tables of features given as column names.
    """

    #: Attributes whose outside names lack the attribute's own name (``experts.0``, not ``bank.experts.0``).
    LIFTED: ClassVar[tuple[str, ...]] = ("bank", "towers")
    #: First parts of outside names that are followed by a task's number, and what to add to it.
    TASK_MODULES: ClassVar[dict[str, int]] = {"towers": 0, "gates": 0}
    #: Outputs whose losses are summed; None: the mean over all tasks.
    SUMMED_TASKS: ClassVar[tuple[int, ...] | None] = None

    #: ``[T]`` bool.
    is_classification: Tensor

    def __init__(
        self,
        feature_lists: dict[str, Sequence[Feature | str]],
        task_types: Sequence[str],
        config: dict[str, Any],
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.task_types = [check_task_type(task_type) for task_type in task_types]
        self.n_task = len(self.task_types)
        self.task_names = [f"task_{task}" for task in range(self.n_task)]
        self.config = config
        self.embedding_dim = embedding_dim
        self.feature_lists: dict[str, list[Any]] = {name: list(features) for name, features in feature_lists.items()}
        self.register_state_dict_post_hook(_lift_names)
        self.register_load_state_dict_pre_hook(_lower_names)
        self.register_load_state_dict_post_hook(_lift_missing)
        is_classification = torch.tensor([task_type == "classification" for task_type in self.task_types])
        self.register_buffer("is_classification", is_classification, persistent=False)
        self.is_built = False
        self._packs: dict[Any, packed.Packed | None] = {}  # by backend, and whether in bf16
        if not self.features:
            raise ConfigError(f"{type(self).__name__}: the list of features is empty")
        if all(_is_complete(feature) for feature in self.features):
            self._build_now()
        else:
            # a placeholder, so that an optimizer can be given model.parameters() before there are any
            self.unbuilt = nn.UninitializedParameter()

    # ------------------------------------------------------------------------------------------------ building

    @property
    def features(self) -> list[Any]:
        """All features in order; column names where the model has not been built."""
        return [feature for features in self.feature_lists.values() for feature in features]

    def build(self, schema: Schema) -> None:
        """Make the parameters of a model whose features are column names.

        Args:
            schema: what the data's columns hold, e.g. ``loader.schema``.

        Raises:
            BadDataError: a column that is missing or can't be a feature.
        """
        if self.is_built:
            return
        self.feature_lists = {
            name: [resolve_feature(feature, schema, self.embedding_dim) for feature in features]
            for name, features in self.feature_lists.items()
        }
        del self.unbuilt
        self._build_now()

    def _build_now(self) -> None:
        self.embedding = EmbeddingLayer(self.features)
        self.input_dims = input_width(self.features)
        self._build()
        self.is_built = True

    def _build(self) -> None:
        """Make the banks; ``self.input_dims`` is the width of a looked-up row."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """Predict a batch.

        Args:
            x: ``{feature: column}``: ids ``[B]``, sequences ``[B, L]``, dense values ``[B]`` or ``[B, D]``.

        Returns:
            ``[B, T]``: probabilities for classification, values for regression.

        Raises:
            BadIdError, BadDataError: see :class:`fastmtl.basic.layers.EmbeddingLayer`.
            NotBuiltError: features given as column names and no data seen yet.
        """
        if not self.is_built:
            self._build_from_batch(x)
        if not self.training and not torch.is_grad_enabled():
            pack = packed.current(self, x)
            if pack is not None:
                return pack(x)
        return self._predict(self.embedding(x, self.embedding.features, squeeze_dim=True))

    def _predict(self, row: Tensor) -> Tensor:
        """Looked-up rows ``[B, I]`` to predictions ``[B, T]``."""
        logits = self._logits(row)
        if "regression" not in self.task_types:
            return torch.sigmoid(logits)
        return torch.where(self.is_classification, torch.sigmoid(logits), logits)

    def _logits(self, row: Tensor) -> Tensor:
        x = row.unsqueeze(0)
        for layer in self.layers():
            x = layer(x)
        return x

    def layers(self) -> list[nn.Module]:
        """The modules between a looked-up row ``[1, B, I]`` and the logits, each reading what the one before made and
        nothing else; empty where a model is no such chain and has a ``_logits`` or ``_predict`` of its own."""
        return []

    def _describe(self, draft: packed.Draft) -> list[int]:
        """Write down what ``_logits`` computes, from matrix 0 to the numbers of the tasks' logits.

        Where it says nothing, predictions are made as training is, layer by layer.
        """
        numbers = [0]
        for layer in self.layers():
            numbers = draft.layer(layer, numbers)
        return numbers

    def _describe_outputs(self, logits: list[int]) -> list[tuple[str, int, int]]:
        """What ``_predict`` makes of the logits: kind and logits of each output, see ``Program.output``."""
        kinds = {"classification": "probability", "regression": "logit"}
        return [(kinds[task_type], logit, 0) for task_type, logit in zip(self.task_types, logits, strict=True)]

    def train(self, mode: bool = True) -> MTLModel:
        """Training or evaluation mode; what was packed for predictions is given up when training begins."""
        if mode:
            self._packs = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packs": {}}

    def _build_from_batch(self, x: Mapping[str, Tensor]) -> None:
        names = [feature for feature in self.features if isinstance(feature, str)]
        if names:
            raise NotBuiltError(
                f"{type(self).__name__}: the features {', '.join(map(repr, names))} are plain column names, and their "
                f"vocabularies come from data: fit the model with MTLTrainer, or call model.build(loader.schema) first"
            )
        device = next(iter(x.values())).device
        self.build(BatchSchema(x))
        self.to(device)

    def take_task_names(self, names: Sequence[str]) -> None:
        """Call the tasks by the data's label columns, where there is one for each task and no name was given before."""
        is_default = self.task_names == [f"task_{task}" for task in range(self.n_task)]
        if is_default and len(names) == self.n_task:
            self.task_names = list(names)

    def adapt_labels(self, y: Tensor) -> Tensor:
        """Labels ``[B, *]`` as the loader gives them to labels ``[B, T]`` of the model's outputs."""
        return y

    # --------------------------------------------------------------------------------- parameters by their names

    def _batched(self, prefix: str = "") -> Iterator[tuple[str, str, BatchedModule]]:
        """``(inside prefix, outside prefix, module)`` of every batched module."""
        for path, module in self.named_modules():
            if isinstance(module, BatchedModule):
                lifted = path.split(".", 1)[0] in self.LIFTED
                yield f"{prefix}{path}.", prefix if lifted else f"{prefix}{path}.", module

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """``(torch-rechub's name, gradient)`` of every parameter that has one, after ``backward``.

        The gradients are views: scaling one in place (clipping) scales what the optimizer sees. A sparse gradient of
        tables (``MTLTrainer(embedding_update=...)``) is made dense first, at the cost of its memory.
        """
        for _, outside, module in self._batched():
            for name, stored, view in module.named_views(outside):
                if isinstance(stored, nn.Parameter) and stored.grad is not None:
                    if stored.grad.is_sparse:
                        stored.grad = stored.grad.to_dense()
                    yield name, view.of(stored.grad)

    def task_of(self, name: str) -> int | None:
        """The task that the outside tensor ``name`` belongs to; None: several."""
        head, number = name.split(".", 2)[:2]
        return int(number) + self.TASK_MODULES[head] if head in self.TASK_MODULES else None

    def task_rows(self, task: int) -> dict[nn.Parameter, list[slice]]:
        """The rows of the stored parameters that are one task's own."""
        rows: dict[nn.Parameter, list[slice]] = {}
        for _, outside, module in self._batched():
            for name, stored, view in module.named_views(outside):
                if isinstance(stored, nn.Parameter) and self.task_of(name) == task:
                    rows.setdefault(stored, []).append(slice(view.start, view.stop))
        return rows

    def blocks(self) -> dict[nn.Parameter, list[int]]:
        """For each stored parameter the rows of the outside tensors it holds, in order (their sum is its length)."""
        rows: dict[nn.Parameter, list[int]] = {}
        for _, _, module in self._batched():
            for _, stored, view in sorted(module.named_views(), key=lambda item: item[2].start):
                if isinstance(stored, nn.Parameter):
                    rows.setdefault(stored, []).append(view.stop - view.start)
        return rows

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several tasks train: the tables and the shared experts or bottoms."""
        raise ConfigError(f"{type(self).__name__} has no split into shared and task parameters")

    def task_parameters(self) -> list[nn.Parameter]:
        """The parameters that are one task's own."""
        shared = {id(p) for p in self.shared_parameters()}
        return [p for name, p in self.named_parameters() if id(p) not in shared and not name.startswith(LOSS_WEIGHT)]

    def last_shared_weight(self) -> nn.Parameter:
        """The weight of the last shared linear layer (GradNorm's W)."""
        raise ConfigError(f"{type(self).__name__} has no shared linear layer")

    def loss_weights(self, start: float) -> nn.Parameter:
        """The learned loss weights ``[T]``, made with the value ``start`` where the model has none yet."""
        if LOSS_WEIGHT not in self._modules:
            made = LossWeights(self.n_task, start).to(next(self.parameters()).device)
            self.add_module(LOSS_WEIGHT, made)
        return cast(LossWeights, self._modules[LOSS_WEIGHT]).weight

    # ------------------------------------------------------------------------------------------------- folders

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to ``folder`` (made if missing)."""
        from .pretrained import save_pretrained

        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MTLModel:
        """The model saved in ``folder``; no features need be given again.

        Raises:
            ConfigError: a folder that holds no model, or a model of another class.
        """
        from .pretrained import from_pretrained

        model = from_pretrained(folder)
        if not isinstance(model, cls):
            raise ConfigError(f"{folder}: holds a {type(model).__name__}, not a {cls.__name__}")
        return model


def _is_complete(feature: Feature | str) -> bool:
    if isinstance(feature, SequenceFeature):
        return feature.pooling != "concat" or feature.max_len is not None
    return not isinstance(feature, str)


def _names(model: MTLModel, prefix: str) -> dict[str, str]:
    """Inside name -> outside name of every view of the lifted modules."""
    return {
        inside + view.name: outside + view.name
        for inside, outside, module in model._batched(prefix)
        if inside != outside
        for view in module.views
    }


def _lift_names(model: MTLModel, state_dict: dict, prefix: str, local_metadata: Any) -> None:
    if not model.is_built:
        raise NotBuiltError(
            f"{type(model).__name__}: state_dict before the model is built; fit it, or call model.build first"
        )
    names = _names(model, prefix)
    items = list(state_dict.items())
    state_dict.clear()
    state_dict.update((names.get(name, name), value) for name, value in items)


def _lower_names(
    model: MTLModel,
    state_dict: dict,
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing: list,
    unexpected: list,
    errors: list,
) -> None:
    if not model.is_built:
        raise NotBuiltError(
            f"{type(model).__name__}: load_state_dict before the model is built; call model.build(loader.schema) first"
        )
    learned = [name for name in state_dict if name.startswith(f"{prefix}{LOSS_WEIGHT}.")]
    if len(learned) == model.n_task:
        model.loss_weights(0.0)
    for inside, outside in _names(model, prefix).items():
        if outside in state_dict:
            state_dict[inside] = state_dict.pop(outside)


def _lift_missing(model: MTLModel, incompatible: Any) -> None:
    # the hook is not told the prefix; the names of a model inside a wrapper keep theirs
    names = _names(model, "")
    incompatible.missing_keys[:] = [names.get(name, name) for name in incompatible.missing_keys]
