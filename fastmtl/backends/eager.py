"""The ops in plain batched PyTorch: the reference every other backend is tested against, and what torch.compile gets.

Any device, any floating dtype; gradients by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadIdError
from ..spec import (
    BN_EPSILON,
    BN_MOMENTUM,
    DICE_EPSILON,
    LEAKY_SLOPE,
    EmbeddingSpec,
    ExpertGateParams,
    ExpertGateSpec,
    GateParams,
    Ragged,
    Span,
)
from .watched import exporting

#: Whether autograd sees through the functions of this backend (the others come as <op>_fwd and <op>_bwd).
DIFFERENTIABLE = True


def unavailable() -> str | None:
    """Why this backend can't run on this machine; None: it can."""
    return None


def unsupported(op: str, *tensors: Tensor) -> str | None:
    """Why this backend can't run ``op`` on these tensors; None: it can."""
    return None


# --------------------------------------------------------------------------------------------- embedding_bag


class _TablePlan(NamedTuple):
    """One weight tensor's share of a lookup."""

    columns: Tensor | None  # id columns that read it; None: all of them, in order
    segments: Tensor | None  # output slot of each id column; None: one slot a column
    n_segments: int
    mean: Tensor | None  # [n_segments] slots that are averaged


class _Plan(NamedTuple):
    """A spec and the batch's bag lengths, turned into index tensors on the batch's device."""

    vocab: Tensor  # [S]
    offset: Tensor  # [S]
    padding: Tensor | None  # [2, S] ids that are padding
    has_padding: Tensor | None  # [2, S]
    replacement: Tensor | None  # [S] row that stands for unknown ids, -1: zero vector, -2: raise
    tables: tuple[_TablePlan, ...]
    order: Tensor | None  # output columns, where the tables' pieces are not in the spec's order


_plans: dict[tuple, _Plan] = {}


def plan_of(spec: EmbeddingSpec, columns: tuple[int, ...], device: torch.device) -> _Plan:
    """:func:`make_plan`, kept for the next batch."""
    if torch.compiler.is_compiling():
        return make_plan(spec, columns, device)
    key = (spec, columns, device)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 256:  # sequence lengths may differ from batch to batch
            _plans.clear()
        plan = _plans[key] = make_plan(spec, columns, device)
    return plan


def make_plan(spec: EmbeddingSpec, columns: tuple[int, ...], device: torch.device) -> _Plan:
    """A spec and the bags' column offsets as index tensors on ``device``."""
    bags = spec.bags
    bag_of = [f for f in range(len(bags)) for _ in range(columns[f + 1] - columns[f])]

    def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    padding = has_padding = replacement = None
    if any(bag.padding for bag in bags):
        pads = [((*bags[f].padding, 0, 0)[:2], len(bags[f].padding)) for f in bag_of]
        padding = tensor([[p[k] for p, _ in pads] for k in range(2)])
        has_padding = tensor([[n > k for _, n in pads] for k in range(2)], torch.bool)
    if any(bag.oov != "raise" for bag in bags):
        code: dict[Any, Any] = {"raise": -2, "zero": -1}
        replacement = tensor([code.get(bags[f].oov, bags[f].oov) for f in bag_of])

    tables, starts = [], {}
    at = 0
    for table in range(spec.n_tables):
        mine = [s for s, f in enumerate(bag_of) if bags[f].table == table]
        segments: list[int] = []
        mean: list[bool] = []
        n_segments = 0
        for f, bag in enumerate(bags):
            if bag.table != table:
                continue
            starts[f] = at + n_segments * bag.dim
            length = columns[f + 1] - columns[f]
            own = length if bag.pooling == "concat" else 1
            segments += range(n_segments, n_segments + own) if bag.pooling == "concat" else [n_segments] * length
            mean += [bag.pooling == "mean"] * own
            n_segments += own
            dim = bag.dim
        at += n_segments * dim
        pooled = segments != list(range(n_segments))
        tables.append(
            _TablePlan(
                None if mine == list(range(len(bag_of))) else tensor(mine),
                tensor(segments) if pooled else None,
                n_segments,
                tensor(mean, torch.bool) if any(mean) else None,
            )
        )
    widths = spec.bag_widths(columns)
    order = [c for f in range(len(bags)) for c in range(starts[f], starts[f] + widths[f])]
    return _Plan(
        tensor([bags[f].vocab for f in bag_of]),
        tensor([bags[f].offset for f in bag_of]),
        padding,
        has_padding,
        replacement,
        tuple(tables),
        None if order == list(range(len(order))) else tensor([*order, *range(at, at + spec.n_dense)]),
    )


