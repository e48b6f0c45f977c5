"""The embedding layer: all tables of a model, stored by width, looked up by one op."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.watched import exporting, watched
from ..errors import BadDataError, ConfigError
from ..spec import Bag, EmbeddingSpec
from .batch import ColumnBatch, Layout, ReadyBatch
from .batched import BatchedModule, View
from .features import DenseFeature, Feature, SequenceFeature


class _Piece(NamedTuple):
    """Some columns of a batch, taken at once: part of a block, or one wide column (``names`` has one entry)."""

    block: int | None
    columns: Any  # a slice or the columns' numbers; None for a wide column
    names: tuple[str, ...]


class _Group(NamedTuple):
    """The features of one call, split as the op wants them."""

    names: tuple[str, ...]
    bags: tuple[Feature, ...]
    dense: tuple[DenseFeature, ...]
    spec: EmbeddingSpec
    columns: tuple[int, ...] | None  # the bags' column offsets; None: they depend on the batch's sequences
    pieces: dict[tuple[Any, ...], tuple[list[_Piece], list[_Piece]]]  # how batches were cut, by layout and device


class Lookup(NamedTuple):
    """The arguments of :func:`fastmtl.ops.embedding_bag`; ``ids`` is None where no feature has a table."""

    weights: list[Tensor]
    ids: Any
    columns: tuple[int, ...]
    dense: Tensor | None
    spec: EmbeddingSpec
    row_index: list[Any] | None


class EmbeddingLayer(BatchedModule):
    """The tables of a list of features.

    A table is stored with all others of its width, one below the other, and shown in the state_dict as
    ``embed_dict.<feature>.weight``. Features that are ``shared_with`` another read that one's table.

    Args:
        features: what the model reads.

    Raises:
        ConfigError: a shared table that does not exist or has another width.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = list(features)
        self.n_dense = sum(isinstance(feature, DenseFeature) for feature in features)
        self._place: dict[str, tuple[int, int, int]] = {}  # table's feature -> weight, first row, rows
        self._paddings: dict[str, tuple[int, ...]] = {}
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._all: _Group | None = None  # of all features
        self._make_tables()

    # ---------------------------------------------------------------------------------------------- the tables

    def _make_tables(self) -> None:
        owners: dict[str, Any] = {}
        for feature in self.features:
            if not isinstance(feature, DenseFeature) and feature.shared_with is None:
                owners.setdefault(feature.name, feature)
        for feature in self.features:
            shared = None if isinstance(feature, DenseFeature) else feature.shared_with
            if shared is not None and shared not in owners:
                raise ConfigError(
                    f"feature {feature.name!r} is shared_with {shared!r}, which has no table in this model"
                )
            if shared is not None and owners[shared].embed_dim != feature.embed_dim:
                raise ConfigError(
                    f"feature {feature.name!r} (embed_dim {feature.embed_dim}) is shared_with {shared!r} "
                    f"(embed_dim {owners[shared].embed_dim}); give both the same embed_dim"
                )
            own, owner = getattr(feature, "padding_idx", None), shared and owners[shared].padding_idx
            if own is not None and owner is not None and own != owner:
                raise ConfigError(
                    f"feature {feature.name!r} (padding_idx {own}) is shared_with {shared!r} (padding_idx {owner}); "
                    f"a table has one padding row: give both the same"
                )
        # frozen tables lie apart: a parameter is trained as a whole or not at all
        made: dict[tuple[int, bool], list[tuple[str, nn.Embedding]]] = {}
        for name, feature in owners.items():
            table = feature.get_embedding_layer()
            made.setdefault((table.embedding_dim, table.weight.requires_grad), []).append((name, table))
        views = {}
        for index, ((_, trained), tables) in enumerate(made.items()):
            start = 0
            for name, table in tables:
                rows = table.num_embeddings
                views[name] = View(
                    f"embed_dict.{name}.weight", f"table{index}", start, start + rows, (rows, table.embedding_dim)
                )
                self._place[name] = (index, start, rows)
                start += rows
            weight = torch.cat([table.weight.detach() for _, table in tables])
            self.register_parameter(f"table{index}", nn.Parameter(weight, requires_grad=trained))
        self.views = tuple(views[name] for name in owners)
        self.n_weights = len(made)
        #: Who updates the tables where they were looked up (a fastmtl.optim.TableOptimizer); None: gradients are dense.
        self.updater: Any = None
        if self.features:
            self._all = self._group(self.features)  # made here, not in the first forward, which may be a traced one

    def weights(self) -> list[Tensor]:
        """The stored tables, ``[V_total, D]`` each."""
        return [getattr(self, f"table{index}") for index in range(self.n_weights)]

    def _flush(self) -> None:
        """Make every row of the tables current."""
        if self.updater is not None:
            self.updater.flush()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._flush()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is nobody's yet
        self._flush()
        return self.__dict__ | {"updater": None}

    # ---------------------------------------------------------------------------------------------- a lookup

    def _group(self, features: Sequence[Feature]) -> _Group:
        if features is self.features and self._all is not None:
            return self._all
        key = tuple(feature.name for feature in features)
        group = self._groups.get(key)
        if group is None:
            bags = tuple(f for f in features if not isinstance(f, DenseFeature))
            dense = tuple(f for f in features if isinstance(f, DenseFeature))
            spec = EmbeddingSpec(tuple(map(self._bag, bags)), sum(f.embed_dim for f in dense))
            if not features:
                raise ConfigError("EmbeddingLayer: the list of features is empty")
            has_sequences = any(isinstance(f, SequenceFeature) for f in bags)
            columns = None if has_sequences else tuple(range(len(bags) + 1))
            group = self._groups[key] = _Group(key, bags, dense, spec, columns, {})
        return group

    def spec_of(self, features: Sequence[Feature]) -> EmbeddingSpec:
        """How ``features`` are looked up together: one object for the same features."""
        return self._group(features).spec

    def _bag(self, feature: Any) -> Bag:
        weight, start, rows = self._place[feature.shared_with or feature.name]
        # the table's padding row stays zero whoever reads it
        owner: Any = next(f for f in self.features if f.name == (feature.shared_with or feature.name))
        paddings = {p for p in (feature.padding_idx, owner.padding_idx) if p is not None}
        padding = tuple(paddings)
        is_sequence = isinstance(feature, SequenceFeature)
        return Bag(
            feature.name,
            weight,
            start,
            rows,
            feature.embed_dim,
            feature.pooling if is_sequence else "sum",
            (*padding, -1) if is_sequence else padding,
            feature.oov,
        )

    def inputs(
        self, x: Mapping[str, Tensor], features: Sequence[Feature], finite: bool = False
    ) -> tuple[Tensor | None, tuple[int, ...], Tensor | None]:
        """The columns of a batch as the op takes them.

        Args:
            x, features: as for :meth:`forward`.
            finite: whether somebody else looks at every dense value.

        Returns:
            ids ``[B, S]`` int64, or int32 where all of the batch's are (None without bags), the bags' column offsets,
            dense ``[B, n_dense]`` (or None).
        """
        return self._inputs(x, self._group(features), finite)

    def _inputs(
        self, x: Mapping[str, Tensor], group: _Group, finite: bool = False
    ) -> tuple[Tensor | None, tuple[int, ...], Tensor | None]:
        if isinstance(x, ReadyBatch) and x.names == group.names:
            return x.ids, x.columns, x.dense
        if isinstance(x, ColumnBatch):
            bags, others = self._pieces_of(x, group)
            ids = [_take(x, piece) for piece in bags]
            dense = [_take(x, piece) for piece in others]
        else:
            ids = [_column(x, feature.name) for feature in group.bags]
            dense = [_column(x, feature.name) for feature in group.dense]
            if not watched():
                _check_rows([feature.name for feature in (*group.bags, *group.dense)], [*ids, *dense])
        # the backends read both; an exported graph computes in the one that other runtimes know best
        if exporting() or any(p.dtype != torch.int32 for p in ids):
            ids = [part if part.dtype == torch.int64 else part.long() for part in ids]
        columns = self._columns(x, ids, group)
        if columns is None:  # a concatenated sequence shorter than the model's
            ids, columns = _pad_concat([_column(x, feature.name).long() for feature in group.bags], group.bags)
        dense_values = _join([part.float() for part in dense])
        if dense_values is not None:
            self._check_width(dense_values, x, group)
            if not finite:
                self._check_dense(dense_values, x, group)
        return _join(ids), columns, dense_values

    def pieces_in_use(self) -> list[Any]:
        """What holds the tensors that :meth:`inputs` reads beside batches; who replays its launches must keep it."""
        return [pieces for group in self._groups.values() for pieces in group.pieces.values()]

    def _pieces_of(self, x: ColumnBatch, group: _Group) -> tuple[list[_Piece], list[_Piece]]:
        """How the columns of ids and of dense values are taken from batches of ``x``'s layout; kept for the next."""
        device = x.blocks[0].device if x.blocks else None
        place = (x.layout, device)
        # a graph makes its own: torch 2.11's compiler can't write down for later what it made of named tuples
        kept = {} if watched() else group.pieces
        pieces = kept.get(place)
        if pieces is None:
            if len(kept) >= 64:
                kept.clear()
            bags, others = (_plan_pieces(x.layout, features, device) for features in (group.bags, group.dense))
            pieces = kept[place] = bags, others
        return pieces

    def _columns(self, x: Mapping[str, Tensor], ids: list[Tensor], group: _Group) -> tuple[int, ...] | None:
        """F + 1 offsets of the bags' id columns; None where a concatenated sequence must be padded first."""
        if group.columns is not None:
            return group.columns
        columns, at = [0], 0
        for feature in group.bags:
            length = 1
            if isinstance(feature, SequenceFeature):
                column = _column(x, feature.name)
                length = column.shape[1]
                if feature.pooling == "concat" and length != feature.max_len:
                    if feature.max_len is None or length > feature.max_len:
                        raise BadDataError(
                            f"feature {feature.name!r}: sequences of length {length} for a model that concatenates "
                            f"{feature.max_len}; cut them, or give SequenceFeature(max_len=...)"
                        )
                    return None
            at = at + length  # not in place: a tensor where the model is being traced
            columns.append(at)
        return tuple(columns)

    def _check_width(self, dense: Tensor, x: Mapping[str, Tensor], group: _Group) -> None:
        if dense.shape[1] != group.spec.n_dense:
            for feature in group.dense:
                width = _column(x, feature.name).shape[1]
                if width != feature.embed_dim:
                    raise BadDataError(
                        f"dense feature {feature.name!r}: the data has {width} values a row, the feature says "
                        f"DenseFeature(embed_dim={feature.embed_dim})"
                    )

    def _check_dense(self, dense: Tensor, x: Mapping[str, Tensor], group: _Group) -> None:
        # a look at every value would stall a GPU; there the loss's own check of NaN stands in
        if dense.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(dense.sum().item()):
            for feature in group.dense:
                bad = _column(x, feature.name).isfinite().logical_not().any(dim=1).nonzero()
                if len(bad):
                    raise BadDataError(
                        f"dense feature {feature.name!r}: row {int(bad[0])} of the batch is NaN or infinite; "
                        f"fill it in before training"
                    )

    def forward(self, x: Mapping[str, Tensor], features: Sequence[Feature], squeeze_dim: bool = False) -> Tensor:
        """Look up ``features`` in the batch ``x``.

        Args:
            x: ``{name: column}``; ids ``[B]``, sequences ``[B, L]``, dense values ``[B]`` or ``[B, D]``.
            features: which ones, in which order.
            squeeze_dim: side by side in one row, dense values last; otherwise one row a feature.

        Returns:
            ``[B, sum of widths]`` with ``squeeze_dim``; otherwise ``[B, F, D]`` of the features with tables (where
            concatenated sequences count L rows), which must be of one width.

        Raises:
            BadIdError: an id outside its vocabulary.
            BadDataError: a column that is missing, of the wrong width or length, or not finite.
        """
        if not squeeze_dim:
            features = [feature for feature in features if not isinstance(feature, DenseFeature)]
            widths = {feature.embed_dim for feature in features}
            if len(widths) != 1:
                raise ConfigError(f"EmbeddingLayer: squeeze_dim=False needs tables of one width, got {sorted(widths)}")
        lookup = self.lookup(x, features)
        if lookup.ids is None:
            return lookup.dense if lookup.dense is not None else torch.empty(0)
        out = ops.embedding_bag(*lookup)
        return out if squeeze_dim else out.unflatten(1, (-1, lookup.spec.bags[0].dim))

    def ready(self, x: Mapping[str, Tensor], features: Sequence[Feature]) -> ReadyBatch:
        """``x`` laid out for the lookup of ``features``, its ids sorted where the tables' optimizer wants them so; may
        be made by another thread, while an earlier batch is in use."""
        group = self._group(features)
        ids, columns, dense = self._inputs(x, group)
        index = None
        if ids is not None and self.updater is not None:
            index = self.updater.index(ids, columns, group.spec, self.weights(), alone=True)
        return ReadyBatch(group.names, ids, columns, dense, index)

    def lookup(self, x: Mapping[str, Tensor], features: Sequence[Feature]) -> Lookup:
        """What :func:`fastmtl.ops.embedding_bag` is to be given for ``features`` of the batch ``x``; the rows that it
        reads are current then."""
        group = self._group(features)
        ids, columns, dense = self._inputs(x, group)
        spec, weights = group.spec, self.weights()
        if ids is None:
            return Lookup(weights, None, columns, dense, spec, None)
        if dense is not None and dense.dtype != weights[0].dtype:
            dense = dense.to(weights[0].dtype)
        index = None
        if self.updater is not None:
            known = {"index": x.index} if isinstance(x, ReadyBatch) and x.index is not None else {}
            index = self.updater.before_lookup(weights, ids, columns, spec, **known)
        return Lookup(weights, ids, columns, dense, spec, index)


