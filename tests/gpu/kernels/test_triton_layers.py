"""expert_gate as Triton kernels: forward, backward and running statistics against float64, in each precision."""

import pytest
import torch
from triton_cases import Layer, check_parts, drawer, eager_step, out_shape, random_layer, random_params

from fastmtl import ops
from fastmtl.backends import eager
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import batch_norm, configs, passes
from fastmtl.backends.triton.hidden import Hidden
from fastmtl.backends.triton.layer_plan import layer_plan
from fastmtl.spec import ACTIVATIONS, ExpertGateParams, ExpertGateSpec

# a sigmoid far to the left is 1 / (1 + inf); rows of a block that no batch has may be anywhere
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def triton_step(layer: Layer, training: bool, grad: torch.Tensor, device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, gradients of x and of the parameters; what was saved is proved untouched."""
    x, params, spec = layer.x, layer.params, layer.spec
    out, saved = backend.expert_gate_fwd(x, params, spec, training)
    before = [tensor.clone() for tensor in saved]
    dx, grads = backend.expert_gate_bwd(grad.to(device, out.dtype), x, params, spec, training, list(saved), True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, saved, strict=True))
    assert backend.expert_gate_bwd(grad.to(device, out.dtype), x, params, spec, training, list(saved), False)[0] is None
    return out, [dx, *grads]


def parts(layer: Layer, dtype: torch.dtype, training: bool, grad: torch.Tensor) -> list[list[torch.Tensor]]:
    """Output, gradients, running statistics, by eager."""
    cast = layer.cast(dtype)
    out, grads = eager_step(cast, training, grad)
    return [[out], grads, cast.params.running()]


def compare(layer: Layer, device, factor: float = 2.0) -> None:
    """Everything the op returns or changes, in training and in evaluation."""
    shape = out_shape(layer)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        on = layer.cast(torch.float32, device)
        out, grads = triton_step(on, training, grad, device)
        mine = [[out], grads, on.params.running()]

        def by_eager(one, training=training):
            return parts(one, torch.float32, training, grad), parts(one, torch.float64, training, grad)

        check_parts(mine, by_eager, layer, factor=factor)


@pytest.mark.parametrize("case", range(12))
def test_random_layers(case, seed, device):
    compare(random_layer(seed + case), device)


@pytest.mark.parametrize("kind", ["gates", "heads"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, kind, seed, device):
    """(A layer without gates or heads differs from these in one line; the random layers have it.)"""
    compare(random_layer(seed, activation=activation, kind=kind, batch=17, depth=2), device)


def test_linear_heads(seed, device):
    """Experts without hidden layers, two of which read one input; in bf16 too, and units that are not contiguous."""
    rng = torch.Generator().manual_seed(seed)
    spec = ExpertGateSpec(21, (0, 0, 2), (), output_layer=True)
    layer = Layer(spec, random_params(spec, rng), torch.randn(3, 35, 21, generator=rng, dtype=torch.float64))
    compare(layer, device)
    turned = layer.x.transpose(1, 2).contiguous().transpose(1, 2)
    compare(layer._replace(x=turned), device)
    mine = layer.cast(torch.float32, device)
    out, _ = backend.expert_gate_fwd(mine.x.bfloat16(), mine.params, spec, True)
    wanted = eager.expert_gate(layer.x.bfloat16().double(), layer.params, spec, True)
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_of_a_few_rows(batch, seed, device):
    """Columns whose two or three values are nearly equal amplify each one's round-off: theirs may be tenfold."""
    compare(random_layer(seed, batch=batch, kind="gates", activation="silu"), device, factor=10)


@pytest.mark.parametrize("kind", ["gates", "experts", "heads"])
@pytest.mark.parametrize("batch", [0, 1])
def test_no_row_and_one(batch, kind, seed, device):
    """One row is normalised by the running statistics and leaves them; no row gives no output and zero gradients."""
    layer = random_layer(seed, kind=kind, batch=batch)
    if batch:
        compare(layer, device)
        return
    mine = layer.cast(torch.float32, device)
    before = [tensor.clone() for tensor in mine.params.running()]
    grad = torch.zeros(out_shape(layer))
    out, grads = triton_step(mine, True, grad, device)
    assert out.shape == out_shape(layer)
    assert [g.shape for g in grads] == [t.shape for t in (mine.x, *mine.params.learned())]
    assert all(not g.any() for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.params.running(), strict=True))