def resolve(
    ids: Tensor,
    vocab: Tensor,
    offset: Tensor,
    padding: Tensor | None,
    has_padding: Tensor | None,
    replacement: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows of the weights [B, S]; a mask of the lookups that count (None: all); a mask of the ids that are refused."""
    bad = (ids < 0) | (ids >= vocab)
    keep = None
    if padding is not None and has_padding is not None:
        pad = ((ids == padding[0]) & has_padding[0]) | ((ids == padding[1]) & has_padding[1])
        bad = bad & ~pad
        keep = ~pad
    refused = bad
    if replacement is not None:
        refused = bad & (replacement == -2)
        lost = bad & (replacement == -1)
        keep = ~lost if keep is None else keep & ~lost
        ids = torch.where(bad, replacement, ids)
    rows = ids + offset
    return rows if keep is None else torch.where(keep, rows, 0), keep, refused


def _refuse(ids: Tensor, refused: Tensor, vocab: Tensor, columns: Sequence[int], names: Sequence[str]) -> None:
    """Raise for the first refused id, if there is one."""
    if refused.any():
        row, column = (int(i) for i in refused.nonzero()[0])
        feature = max(f for f in range(len(names)) if columns[f] <= column)
        raise BadIdError.at(names[feature], int(ids[row, column]), row, int(vocab[column]))


def raise_bad_id(ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec, ragged: Ragged | None = None) -> None:
    """Raise :class:`BadIdError` for the first id of ``ids [B, S]``, then of the ragged ones, that its bag refuses;
    return if there is none."""
    plan = plan_of(spec, columns, ids.device)
    refused = resolve(ids, *plan[:5])[2]
    _refuse(ids, refused, plan.vocab, columns, [bag.name for bag in spec.bags])
    if ragged is not None:
        from .eager_general import padded

        for r, bag in enumerate(bag for bag in spec.bags if bag.is_ragged):
            padded(ragged, r, bag)


# the check reads its answer on the host, which a CUDA graph can't do: mode="reduce-overhead" then goes without
@torch.library.custom_op("fastmtl::embedding_rows", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _checked_rows(
    ids: Tensor, vocab: Tensor, offset: Tensor, padding: Tensor | None, has_padding: Tensor | None,
    replacement: Tensor | None, columns: list[int], names: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`_resolve` and its check as one opaque op, so that torch.compile keeps both without a graph break."""
    rows, keep, refused = resolve(ids, vocab, offset, padding, has_padding, replacement)
    _refuse(ids, refused, vocab, columns, names.split("\n"))
    return rows, torch.ones_like(rows, dtype=torch.bool) if keep is None else keep


@_checked_rows.register_fake
def _(ids: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids, dtype=torch.int64), torch.empty_like(ids, dtype=torch.bool)


def rows_of(ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec, plan: _Plan) -> tuple[Tensor, Tensor | None]:
    """Rows of the weights ``[B, S]`` and a mask of the lookups that count (None: all); refused ids raise."""
    names = [bag.name for bag in spec.bags]
    if torch.compiler.is_compiling():
        rows, keep = _checked_rows(ids, *plan[:5], list(columns), "\n".join(names))
        return rows, None if plan.padding is None and plan.replacement is None else keep
    rows, keep, refused = resolve(ids, *plan[:5])
    _refuse(ids, refused, plan.vocab, columns, names)
    return rows, keep


def embedding_bag(
    weights: list[Tensor],
    ids: Tensor,
    columns: tuple[int, ...],
    dense: Tensor | None,
    spec: EmbeddingSpec,
    scales: Tensor | None = None,
    ragged: Ragged | None = None,
) -> Tensor:
    """See :func:`fastmtl.ops.embedding_bag`."""
    if exporting() and scales is None and ragged is None:
        return _embedding_bag_exported(weights, ids, columns, dense, spec)
    if weights and weights[0].is_cpu and weights[0].dtype in (torch.float16, torch.bfloat16):
        weights, dense = [weight.float() for weight in weights], None if dense is None else dense.float()
    if not (spec.is_common and scales is None and ragged is None):
        from .eager_general import embedding_bag_general

        return embedding_bag_general(weights, ids, columns, dense, spec, scales, ragged)
    pieces = []
    order = None
    if spec.bags:
        plan = plan_of(spec, columns, ids.device)
        order = plan.order
        rows, keep = rows_of(ids, columns, spec, plan)
        for weight, table in zip(weights, plan.tables, strict=True):
            pieces.append(_lookup(weight, rows, keep, table))
    if dense is not None:
        pieces.append(dense)
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return out if order is None else out.index_select(1, order)


def _embedding_bag_exported(
    weights: list[Tensor], ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
) -> Tensor:
    """The op bag by bag, for a graph in another runtime's terms: lengths stay symbolic, unknown ids end its run."""
    pieces = []
    for f, bag in enumerate(spec.bags):
        part = ids[:, columns[f] : columns[f + 1]]
        keep = None
        for pad in bag.padding:
            keep = (part != pad) if keep is None else keep & (part != pad)
        if bag.oov != "raise":
            known = (part >= 0) & (part < bag.vocab)
            if bag.oov == "zero":
                keep = known if keep is None else keep & known
            else:
                part = torch.where(known, part, int(bag.oov))
        else:
            # other runtimes take -1 for the last row, and refuse what is beyond it
            part = torch.where(part < 0, bag.vocab, part)
        table = weights[bag.table][bag.offset : bag.offset + bag.vocab]
        emb = F.embedding(part if keep is None else torch.where(keep, part, 0), table)
        if keep is not None:
            emb = emb * keep.unsqueeze(-1).to(emb.dtype)
        if bag.pooling == "concat":
            emb = emb.flatten(1)
        elif bag.pooling == "max":
            counts = torch.ones_like(part, dtype=torch.bool) if keep is None else keep
            emb = torch.where(counts.unsqueeze(-1), emb, -torch.inf).amax(dim=1)
            emb = torch.where(counts.any(dim=1, keepdim=True), emb, 0)
        else:
            counted = part.shape[1] if keep is None else keep.sum(dim=1, keepdim=True).clamp(min=1)
            emb = emb.sum(dim=1)
            if bag.pooling == "mean":
                emb = emb / counted
        pieces.append(emb)
    return torch.cat(pieces if dense is None else [*pieces, dense], dim=1)


def _lookup(weight: Tensor, rows: Tensor, keep: Tensor | None, table: _TablePlan) -> Tensor:
    if table.columns is not None:
        rows = rows.index_select(1, table.columns)
        keep = None if keep is None else keep.index_select(1, table.columns)
    emb = F.embedding(rows, weight)  # [B, S, D]
    if keep is not None:
        emb = torch.where(keep.unsqueeze(-1), emb, 0)
    if table.segments is not None:
        emb = emb.new_zeros(emb.shape[0], table.n_segments, emb.shape[2]).index_add(1, table.segments, emb)
    if table.mean is not None:
        counted = torch.ones_like(rows, dtype=emb.dtype) if keep is None else keep.to(emb.dtype)
        if table.segments is not None:
            counted = counted.new_zeros(emb.shape[0], table.n_segments).index_add(1, table.segments, counted)
        emb = emb / torch.where(table.mean, counted.clamp(min=1), 1).unsqueeze(-1)
    return emb.flatten(1)


def embedding_bag_bwd_sparse(
    grad: Tensor,
    ids: Tensor,
    columns: tuple[int, ...],
    spec: EmbeddingSpec,
    shapes: list[torch.Size],
    needs: list[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """For each weight that needs it: ``(rows [n] ascending and unique, their gradients [n, D])``.

    Args:
        grad: ``[B, W]``, the gradient of the output.
        shapes: of the weights.
        needs: which weights' gradients are wanted.
    """
    plan = plan_of(spec, columns, ids.device)
    rows, keep, refused = resolve(ids, *plan[:5])
    keep = ~refused if keep is None else keep & ~refused
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    start = 0
    for f, (bag, width) in enumerate(zip(spec.bags, spec.bag_widths(columns), strict=True)):
        part = slice(columns[f], columns[f + 1])
        counted = keep[:, part]
        share = grad[:, start : start + width]
        start += width
        if bag.pooling == "concat":
            each = share.unflatten(1, (-1, bag.dim))
        else:
            if bag.pooling == "mean":
                share = share / counted.sum(dim=1, keepdim=True).clamp(min=1)
            each = share.unsqueeze(1).expand(-1, counted.shape[1], -1)
        found.setdefault(bag.table, []).append((rows[:, part][counted], each[counted]))
    result: list[tuple[Tensor, Tensor] | None] = []
    for table, need in enumerate(needs):
        if not need:
            result.append(None)
            continue
        pieces = found.get(table, [])
        if not pieces:
            result.append((ids.new_empty(0), grad.new_empty(0, shapes[table][1])))
            continue
        unique, place = torch.cat([at for at, _ in pieces]).unique(return_inverse=True)
        values = torch.cat([value for _, value in pieces])
        result.append((unique.long(), values.new_zeros(len(unique), values.shape[1]).index_add_(0, place, values)))
    return result


# ----------------------------------------------------------------------------------------------- expert_gate


def _first_linear(x: Tensor, weight: Tensor, bias: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """``[N, B, I]`` through the rows ``spans[n]`` of ``weight [C, I]`` for each input: ``[B, C]``.

    One GEMM for each run of inputs of equal share.
    """
    if len(x) == 1:
        return F.linear(x[0], weight, bias)
    pieces, n = [], 0
    while n < len(x):
        share = spans[n].stop - spans[n].start
        m = n
        while m < len(x) and spans[m].stop - spans[m].start == share:
            m += 1
        rows = slice(spans[n].start, spans[m - 1].stop)
        if m - n == 1:
            pieces.append(F.linear(x[n], weight[rows], bias[rows]))
        elif share:
            w = weight[rows].view(m - n, share, -1).transpose(1, 2)
            z = torch.baddbmm(bias[rows].view(m - n, 1, share), x[n:m], w)  # [m - n, B, share]
            pieces.append(z.transpose(0, 1).flatten(1))
        n = m
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def activate(z: Tensor, activation: str, alpha: Any) -> Tensor:
    """The activation of ``z [B, E, H]``; ``alpha [E]`` is its learned scalar for each expert."""
    if activation == "relu":
        return F.relu(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    if activation == "leakyrelu":
        return F.leaky_relu(z, LEAKY_SLOPE)
    if activation == "prelu":
        return torch.where(z > 0, z, alpha.unsqueeze(-1) * z)
    if activation == "dice":
        # normalised over the layer's units, not over the batch, and by the SUM of squares: as torch-rechub does
        centred = z - z.mean(dim=-1, keepdim=True)
        gate = torch.sigmoid(centred / (centred.square() + DICE_EPSILON).sum(dim=-1, keepdim=True).sqrt())
        return gate * z + (1 - gate) * alpha.unsqueeze(-1) * z
    if activation == "softmax":
        return torch.softmax(z, dim=-1)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    return z


def _hidden(z: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, layer: int, training: bool) -> Tensor:
    """Normalised ``z [B, E * H]`` of a layer to its activations ``[B, E, H]``."""
    z = z.unflatten(1, (spec.n_experts, spec.dims[layer]))
    h = activate(z, spec.activation, params.alpha[layer] if params.alpha else None)
    return F.dropout(h, spec.dropout, training) if spec.dropout else h


def _normalise(z: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, training: bool) -> Tensor:
    # one row has no batch statistics: it is normalised by the running ones and does not change them. (A condition of
    # its own: where torch.compile has made the number of rows a variable, a comparison is no bool.)
    if training and z.shape[0] < 2:
        training = False
    return F.batch_norm(z, mean, var, gamma, beta, training, BN_MOMENTUM, BN_EPSILON)


def _gate_weights(x: Tensor, gate: GateParams, spec: ExpertGateSpec, training: bool) -> Tensor:
    """The gates' mixing weights ``[B, G, E]``, zero where a gate skips an expert."""
    z = _first_linear(x, gate.weight, gate.bias, spec.gate_input_spans)
    logits = _normalise(z, gate.running_mean, gate.running_var, gate.gamma, gate.beta, training)
    n_gates, n_experts = len(spec.gates), spec.n_experts
    everyone = tuple(range(n_experts))
    if any(gate.experts != everyone for gate in spec.gates):
        # a gate's missing experts read one extra column of -inf, whose softmax is 0
        absent = spec.gate_rows
        source = [absent] * (n_gates * n_experts)
        for g, (mixed, span) in enumerate(zip(spec.gates, spec.gate_spans, strict=True)):
            for row, e in zip(range(*span), mixed.experts, strict=True):
                source[g * n_experts + e] = row
        logits = F.pad(logits, (0, 1), value=float("-inf")).index_select(1, torch.tensor(source, device=z.device))
    return torch.softmax(logits.unflatten(1, (n_gates, n_experts)), dim=-1)


def expert_gate(x: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, training: bool) -> Tensor:
    """See :func:`fastmtl.ops.expert_gate`."""
    n_experts = spec.n_experts
    if not spec.dims:
        h = x[list(spec.expert_input)].transpose(0, 1)
    for layer, width in enumerate(spec.dims):
        weight, bias = params.weight[layer], params.bias[layer]
        if layer == 0:
            spans = tuple(Span(a * width, b * width) for a, b in spec.expert_spans)
            z = _first_linear(x, weight, bias, spans)
        else:
            w = weight.view(n_experts, width, -1).transpose(1, 2)
            z = torch.baddbmm(bias.view(n_experts, 1, width), h.transpose(0, 1), w).transpose(0, 1).flatten(1)
        z = _normalise(
            z, params.running_mean[layer], params.running_var[layer], params.gamma[layer], params.beta[layer], training
        )
        z = z.unflatten(1, (n_experts, width))
        h = activate(z, spec.activation, params.alpha[layer] if params.alpha else None)  # [B, E, H]
        if spec.dropout:
            h = F.dropout(h, spec.dropout, training)
    if params.out_weight is not None and params.out_bias is not None:
        return (h * params.out_weight).sum(dim=-1) + params.out_bias  # [B, E]
    if params.gate is not None:
        h = torch.bmm(_gate_weights(x, params.gate, spec, training), h)  # [B, G, H]
    return h.transpose(0, 1)
