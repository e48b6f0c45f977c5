"""A model packed for prediction: on the CPU one pass over each tile of rows, from the lookup to the predictions; on a
GPU a lookup and a kernel or two.

A pack is a copy of the dense parameters, good as long as they are what they were; the tables are read where they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import backend
from ...backends import eager, native, triton
from ...backends.native_folding import small_tables, split, table_of
from ...backends.native_inference import Program
from ...backends.watched import watched
from ...basic.bank import ExpertGate, TowerBank
from ...basic.batch import ColumnBatch, Layout
from ...basic.embedding import EmbeddingLayer
from ...basic.features import DenseFeature, SequenceFeature
from ...errors import ConfigError

if TYPE_CHECKING:
    from .base import MTLModel


class Draft:
    """What a model's ``_describe`` writes: its layers, in terms of its modules."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.modules: list[nn.Module] = []

    def _note(self, module: nn.Module, kind: type) -> Any:
        # a subclass (or a parametrised module, whose class torch replaces) may compute something else
        if type(module) is not kind:
            raise ConfigError(f"{type(module).__name__} is not {kind.__name__} itself")
        self.modules.append(module)
        return module

    def layer(self, layer: nn.Module, inputs: Sequence[int]) -> list[int]:
        """What a link of a model's chain makes of the matrices ``inputs``: matrices, or towers' logits."""
        return (self.towers if isinstance(layer, TowerBank) else self.bank)(layer, inputs)

    def bank(self, bank: nn.Module, inputs: Sequence[int]) -> list[int]:
        """The matrices that a layer of experts and gates makes of the matrices ``inputs``."""
        layer = self._note(bank, ExpertGate)
        return self.program.layer(layer.spec, layer.params(), inputs)

    def towers(self, towers: nn.Module, inputs: Sequence[int]) -> list[int]:
        """The logits of all towers, task by task; ``inputs`` is one matrix a task, or one for all."""
        bank_of = self._note(towers, TowerBank)
        logits: dict[int, int] = {}
        for bank, tasks in zip(bank_of.banks, bank_of.groups, strict=True):
            mine = inputs if bank_of.shared_input else [inputs[task] for task in tasks]
            logits.update(zip(tasks, self.bank(bank, mine), strict=True))
        return [logits[task] for task in range(len(logits))]

    def transfer(self, module: nn.Module, kind: type, own: int, info: int) -> int:
        """The matrix that an attention with ``qkv`` weights makes of two."""
        return self.program.transfer(self._note(module, kind).qkv, own, info)


def why_not(model: MTLModel, module: Any = None) -> str | None:
    """Why ``model`` can't be packed here for the backend ``module`` (None: the one of its parameters' device); None: it
    can."""
    module = module or _backend_for(next(model.parameters()))
    if module.unavailable():
        return module.unavailable()
    for kind in type(model).__mro__:
        if "_describe" in kind.__dict__:
            break
        changed = {"forward", "_predict", "_logits"} & kind.__dict__.keys()
        if changed:
            return f"{kind.__name__} has {', '.join(sorted(changed))} of its own and no _describe"
    if type(model.embedding) is not EmbeddingLayer:
        return "its embedding layer is another class"
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            reason = module.unsupported("inference", tensor, tensor)
            if reason:
                return f"{name}: {reason}"
    return None


