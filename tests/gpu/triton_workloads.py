"""The real configurations whose kernels are compiled ahead of time: shapes of the data sets, on meta tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastmtl.backends import deferred
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import inference, optimizer
from fastmtl.backends.updates import FIELDS, RULES, STATES, STEP_FIELDS, Update
from fastmtl.spec import (
    LEARNED_ACTIVATIONS,
    Bag,
    EmbeddingSpec,
    ExpertGateParams,
    ExpertGateSpec,
    Gate,
    GateParams,
)

#: Vocabularies of the reference data set Ali-CCP, whose features have width 16 and 8 dense columns beside them.
ALI_CCP = (
    238635, 98, 14, 3, 8, 4, 4, 3, 5, 467298, 6929, 263942, 80232, 106399, 5888, 104830, 51878, 37148, 4, 5853, 105622,
    53843, 31858,
)  # fmt: skip


@contextlib.contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """torch.autocast("cuda", torch.bfloat16), which switches itself off where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def _embedding(
    vocabularies: tuple[int, ...], dim: int, n_dense: int, batch: int, dtype: torch.dtype, rules: tuple[str, ...] = ()
) -> None:
    offset, bags = 0, []
    for f, vocab in enumerate(vocabularies):
        bags.append(Bag(f"f{f}", 0, offset, vocab, dim))
        offset += vocab
    spec = EmbeddingSpec(tuple(bags), n_dense)
    columns = tuple(range(len(bags) + 1))
    weight = torch.empty(offset, dim, device="meta")
    ids = torch.empty(batch, len(bags), dtype=torch.int64, device="meta")
    dense = torch.empty(batch, n_dense, device="meta")
    with _autocast(dtype is torch.bfloat16):
        out = backend.embedding_bag_fwd([weight], ids, columns, dense, spec)
    assert out.dtype is dtype
    with deferred.watching(deferred.Watch(out.device)):
        backend.embedding_bag_fwd([weight], ids.int(), columns, dense, spec)
    for backward in (backend.embedding_bag_bwd, backend.embedding_bag_bwd_sparse):
        backward(out, ids, columns, spec, [weight.shape], [True])
    far = torch.empty_strided(out.shape, (2**31 // batch, 1), dtype=dtype, device="meta")
    backend.embedding_bag_bwd(far, ids, columns, spec, [weight.shape], [True])
    for name in rules:
        rule = RULES.index(name)
        states = [torch.empty_like(weight[:, 0] if name == "rowwise_adagrad" else weight)] * STATES[rule]
        last = torch.empty(offset, dtype=torch.int32, device="meta")
        update = Update(weight, states, last, rule, torch.empty(FIELDS, device="meta"), last[:1])
        (index,) = backend.embedding_bag_index(ids, columns, spec, [weight.shape], [True])
        optimizer.table_catch_up(
            weight, states, last, rule, torch.empty(64, FIELDS, device="meta"), 1, index, -1, last[:1]
        )
        backend.embedding_bag_bwd_step(out, ids, columns, spec, [update])


def _updates(rules: tuple[str, ...], rows: int, dim: int, touched: int) -> None:
    """Of a table: rows caught up, a step with its sweep, the same by the clock of a captured step, and lazily."""
    p = torch.empty(rows, dim, device="meta")
    last = torch.empty(rows, dtype=torch.int32, device="meta")
    steps = torch.empty(1024, FIELDS, device="meta")
    listed = torch.empty(touched, dtype=torch.int64, device="meta")
    grads = torch.empty(touched, dim, device="meta")
    clock = torch.empty(1, dtype=torch.int32, device="meta")
    optimizer.advance(steps, steps[0], clock)
    losses, count = torch.empty(2, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    backend.note_losses(losses, losses, losses, count, count, losses[:1], clock, clock)
    for name in rules:
        rule = RULES.index(name)
        states = [torch.empty_like(p[:, 0] if name == "rowwise_adagrad" else p) for _ in range(STATES[rule])]
        table = (p, states, last, rule, steps, 1)
        optimizer.table_replay(*table, listed, 0, 0, 1023)
        optimizer.table_step(*table, listed, grads, False, 0, rows // 32)
        optimizer.table_replay(*table, listed, 0, 0, 0, clock)
        optimizer.table_step(*table, listed, grads, False, 0, rows // 32, clock)
        optimizer.table_step(*table, listed, grads, True, 0, 0)


def _batch(n_rows: int, batch: int, numbers: torch.dtype, *widths: tuple[int, torch.dtype]) -> None:
    """A batch of columns on the device; a last one that is shorter."""
    for n in (batch, batch - 7):
        rows = torch.empty(n, dtype=numbers, device="meta")
        tensors, out = ([torch.empty(m, w, dtype=d, device="meta") for w, d in widths] for m in (n_rows, n))
        backend.cut_rows(tensors, rows, out)


def _dense_steps(rules: tuple[str, ...], *layers: ExpertGateSpec) -> None:
    """The step of a model's layers, vetoed or not."""
    params = [p for spec in layers for p in _parameters(spec).learned()]
    rate = torch.empty((), device="meta")
    numbers = dict.fromkeys(STEP_FIELDS, 0.5)
    for name in rules:
        rule = RULES.index(name)
        states = [[torch.empty_like(p) for _ in range(STATES[rule])] for p in params]
        counts = [rate] * len(params) if name in ("adam", "adamw", "adagrad") else []
        settings = {"weight_decay": 1e-5, "lr_decay": 0.0, "beta1": 0.9, "beta2": 0.999}
        for lost in (None, rate):
            backend.dense_step(params, params, states, counts, rule, numbers, settings, rate, lost)


def _parameters(spec: ExpertGateSpec) -> ExpertGateParams:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    n_experts, widths = spec.n_experts, (spec.in_features, *spec.dims)
    weight = tuple(empty(n_experts * h, i) for i, h in itertools.pairwise(widths))
    columns = [tuple(empty(n_experts * h) for h in spec.dims) for _ in range(5)]
    alpha = tuple(empty(n_experts) for _ in spec.dims) if spec.activation in LEARNED_ACTIVATIONS else ()
    out = (empty(n_experts, widths[-1]), empty(n_experts)) if spec.output_layer else (None, None)
    gate = None
    if spec.gates:
        gate = GateParams(empty(spec.gate_rows, spec.in_features), *(empty(spec.gate_rows) for _ in range(5)))
    return ExpertGateParams(weight, *columns, alpha, *out, gate)


def _layer(spec: ExpertGateSpec, batch: int, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pitch = -(-spec.in_features // 8) * 8  # as embedding_bag lays its output
    x = torch.empty(spec.n_inputs, batch, pitch, dtype=dtype, device="meta")[..., : spec.in_features]
    params = _parameters(spec)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        out, saved = backend.expert_gate_fwd(x, params, spec, True)
        backend.expert_gate_bwd(torch.empty_like(out), x, params, spec, True, list(saved), True)
    finally:
        torch.set_float32_matmul_precision("highest")


def _losses(batch: int, n_tasks: int) -> None:
    logits, labels = (torch.empty(batch, n_tasks, device="meta") for _ in range(2))
    backend.task_losses(logits, labels, torch.empty(n_tasks, dtype=torch.bool, device="meta"), logits[0])


def _tower_losses(spec: ExpertGateSpec, batch: int) -> None:
    x = torch.empty(spec.n_inputs, batch, spec.in_features, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(batch, spec.n_experts, device="meta")
    binary = torch.empty(spec.n_experts, dtype=torch.bool, device="meta")
    assert backend.tower_losses(x, _parameters(spec), spec, labels, binary, labels[0], True)


def _inference(
    layers: tuple[ExpertGateSpec, ...], vocabularies: tuple[int, ...], dim: int, batch: int, precision: str
) -> None:
    """A whole model's predictions; the lookup gives what the first layer reads."""
    program = inference.Program(layers[0].in_features)
    inputs = [0]
    for spec in layers:
        inputs = program.layer(spec, _parameters(spec), inputs)
    for logit in inputs:
        program.output("probability", logit)
    n_dense = layers[0].in_features - dim * len(vocabularies)
    bags = tuple(Bag(f"f{f}", 0, 0, vocab, dim, oov="zero") for f, vocab in enumerate(vocabularies))
    ids = torch.empty(batch, len(bags), dtype=torch.int32, device="meta")
    dense = torch.empty(batch, n_dense, device="meta")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        out = program.pack(precision == "bf16").run(
            [torch.empty(sum(vocabularies), dim, device="meta")], ids, tuple(range(len(bags) + 1)), dense,
            EmbeddingSpec(bags, n_dense),
        )  # fmt: skip
        assert out.shape == (batch, len(inputs))
    finally:
        torch.set_float32_matmul_precision("highest")


def _mmoe(width: int, n_experts: int, dims: tuple[int, ...], n_tasks: int, **options: Any) -> ExpertGateSpec:
    gates = tuple(Gate(0, tuple(range(n_experts))) for _ in range(n_tasks))
    return ExpertGateSpec(width, (0,) * n_experts, dims, gates=gates, **options)


def _towers(width: int, dims: tuple[int, ...], n_tasks: int) -> ExpertGateSpec:
    return ExpertGateSpec(width, tuple(range(n_tasks)), dims, output_layer=True)


def _ple(
    level: int, width: int, dims: tuple[int, ...], specific: int, shared: int, n_tasks: int, last: bool = False
) -> ExpertGateSpec:
    """A level of PLE: task-major specific experts, then the shared ones; above the first, each group has an input."""
    groups = [t for t in range(n_tasks) for _ in range(specific)] + [n_tasks] * shared
    mine = [tuple(e for e, group in enumerate(groups) if group in (t, n_tasks)) for t in range(n_tasks)]
    gates = [Gate(t if level else 0, members) for t, members in enumerate(mine)]
    if not last:
        gates.append(Gate(n_tasks if level else 0, tuple(range(len(groups)))))
    return ExpertGateSpec(width, tuple(groups) if level else (0,) * len(groups), dims, gates=tuple(gates))


#: name -> (its calls, the architectures it is compiled for besides 90)
WORKLOADS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "embedding ali-ccp fp32": (partial(_embedding, ALI_CCP, 16, 8, 65536, torch.float32, ("adam",)), (80, 100)),
    "embedding ali-ccp bf16": (partial(_embedding, ALI_CCP, 16, 8, 4096, torch.bfloat16, ("adam",)), (80, 100)),
    "embedding census": (partial(_embedding, (91, 9, 52, 47, 17, 1240) * 5, 4, 7, 1024, torch.float32, RULES), ()),
    "embedding wide": (partial(_embedding, (1 << 30, 1 << 30), 128, 0, 65536, torch.float32, ("adamw",)), ()),
    "a batch ali-ccp": (
        partial(_batch, 1 << 23, 65536, torch.int32, (23, torch.int32), (8, torch.float32), (2, torch.float32)),
        (80, 100),
    ),
    "a batch ali-ccp of few rows": (
        partial(_batch, 1 << 23, 4096, torch.int32, (23, torch.int32), (8, torch.float32), (2, torch.float32)),
        (),
    ),
    "a batch of many rows": (
        partial(_batch, 1 << 32, 1024, torch.int64, (2, torch.int64), (50, torch.int64), (64, torch.float32)),
        (),
    ),
    "updates ali-ccp": (partial(_updates, ("adam",), sum(ALI_CCP), 16, 65536), (80, 100)),
    "updates of every rule": (partial(_updates, RULES, sum(ALI_CCP), 16, 65536), ()),
    "updates wide": (partial(_updates, ("adamw", "rowwise_adagrad"), 1 << 26, 128, 65536), ()),
    "dense steps": (
        partial(_dense_steps, ("adam",), _mmoe(376, 8, (256, 128), 2), _towers(128, (64, 32), 2)),
        (80, 100),
    ),
    "dense steps of every rule": (
        partial(
            _dense_steps, RULES[:-1], _ple(0, 376, (256, 128), 4, 2, 2), _ple(1, 128, (256, 128), 4, 2, 2, last=True)
        ),
        (),
    ),
    "updates narrow": (partial(_updates, ("adam",), 5000, 4, 8192), ()),
    **{
        f"mmoe ali-ccp {precision}": (partial(_layer, _mmoe(376, 8, (256, 128), 2), 65536, precision), (80, 100))
        for precision in ("bf16", "tf32", "ieee")
    },
    "mmoe ali-ccp small batch": (partial(_layer, _mmoe(376, 8, (256, 128), 2), 4096, "bf16"), ()),
    "mmoe ali-ccp dropout": (partial(_layer, _mmoe(376, 8, (256, 128), 2, dropout=0.2), 65536, "bf16"), ()),
    "mmoe aliexpress": (partial(_layer, _mmoe(319, 8, (512, 256), 2), 2048, "bf16"), (80,)),
    "mmoe census": (partial(_layer, _mmoe(139, 8, (16,), 2), 1024, "ieee"), ()),
    "mmoe dice": (partial(_layer, _mmoe(376, 4, (256, 128), 2, activation="dice"), 4096, "bf16"), ()),
    "ple level 2": (partial(_layer, _ple(1, 128, (256, 128), 4, 2, 2), 65536, "bf16"), (80, 100)),
    **{
        f"predictions ali-ccp {precision}": (
            partial(
                _inference, (_mmoe(376, 8, (256, 128), 2), _towers(128, (64, 32), 2)), ALI_CCP, 16, 65536, precision
            ),
            (80, 100),
        )
        for precision in ("bf16", "tf32", "ieee")
    },
    "predictions ple": (
        partial(
            _inference,
            (
                _ple(0, 376, (256, 128), 4, 2, 2),
                _ple(1, 128, (256, 128), 4, 2, 2, last=True),
                _towers(128, (64, 32), 2),
            ),
            ALI_CCP,
            16,
            65536,
            "bf16",
        ),
        (80, 100),
    ),
    "predictions of a few rows": (
        partial(_inference, (_mmoe(376, 8, (256, 128), 2), _towers(128, (64, 32), 2)), ALI_CCP, 16, 512, "bf16"),
        (),
    ),
    "predictions aliexpress": (
        partial(_inference, (_mmoe(319, 8, (512, 256), 2), _towers(256, (128, 64), 2)), (9999,) * 16, 16, 2048, "bf16"),
        (80, 100),
    ),
    "predictions census": (
        partial(_inference, (_mmoe(139, 8, (16,), 2), _towers(16, (8,), 2)), (1240,) * 33, 4, 1024, "ieee"),
        (80,),
    ),
    "towers with losses": (partial(_tower_losses, _towers(128, (64, 32), 2), 65536), (80, 100)),
    "linear heads": (partial(_layer, _towers(128, (), 2), 65536, "bf16"), (80, 100)),
    "losses": (partial(_losses, 65536, 2), (80, 100)),
    "towers ali-ccp": (partial(_layer, _towers(128, (64, 32), 2), 65536, "bf16"), (80, 100)),
}