def _column(x: Mapping[str, Tensor], name: str) -> Tensor:
    """Column ``name`` as ``[B, L]``."""
    try:
        column = x[name]
    except KeyError:
        raise BadDataError(
            f"feature {name!r}: the batch has no such column; it has {', '.join(map(repr, x)) or 'none'}"
        ) from None
    return column.unsqueeze(1) if column.ndim == 1 else column


def _check_rows(names: Sequence[str], columns: Sequence[Tensor]) -> None:
    rows = [len(column) for column in columns]
    if len(set(rows)) > 1:
        usual = statistics.mode(rows)
        name, found = next((name, n) for name, n in zip(names, rows, strict=True) if n != usual)
        raise BadDataError(f"feature {name!r}: its column has {found} rows, the others of the batch have {usual}")


def _plan_pieces(layout: Layout, features: Sequence[Feature], device: torch.device | None) -> list[_Piece]:
    """Neighbouring features of one block are taken together; a block in its own order is taken whole.

    Numbers of columns lie on the batch's ``device``: a copy in every step would make the host wait for it.
    """
    pieces: list[_Piece] = []
    for feature in features:
        place = layout.where.get(feature.name)
        if place is None:
            pieces.append(_Piece(None, None, (feature.name,)))
        elif pieces and pieces[-1].block == place[0]:
            pieces[-1] = pieces[-1]._replace(names=(*pieces[-1].names, feature.name))
        else:
            pieces.append(_Piece(place[0], None, (feature.name,)))
    planned = []
    for piece in pieces:
        if piece.block is not None:
            at = [layout.where[name][1] for name in piece.names]
            in_order = at == list(range(at[0], at[0] + len(at)))
            numbers = slice(at[0], at[0] + len(at)) if in_order else torch.tensor(at, device=device)
            piece = piece._replace(columns=numbers)
        planned.append(piece)
    return planned


def _take(x: ColumnBatch, piece: _Piece) -> Tensor:
    if piece.block is None:
        return _column(x, piece.names[0])
    block = x.blocks[piece.block]
    if isinstance(piece.columns, slice):
        return block if piece.columns == slice(0, block.shape[1]) else block[:, piece.columns]
    return block.index_select(1, piece.columns)


def _join(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pad_concat(ids: list[Tensor], features: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Pad the concatenated sequences with -1 up to their full length."""
    padded, columns = [], [0]
    for part, feature in zip(ids, features, strict=True):
        if isinstance(feature, SequenceFeature) and feature.pooling == "concat" and feature.max_len is not None:
            part = nn.functional.pad(part, (0, feature.max_len - part.shape[1]), value=-1)
        padded.append(part)
        columns.append(columns[-1] + part.shape[1])
    return padded, tuple(columns)


def input_width(features: Sequence[Any]) -> int:
    """Columns of a looked-up row: the sum of the widths, L times the width for a concatenated sequence."""
    return sum(
        feature.embed_dim
        * (feature.max_len if isinstance(feature, SequenceFeature) and feature.pooling == "concat" else 1)
        for feature in features
    )