class Packed:
    """A model's pack.

    Args:
        model: a built model for which :func:`why_not` has nothing to say.
        bf16: weights and activations rounded to bf16, sums in fp32.

    Raises:
        ConfigError: a model made of other modules than its class makes.
    """

    def __init__(self, model: MTLModel, bf16: bool = False) -> None:
        draft = Draft(self._new_program(model.input_dims))
        logits = model._describe(draft)
        if not draft.modules:
            raise ConfigError("neither layers() nor _describe says what it computes")
        for kind, a, b in model._describe_outputs(logits):
            draft.program.output(kind, a, b)
        self.embedding = model.embedding
        self._modules = draft.modules
        self._watched = [model.embedding, *draft.modules]
        self._hooks: list[Any] = [hooks for m in self._watched for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._stores: list[Any] = [store for m in draft.modules for store in (m._parameters, m._buffers)]
        self._features = self.embedding.features
        self._spec = self.embedding.spec_of(self._features)
        bags = [feature for feature in self._features if not isinstance(feature, DenseFeature)]
        # one column a bag: nothing about a batch must be found out first
        self.is_plain = not any(isinstance(feature, SequenceFeature) for feature in bags)
        folded = self._foldable(draft.program, bf16)
        self._reads_tables = bool(folded)
        if folded:
            self._flush()
            self._stores.append(self.embedding._parameters)
        # what a stamp points to must not be freed and used again
        self._kept = [tensor.detach() for tensor in self._stored()]
        self._stamp = self._read_stamp()
        if folded:
            starts = [0, *accumulate(self._spec.bag_widths(tuple(range(len(bags) + 1))))]
            tables = self.embedding.weights()
            draft.program.fold([(starts[f], table_of(self._spec.bags[f], tables)) for f in folded])
        self._program = draft.program.pack(bf16)
        self.id_names = [feature.name for feature in bags]
        dense = [feature for feature in self._features if isinstance(feature, DenseFeature)]
        self.dense_names = [feature.name for feature in dense]
        self.dense_widths = [feature.embed_dim for feature in dense]
        self._plan, self._small = split(native.bag_plan(self._spec, tuple(range(len(bags) + 1))), folded)
        self._ids_of, self._dense_of = _all_of(self.id_names), _all_of(self.dense_names)
        self._blocks: dict[Layout, Any] = {}  # the batches' layouts, see _whole_blocks

    def _new_program(self, width: int) -> Any:
        return Program(width)

    def _foldable(self, program: Any, bf16: bool) -> list[int]:
        """The bags whose tables are folded into the layers that read them."""
        return small_tables(self._spec, bf16) if self.is_plain and program.folds else []

    # ------------------------------------------------------------------------------------------ is it still good

    # A call often has one row, and finds nothing in the cache, through which the weights of the last one have gone:
    # what is touched here counts, not what is computed.

    def _stored(self) -> list[Tensor]:
        return [*chain.from_iterable(map(dict.values, self._stores))]

    def _read_stamp(self) -> tuple[list[int], list[int]]:
        tensors = self._stored()
        return [*map(Tensor.data_ptr, tensors)], [*map(_version_of, tensors)]

    def is_current(self) -> bool:
        """Whether the parameters are those that were packed.

        Writing through ``parameter.data`` or a NumPy view goes unnoticed, as it does for autograd.
        """
        if self._reads_tables:
            self._flush()
        return self._read_stamp() == self._stamp

    def _flush(self) -> None:
        if self.embedding.updater is not None:
            self.embedding.updater.flush()

    def stands_in(self) -> bool:
        """Whether calling the modules would do the same: they are in evaluation mode and have no hooks."""
        return not (any(self._hooks) or any(map(_is_training, self._watched)))

    # --------------------------------------------------------------------------------------------------- running

    def run(self, ids: Sequence[Tensor], dense: Sequence[Tensor], plan: Tensor | None = None) -> Tensor:
        """Predict from columns in the model's order; see :meth:`PackedProgram.run`. ``plan``: None for a model without
        sequences."""
        embedding = self.embedding
        if embedding.updater is not None:
            embedding.updater.flush()
        tables: Any = [*embedding._parameters.values()]
        return self._program.run(tables, ids, dense, self._plan if plan is None else plan, self._small)

    def __call__(self, x: Mapping[str, Tensor]) -> Tensor:
        """Predict a batch; arguments, result and errors are the model's own."""
        if self.is_plain:
            try:
                blocks = self._whole_blocks(x) if type(x) is ColumnBatch else None
                return self.run(*((self._ids_of(x), self._dense_of(x)) if blocks is None else blocks))
            except (KeyError, RuntimeError):
                pass  # something is wrong with it, or needs converting first
        ids, columns, dense_values = self.embedding.inputs(x, self._features)
        parts = [] if ids is None else [ids]
        try:
            plan = None if self.is_plain else native.bag_plan(self._spec, columns)
            return self.run(parts, [] if dense_values is None else [dense_values], plan)
        except RuntimeError:
            if ids is not None:
                eager.raise_bad_id(ids, columns, self._spec)
            raise

    def _whole_blocks(self, x: ColumnBatch) -> tuple[list[Tensor], list[Tensor]] | None:
        """The blocks that hold the ids and those that hold the dense columns, where they hold just these in their
        order."""
        found = self._blocks.get(x.layout, self)
        if found is self:
            if len(self._blocks) >= 64:
                self._blocks.clear()
            found = self._blocks[x.layout] = _blocks_of(x.layout, self.id_names, self.dense_names)
        return None if found is None else ([x.blocks[b] for b in found[0]], [x.blocks[b] for b in found[1]])


def _blocks_of(layout: Layout, *lists: list[str]) -> list[list[int]] | None:
    """For each list of columns the blocks that are just these side by side; None where one has none such."""
    found = []
    for names in lists:
        blocks = [*dict.fromkeys(layout.where[name][0] for name in names if name in layout.where)]
        if [name for b in blocks for name in layout.blocks[b]] != names:
            return None
        found.append(blocks)
    return found


_version_of: Callable[[Tensor], int] = attrgetter("_version")
_is_training: Callable[[nn.Module], bool] = attrgetter("training")


def _all_of(names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    """What takes the columns ``names`` out of a batch."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda x: [x[name] for name in names]


class PackedOnGPU(Packed):
    """A model's pack for tensors on a GPU (or those of Triton's interpreter)."""

    def _new_program(self, width: int) -> Any:
        from ...backends.triton.inference import Program  # which needs triton

        return Program(width)

    def _foldable(self, program: Any, bf16: bool) -> list[int]:
        return []

    def run(self, ids: Sequence[Tensor], dense: Sequence[Tensor], plan: Tensor | None = None) -> Tensor:
        """See :meth:`Packed.run`; raises RuntimeError where columns are of another number or dtype."""
        if not all(part.dtype in (torch.int64, torch.int32) for part in ids):
            raise RuntimeError("ids are integers of 32 or 64 bits")
        found = _joined(ids), _joined(dense)
        widths = [0 if matrix is None else matrix.shape[1] for matrix in found]
        if widths != [len(self.id_names), sum(self.dense_widths)]:
            raise RuntimeError(f"columns {widths}; the model has {len(self.id_names)} and {sum(self.dense_widths)}")
        return self._predict(found[0], tuple(range(len(self.id_names) + 1)), found[1])

    def __call__(self, x: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Packed.__call__`."""
        found = self._stacked(x) if self.is_plain and type(x) is dict else None
        if found is None:  # something is wrong with it, or needs converting first
            return self._predict(*self.embedding.inputs(x, self._features))
        return self._predict(found[0], tuple(range(len(self.id_names) + 1)), found[1])

    def _stacked(self, x: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None] | None:
        """The ids and the dense columns of a batch side by side, each of one dtype and one dimension; None where they
        are not. Looking at each with Python's eyes takes longer than a kernel of a small batch."""
        try:
            ids, dense = (_side_by_side(columns) for columns in (self._ids_of(x), self._dense_of(x)))
        except (KeyError, RuntimeError, _UnlikeError):
            return None
        if ids is not None and ids.dtype not in (torch.int64, torch.int32):
            return None
        if dense is not None and dense.shape[1] != sum(self.dense_widths):
            return None
        if dense is not None and dense.device.type == "cpu" and not torch.isfinite(dense.sum()):
            return None
        return ids, dense

    def _tables(self) -> list[Tensor]:
        if self.embedding.updater is not None:
            self.embedding.updater.flush()
        return self.embedding.weights()

    def _predict(self, ids: Tensor | None, columns: tuple[int, ...], dense: Tensor | None) -> Tensor:
        return self._program.run(self._tables(), ids, columns, None if dense is None else dense.float(), self._spec)


class _UnlikeError(ValueError):
    """Columns that can't be put side by side as they are."""


def _side_by_side(columns: Sequence[Tensor]) -> Tensor | None:
    """Columns ``[B]`` of one dtype as ``[B, n]``, each in one piece: memory is copied and read as it lies."""
    if not columns:
        return None
    if len(set(map(_dtype_of, columns))) > 1 or set(map(_ndim_of, columns)) != {1}:
        raise _UnlikeError
    return torch.stack(tuple(columns)).t()


_dtype_of: Callable[[Tensor], torch.dtype] = attrgetter("dtype")
_ndim_of: Callable[[Tensor], int] = attrgetter("ndim")


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    whole = [part.unsqueeze(1) if part.ndim == 1 else part for part in parts]
    return None if not whole else whole[0] if len(whole) == 1 else torch.cat(whole, 1)


def _backend_for(tensor: Tensor) -> Any:
    """The backend whose pack predicts on a tensor's device: a forced one only where it is made for that device."""
    on_gpu = tensor.is_cuda or (triton.interpreting() and backend.forced() == "triton")
    return triton if on_gpu else native


def make_pack(model: MTLModel, bf16: bool = False) -> Packed:
    """Pack a model for the device that it is on; arguments and errors of :class:`Packed`."""
    on_gpu = _backend_for(next(model.parameters())) is triton
    return (PackedOnGPU if on_gpu else Packed)(model, bf16)


_guard = threading.Lock()


def current(model: MTLModel, x: Mapping[str, Tensor]) -> Packed | None:
    """The model's pack for the batch ``x``, made anew where it is out of date; None where the model must be run the
    ordinary way.

    Under autocast to bfloat16 it is one in bf16.
    """
    first = x.blocks[0] if type(x) is ColumnBatch and x.blocks else next(iter(x.values()), None)
    if watched() or type(first) is not Tensor:  # a type of its own may watch, too
        return None
    forced = backend.forced()
    if first.is_cpu and forced in (None, "native"):
        module, device = native, "cpu"
    else:
        module, device = _backend_for(first), first.device.type
        if module is native or forced not in (None, "triton", "cuda"):
            return None
    bf16 = torch.is_autocast_enabled(device)
    if bf16 and torch.get_autocast_dtype(device) is not torch.bfloat16:
        return None
    packs: dict[Any, Packed | None] = model._packs
    key = module, bf16
    found = packs.get(key)
    # not model.embedding: a module looks for that in three dictionaries first
    if found is not None and found.embedding is model._modules["embedding"] and found.is_current():
        return found if found.stands_in() else None
    with _guard:
        now = packs.get(key)
        if now is not found and now is not None:  # another thread was here first
            return now
        if why_not(model, module) is None:
            try:
                packs[key] = found = make_pack(model, bf16)
            except (ConfigError, RuntimeError):
                return None  # the ordinary way runs it, or says what is wrong
            return found if found.stands_in() else None
        return None