@pytest.mark.parametrize("case", range(4))
def test_bf16_under_autocast(case, seed, device):
    """At most twice eager's own error under autocast, and a floor of bf16's spacing."""
    layer = random_layer(seed + case, batch=35, activation=("relu", "silu", "prelu", "softmax")[case])
    grad = torch.randn(out_shape(layer), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def by_eager(one):
        exact = parts(one, torch.float64, True, grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return parts(one, torch.float32, True, grad)[:2], exact[:2]

    mine = layer.cast(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, saved = backend.expert_gate_fwd(mine.x, mine.params, mine.spec, True)
    assert out.dtype is (torch.float32 if layer.spec.output_layer else torch.bfloat16)
    dx, grads = backend.expert_gate_bwd(  # autograd runs it outside autocast
        grad.to(device, out.dtype), mine.x, mine.params, mine.spec, True, list(saved), True
    )
    assert all(g.dtype is torch.float32 for g in (dx, *grads))
    check_parts([[out], [dx, *grads]], by_eager, layer, relative=(2**-8, 2**-6), spacing=2.0**-8)


def test_bf16_inputs(seed, device):
    """Inputs in bf16 choose bf16 products without autocast; their gradient has their dtype."""
    layer = random_layer(seed, kind="gates", batch=19)
    mine = layer.cast(torch.float32, device)
    x = mine.x.bfloat16()
    out, saved = backend.expert_gate_fwd(x, mine.params, mine.spec, True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        again, _ = backend.expert_gate_fwd(x, layer.cast(torch.float32, device).params, mine.spec, True)
    assert torch.equal(out, again)
    dx, _ = backend.expert_gate_bwd(torch.ones_like(out), x, mine.params, mine.spec, True, list(saved), True)
    assert dx.dtype is torch.bfloat16


@pytest.mark.usefixtures("triton_backend")
def test_several_backwards_over_one_graph(seed, device):
    """GradNorm and MetaBalance walk a retained graph once a task: the same gradient gives the same bits, and gradients
    of parts add up to that of the whole."""
    layer = random_layer(seed, kind="gates", batch=17, dropout=0.3).cast(torch.float32, device)
    leaves = [layer.x.requires_grad_(), *(tensor.requires_grad_() for tensor in layer.params.learned())]
    params = ExpertGateParams.of(leaves[1:], layer.params.running(), layer.spec)
    out = ops.expert_gate(leaves[0], params, layer.spec, True)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
    parts = torch.arange(len(out), device=device)[:, None, None] % 2 * weight

    def gradients(grad):
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    whole, first, second = gradients(weight), gradients(parts), gradients(weight - parts)
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(weight), strict=True))
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close(b + c, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()) + 1e-6)


def test_strided_inputs_and_gradients(seed, device):
    """An input that is a slice, one whose units are not contiguous, and a gradient that was expanded: the same numbers
    to rounding, since the library's product may take another way through another layout."""

    def assert_same(one, other):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.abs().max()))

    layer = random_layer(seed, kind="gates", batch=17, activation="relu").cast(torch.float32, device)
    x, params, spec = layer.x, layer.params, layer.spec
    ref, saved = backend.expert_gate_fwd(x, layer.cast(torch.float32, device).params, spec, True)
    wide = torch.cat([x, x + 1], dim=2)[..., : x.shape[2]]
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    dx, _ = backend.expert_gate_bwd(torch.ones_like(ref), x, params, spec, True, list(saved), True)
    for other in (wide, turned):
        out, kept = backend.expert_gate_fwd(other, layer.cast(torch.float32, device).params, spec, True)
        assert_same(out, ref)
        ones = torch.ones((), device=device).expand(out.shape)
        assert_same(backend.expert_gate_bwd(ones, other, params, spec, True, list(kept), True)[0], dx)


def test_not_a_number_goes_through(seed, device):
    """A NaN in the input must be seen in the output, not turned into a number by an activation."""
    layer = random_layer(seed, kind="experts", batch=17, activation="relu").cast(torch.float32, device)
    layer.x[0, 3, 0] = float("nan")
    out, _ = backend.expert_gate_fwd(layer.x, layer.params, layer.spec, False)
    readers = [e for e, n in enumerate(layer.spec.expert_input) if n == 0]
    assert out[readers, 3].isnan().all()
    ref = eager.expert_gate(layer.x.cpu(), layer.cast(torch.float32).params, layer.spec, False)
    assert torch.equal(out.isnan().cpu(), ref.isnan())


