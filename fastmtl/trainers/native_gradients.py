"""The gradients of one batch without autograd, for models that are a chain of layers of one backend's kernels.

Autograd's nodes, saved tensors and accumulators cost half a millisecond a batch, more than the arithmetic of a small
model, and on a GPU they stand between the kernels. A chain needs none of them: its layers run one after the other, and
their backwards in the opposite order. The kernels are autograd's own, so the gradients are the same, but for the
rounding of the losses and, on the CPU, of the sums of small tables, which are folded into the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import backend
from ..backends import branches, native
from ..backends.native_folding import Folding
from ..backends.native_training import RuleStep, TrainingProgram
from ..backends.updates import Update
from ..basic.bank import ExpertGate, TowerBank
from ..basic.embedding import Lookup
from ..models.multi_task import MTLModel
from ..ops.embedding_bag import general_gradients, sparse_gradient, table_gradients
from ..spec import EmbeddingSpec, ExpertGateParams, ExpertGateSpec
from ..weighting import Strategy


class ChainGradients:
    """Fills ``.grad`` of a model's parameters; :meth:`of` says where it can.

    Nothing in it waits for a GPU, so that a call may be captured in a CUDA graph (under
    :func:`fastmtl.backends.deferred.watching`, where a lookup says ``oov="raise"``).

    Args:
        model: a model whose ``layers()`` are a chain.
        banks: these layers.
        strategy: whose factors the tasks' losses have in the sum that is minimised.
        lookups: the backend of ``embedding_bag``, which brings its own backward.
        layers: that of ``expert_gate``, which has ``task_losses`` too.
    """

    def __init__(self, model: MTLModel, banks: list[ExpertGate], strategy: Strategy, lookups: Any, layers: Any) -> None:
        self.model, self.banks, self.strategy = model, banks, strategy
        self._learns_factors = strategy.weights() is not None
        self.factors = self._factors()
        self._lookups, self._layers = lookups, layers
        self._is_native = lookups is native is layers
        self._trained = [p for p in model.parameters() if p.requires_grad]
        #: The last lookup's spec and columns, whether it was for bf16, and its folding.
        self._kept: tuple[EmbeddingSpec, tuple[int, ...], bool, Folding | None] | None = None

    @classmethod
    def of(cls, model: nn.Module, strategy: Strategy) -> ChainGradients | None:
        """For a bare model that nobody watches, on backends that bring their own backward, and losses summed with
        factors that are fixed or, on the CPU, known before them."""
        if strategy.factors() is None or type(strategy).backward is not Strategy.backward or not is_unwatched(model):
            return None
        chain = cast(MTLModel, model)
        banks = _chain(chain)
        params = list(model.parameters())
        if not banks or not all(p.dtype == torch.float32 and p.device == params[0].device for p in params):
            return None
        lookups, layers = (backend.resolve(op, *params) for op in ("embedding_bag", "expert_gate"))
        is_common = not any(getattr(feature, "pooling", None) == "max" for feature in chain.embedding.features)
        if not is_common and lookups is not native:
            return None  # a maximum's gradient needs the tables
        if lookups.DIFFERENTIABLE or not hasattr(layers, "task_losses"):
            return None
        if strategy.weights() is not None and not (lookups is native is layers):
            return None  # what is recorded would hold the first ones
        return cls(chain, banks, strategy, lookups, layers)

    def _factors(self) -> Tensor:
        factors = self.strategy.factors()
        assert factors is not None
        return factors.to(self.model.is_classification.device)

    def begin(self) -> None:
        """Take the factors of the batch that is next."""
        if self._learns_factors:
            self.factors = self._factors()

    def ready(self, x: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A batch laid out for the lookup, which may be done by another thread while an earlier one computes."""
        return self.model.embedding.ready(x, self.model.embedding.features)

    def __call__(
        self, x: Mapping[str, Tensor], labels: Tensor, seen: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of a batch.

        Args:
            x: columns, as the model takes them, or what :meth:`ready` made of them.
            labels: ``[B, T]`` float32 on the model's device; NaN where a label is missing.
            seen: called with the losses: between forward and backward, on the CPU behind both.

        Returns:
            The tasks' losses ``[T]`` and the logits ``[B, T]``.
        """
        self.begin()
        for p in self._trained:
            p.grad = None
        layers = [(bank.params(), bank.spec) for bank in self.banks]
        # before the lookup: their weights are laid out beside it
        ahead = getattr(self._layers, "weights_ahead", None)
        weights = [(one,) for one in ahead(layers)] if ahead is not None else [()] * len(layers)
        # with gradients on: to the tables' optimizer a lookup without them is an evaluation
        lookup = self.model.embedding.lookup(x, self.model.embedding.features)
        with torch.no_grad():
            return self._run(lookup, labels, seen, layers, weights)

    def _run(
        self,
        lookup: Lookup,
        labels: Tensor,
        seen: Callable[[Tensor], None] | None,
        layers: list[tuple[ExpertGateParams, ExpertGateSpec]],
        weights: Sequence[tuple],
    ) -> tuple[Tensor, Tensor]:
        trains_tables = lookup.ids is not None and any(table.requires_grad for table in lookup.weights)
        if self._is_native:
            losses, logits = self._run_at_once(lookup, labels, trains_tables, layers)
            self.strategy.give_own_gradients(losses)
            if seen is not None:
                seen(losses)
            return losses, logits
        row: Any = lookup.dense if lookup.ids is None else self._lookups.embedding_bag_fwd(*lookup[:5])
        inputs: list[Tensor] = [row.unsqueeze(0)]
        taped: list[tuple[ExpertGateParams, Any]] = []
        *below, towers = self.banks
        for bank, (params, spec), given in zip(below, layers, weights, strict=False):
            bank.count_step(inputs[-1])
            out, saved = self._layers.expert_gate_fwd(inputs[-1], params, spec, True, *given)
            inputs.append(out)
            taped.append((params, saved))
        x = inputs.pop()
        towers.count_step(x)
        losses, logits, grad = self._towers(*layers[-1], x, labels, trains_tables or bool(below), *weights[-1])
        if seen is not None:
            seen(losses)
        for bank, source, (params, saved) in zip(reversed(below), reversed(inputs), reversed(taped), strict=True):
            assert grad is not None
            needs_x = trains_tables or bank is not self.banks[0]
            grad, grads = self._layers.expert_gate_bwd(grad, source, params, bank.spec, True, list(saved), needs_x)
            _give(params, grads)
        if trains_tables:
            assert grad is not None
            self._table_gradients(grad[0], lookup, None, None)
        return losses, logits

    def _run_at_once(
        self,
        lookup: Lookup,
        labels: Tensor,
        trains_tables: bool,
        layers: list[tuple[ExpertGateParams, ExpertGateSpec]],
    ) -> tuple[Tensor, Tensor]:
        """On the CPU: the layers in one call, small tables folded into the first."""
        weights, ids, columns, dense, spec, _ = lookup
        folding, folded = None if ids is None else self._folding(spec, columns), None
        if folding is not None and len(ids) < folding.least_rows:
            folding = None
        row: Any = dense
        if folding is not None:
            row, folded = folding.look_up(weights, ids, dense)
        elif ids is not None:
            row = native.embedding_bag_fwd(weights, ids, columns, dense, spec)
        wanted = self._columns_of_tables(row.shape[1], spec) if trains_tables else -1
        x = row.unsqueeze(0)
        for bank in self.banks:
            bank.count_step(x)
        kinds = self.model.is_classification
        losses, logits, grads, dx, of_small = native.chain_gradients(
            x, layers, labels, kinds, self.factors, folded, wanted
        )
        for (params, _), of_layer in zip(layers, grads, strict=True):
            _give(params, of_layer)
        if dx is not None:
            self._table_gradients(dx[0], lookup, folding, of_small)
        return losses, logits

    def program(self, columns: tuple[int, ...], rules: Sequence[RuleStep]) -> tuple[TrainingProgram, int] | None:
        """A batch and its optimizer's step as one call of the native library, and the rows that a batch must have for
        that to compute what a call of this object does; None: it is not possible.

        Args:
            columns: the lookup's.
            rules: what the optimizer moves, and how.
        """
        embedding = self.model.embedding
        weights, spec = embedding.weights(), embedding.spec_of(embedding.features)
        given = [p for bank in self.banks for p in bank.params().learned() if p.requires_grad]
        given += [table for table in weights if table.requires_grad]
        moved = {id(p) for rule in rules for p in rule.params}
        if not self._is_native or not spec.bags or not spec.is_common or moved != {id(p) for p in given}:
            return None
        folding = self._folding(spec, columns)
        width = spec.width(columns) if folding is None else folding.width
        trains_tables = any(table.requires_grad for table in weights)
        program = TrainingProgram(
            weights, spec, columns, folding, [(bank.params(), bank.spec) for bank in self.banks],
            [bank.num_batches_tracked for bank in self.banks], self.model.is_classification,
            self._columns_of_tables(width, spec) if trains_tables else -1, rules, native.computes_in_bf16(),
        )  # fmt: skip
        return program, 0 if folding is None else folding.least_rows

    def _columns_of_tables(self, width: int, spec: EmbeddingSpec) -> int:
        """Columns whose gradient is wanted, of a row's: nobody asks for that of the dense ones, which are last."""
        return width - (spec.n_dense if spec.is_common and self.banks[0].spec.dims else 0)

    def _folding(self, spec: EmbeddingSpec, columns: tuple[int, ...]) -> Folding | None:
        """How small tables are folded into the first bank, in batches of enough rows."""
        if len(self.banks) == 1:
            return None
        bf16 = native.computes_in_bf16()
        if self._kept is None or self._kept[0] is not spec or self._kept[1:3] != (columns, bf16):
            self._kept = spec, columns, bf16, Folding.of(spec, columns, self.banks[0].spec, bf16)
        return self._kept[3]

    def _towers(
        self,
        params: ExpertGateParams,
        spec: ExpertGateSpec,
        x: Tensor,
        labels: Tensor,
        needs_x: bool,
        *weights: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Forward, losses and backward of the last bank: losses, logits and the gradient of x."""
        layers = self._layers
        of_losses = labels, self.model.is_classification, self.factors
        at_once = getattr(layers, "tower_losses", None)
        found = at_once(x, params, spec, *of_losses, needs_x, *weights) if at_once else None
        if found is None:
            logits, saved = layers.expert_gate_fwd(x, params, spec, True, *weights)
            losses, grad = layers.task_losses(logits, *of_losses)
            found = losses, logits, *layers.expert_gate_bwd(grad, x, params, spec, True, list(saved), needs_x)
        losses, logits, dx, grads = found
        _give(params, grads)
        return losses, logits, dx

    def _table_gradients(self, grad: Tensor, lookup: Lookup, folding: Folding | None, of_small: Tensor | None) -> None:
        weights, ids, columns, _, spec, index = lookup
        if index is not None and any(isinstance(update, Update) for update in index):
            step = self._lookups.embedding_bag_bwd_step  # which leaves no gradient
            branches.beside(branches.TABLES, step, grad, ids, lookup.columns, spec, index)
            return
        needs = [table.requires_grad for table in weights]
        shapes = [table.shape for table in weights]
        if folding is not None and of_small is not None:
            found = folding.table_gradients(grad, of_small, ids, shapes, needs, index)
            grads = [
                sparse_gradient(*g, shape) if isinstance(g, tuple) else g
                for g, shape in zip(found, shapes, strict=True)
            ]
        elif spec.is_common:
            grads = table_gradients(self._lookups, grad, ids, columns, spec, shapes, needs, index)
        else:
            grads = general_gradients(grad, weights, ids, columns, spec, needs, index is not None)[0]
        for table, g in zip(weights, grads, strict=True):
            table.grad = g


def _give(params: ExpertGateParams, grads: list[Tensor]) -> None:
    for learned, g in zip(params.learned(), grads, strict=True):
        if learned.requires_grad:
            learned.grad = g


def _chain(model: MTLModel) -> list[ExpertGate]:
    """The banks of a model that computes its layers one after the other, and nothing else; empty: it is none such."""
    if type(model)._logits is not MTLModel._logits or type(model)._predict is not MTLModel._predict:
        return []
    banks: list[Any] = []
    for layer in model.layers():
        # towers of several shapes read parts of their input
        banks += layer.banks if isinstance(layer, TowerBank) and len(layer.banks) == 1 else [layer]
    return banks if all(type(bank) is ExpertGate for bank in banks) else []


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_unwatched(model: nn.Module) -> bool:
    """Whether it is a model of ours, whose parts nobody has wrapped, changed or hooked into."""
    if not isinstance(model, MTLModel) or type(model).forward is not MTLModel.forward or torch.is_anomaly_enabled():
        return False
    if any(getattr(torch_module, f"_global{hooks}", None) for hooks in _HOOKS):
        return False
    for module in model.modules():
        # one that was left in evaluation mode normalises by its running statistics
        if not module.training or "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            return False
    return not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