@pytest.mark.parametrize("batch", [5, 35, 1111])
def test_statistics_of_columns_far_from_zero(batch, seed, device):
    """A mean a thousand times the standard deviation: both are good to what fp32 holds of the numbers, from a few runs
    of rows and from many."""
    rng = torch.Generator().manual_seed(seed)
    spec = ExpertGateSpec(4, (0, 0, 0), (11,))
    params = Layer(spec, random_params(spec, rng), torch.zeros(1, 0, 4)).cast(torch.float32, device).params
    z = (1e3 + torch.randn(batch, layer_plan(spec, device).pitch[0], generator=rng)).to(device)
    part, run = passes.pieces(z)
    assert part.shape[0] * run >= batch
    stat = batch_norm.statistics(part, batch, run, params, layer_plan(spec, device), 0)[:, :33].cpu().double()
    var, mean = torch.var_mean(z[:, :33].cpu().double(), 0, correction=0)
    torch.testing.assert_close(stat[0], mean, rtol=6e-7, atol=0)
    torch.testing.assert_close(stat[1], (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("n_pieces", [1, 64, 65, 256])
def test_pieces_are_added_up(n_pieces, seed, device):
    """Of experts and gates, of which there may be more or fewer; heads and losses go with their expert's first unit."""
    rng = torch.Generator().manual_seed(seed)
    draw = drawer(rng)
    for kind in ("gates", "heads"):
        layer = random_layer(seed, kind=kind, activation="prelu", batch=9)
        while not layer.spec.dims:
            seed += 1
            layer = random_layer(seed, kind=kind, activation="prelu", batch=9)
        spec, plan = layer.spec, layer_plan(layer.spec, device)
        params = layer.cast(torch.float32, device).params
        pitch, columns, units = plan.pitch[0], plan.columns[0], spec.dims[0]
        stat = torch.rand(4, pitch, generator=rng).to(device)
        hidden = Hidden.of(torch.zeros(9, pitch, device=device), stat, params, spec, None, 0)
        part = torch.randn(n_pieces, batch_norm.SUMS, pitch, generator=rng).to(device)
        gate_part = torch.randn(draw(1, 257), batch_norm.SUMS, pitch, generator=rng).to(device)
        grads = torch.full((batch_norm.SUMS + 1, pitch), torch.nan, device=device)
        coef, head = grads[:2].clone(), grads.new_full((2, spec.n_experts), torch.nan)
        is_head = kind == "heads"
        gates = None if is_head else batch_norm.GateSums(gate_part, plan.gate_places, stat, grads, coef)
        batch_norm.add_up(part, hidden, grads, coef, columns, True, head if is_head else None, is_head, gates)
        wanted = part.cpu().double().sum(0)
        written = [*range(columns)]
        if gates is not None:
            places = plan.gate_columns
            wanted[:, places] = gate_part.cpu().double().sum(0)[:, places]
            written += places
        near = {"rtol": 1e-5, "atol": 1e-4}
        found = grads.cpu().double()
        torch.testing.assert_close(found[:2, written], wanted[:2, written], **near)
        torch.testing.assert_close(found[2, :columns], wanted[2, :columns], **near)
        slope = wanted[1] * stat[1].cpu().double() / 9
        torch.testing.assert_close(
            coef.cpu().double()[:, written], torch.stack([slope, wanted[0] / 9])[:, written], **near
        )
        assert found[:, [c for c in range(pitch) if c not in written]].isnan().all()
        if is_head:
            torch.testing.assert_close(found[3, :columns], wanted[3, :columns], **near)
            torch.testing.assert_close(head.cpu().double(), wanted[4:6, :columns:units], **near)


@pytest.mark.parametrize("cap", [16, 1 << 30])
def test_no_pass_leaves_more_pieces_than_are_added_up_at_once(cap, seed):
    """For any batch, width and number of experts; runs are whole blocks, and as many as a pass reads at a time."""
    draw = drawer(torch.Generator().manual_seed(seed))
    config = configs.ExpertGateConfig(cap=cap)
    for _ in range(300):
        n_rows, units, n_experts = draw(1, 10 ** draw(1, 8)), draw(1, 700), draw(1, 20)
        found = [
            (config.pieces(n_rows, 16 * draw(1, 300)), 4),
            (config.back(n_rows, units, n_experts), 2),
            (config.softmax(2 ** draw(0, 6), n_rows), 1),
        ]
        for mixed in (False, True):
            rows, together = config.tail(units, bool(draw(0, 2)), n_rows, n_experts, mixed)
            assert n_experts % together == rows.block_b % together == rows.run % (rows.block_b // together) == 0
            assert -(-n_rows // rows.run) <= configs.PIECES
        for rows, at_once in found:
            assert rows.run % (at_once * rows.block_b) == 0
            assert -(-n_rows // rows.run) <= configs.PIECES
