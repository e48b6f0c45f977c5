"""Tables' optimizers: torch.optim's numbers on dense gradients, and the native backend's to the last bit."""

import pytest
import torch
from triton_cases import check, drawer, random_lookup

from fastmtl.backends import native, updates
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import optimizer as update
from fastmtl.errors import BackendError
from fastmtl.optim import rules

#: name -> (class in torch.optim, settings)
RULES = {
    "adam with decay": ("Adam", {"lr": 1e-2, "weight_decay": 1e-2}),
    "adam": ("Adam", {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}),
    "adamw": ("AdamW", {"lr": 1e-2, "weight_decay": 1e-1}),
    "sgd with decay": ("SGD", {"lr": 0.1, "weight_decay": 1e-2}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-2}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 1e-2, "weight_decay": 1e-2}),
}
ROWWISE = updates.RULES.index("rowwise_adagrad")
ALWAYS, ONCE, NEVER = 0, 1, 2
STEPS, KEPT = 24, 8


def test_the_rules_are_those_of_the_optimizers():
    assert updates.RULES[: len(rules.RULES)] == rules.RULES
    assert len(rules.FIELDS) == updates.FIELDS
    assert [*rules.FIELDS] == ["l2", "shrink", "keep", "fresh", "fresh_square", "ahead", "root", "eps", "neg_lr"]


def schedule(step):
    """What the learning rate is multiplied by: a warm-up, a fall, a jump."""
    return min(1.0, (step + 1) / 10) * 0.98**step * (0.3 if step > 18 else 1.0)


class Run:
    """A table of one width trained by made-up gradients: a row touched every step, one once, one never."""

    def __init__(self, seed, name, device, dim):
        self.cls, self.settings = RULES[name]
        self.device, self.seed, self.rows, self.dim = device, seed, 21, dim
        self.start = torch.randn(self.rows, dim, generator=torch.Generator().manual_seed(seed)) * 0.1
        self.start[NEVER, ::2] = 0

    def gradient(self, step):
        rng = torch.Generator().manual_seed(self.seed + 1000 * step)
        touched = torch.rand(self.rows, generator=rng) < 0.2 * torch.linspace(0, 1, self.rows)
        touched[ALWAYS], touched[ONCE], touched[NEVER] = True, step == 5, False
        rows = touched.nonzero()[:, 0]
        return rows, torch.randn(len(rows), self.dim, generator=rng) * (0.1 if step % 7 else 1e-4)

    def densely(self, dtype):
        """Table and states as torch.optim leaves them."""
        p = torch.nn.Parameter(self.start.to(dtype))
        optimizer = getattr(torch.optim, self.cls)([p], foreach=False, **self.settings)
        for step in range(STEPS):
            rows, values = self.gradient(step)
            p.grad = torch.zeros_like(p)
            p.grad[rows] = values.to(dtype)
            optimizer.param_groups[0]["lr"] = self.settings["lr"] * schedule(step)
            optimizer.step()
        names = rules.rule_of(optimizer, optimizer.param_groups[0]).states
        return [p.detach(), *(optimizer.state[p][name] for name in names)]

    def sparsely(self, clocked):
        """The same by the kernels: rows are caught up before they are read, the rest by a sweep of a quarter a step."""
        optimizer = getattr(torch.optim, self.cls)([torch.nn.Parameter(self.start)], **self.settings)
        group = optimizer.param_groups[0]
        rule = rules.rule_of(optimizer, group)
        p = self.start.clone().to(self.device)
        states = [torch.zeros_like(p) for _ in rule.states]
        last = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        history = torch.zeros(STEPS, updates.FIELDS, device=self.device)
        ring = torch.zeros(KEPT, updates.FIELDS, device=self.device)
        clock = torch.zeros(1, dtype=torch.int32, device=self.device)
        share = -(-self.rows // 4)
        for step in range(1, STEPS + 1):
            rows, values = self.gradient(step - 1)
            void = torch.tensor([self.rows, -1, 2**40])  # three entries that are none
            rows = torch.cat([rows, void]).to(self.device)
            values = torch.cat([values, torch.full((3, self.dim), torch.nan)]).to(self.device)
            numbers = rules.step_numbers(
                rule, {**group, "lr": group["lr"] * schedule(step - 1)}, float(step), step == 1
            )
            begin = step % 4 * share
            kept = max(0, step - KEPT)  # as many as the ring holds, and no more than there are
            table = (p, states, last, rule.number)
            if step > 1:
                if clocked:
                    update.table_replay(*table, ring, 1, rows, 0, 0, 0, clock)
                else:
                    update.table_replay(*table, history[kept : step - 1], kept + 1, rows, 0, 0, step - 1)
            history[step - 1] = ring[(step - 1) % KEPT] = torch.tensor(numbers)
            clock += 1
            if clocked:
                update.table_step(*table, ring, 1, rows, values, False, 0, share, clock)
            else:
                end = min(begin + share, self.rows)
                update.table_step(*table, history[kept:step], kept + 1, rows, values, False, begin, end)
        update.table_replay(*table, history[STEPS - KEPT :], STEPS - KEPT + 1, None, 0, self.rows, STEPS)
        updates.check_reached(p.device)
        assert last.tolist() == [STEPS] * self.rows
        return [p, *states]


@pytest.mark.parametrize("clocked", [False, True], ids=["host", "clock"])
@pytest.mark.parametrize("name", RULES)
def test_the_numbers_are_those_of_torch(name, clocked, seed, device):
    run = Run(seed, name, device, dim=(1, 4, 7)[seed % 3])
    check(run.sparsely(clocked), run.densely(torch.float32), run.densely(torch.float64))


def random_case(seed, rule):
    """A table whose rows lag by 0 to 9 steps, and the steps they missed."""
    rng = torch.Generator().manual_seed(seed)
    draw = drawer(rng)
    rows, dim, now = draw(3, 40), draw(1, 9), draw(20, 90)
    p = torch.randn(rows, dim, generator=rng) * 0.1
    states = [torch.randn(rows, dim, generator=rng) * 0.01]
    states.append(states[0].square() * torch.rand(rows, dim, generator=rng))
    if rules.RULES[rule] == "adagrad":
        states[0] = states[0].abs()
    last = now - torch.randint(0, 10, (rows,), generator=rng).int()
    made = [getattr(torch.optim, cls)([torch.nn.Parameter(p)], **settings) for cls, settings in RULES.values()]
    made.append(torch.optim.SGD([torch.nn.Parameter(p)], lr=0.1))
    groups = [(rules.rule_of(optimizer, optimizer.param_groups[0]), optimizer.param_groups[0]) for optimizer in made]
    kind, group = next((kind, group) for kind, group in groups if kind.number == rule)
    first = now - 11
    history = torch.tensor(
        [
            rules.step_numbers(kind, {**group, "lr": group["lr"] * schedule(s % 30)}, float(s), False)
            for s in range(first, now + 1)
        ]
    )
    listed = torch.randperm(rows, generator=rng)[: draw(1, rows)].sort().values
    grads = torch.randn(len(listed), dim, generator=rng) * 0.1
    table = (p, states[: updates.STATES[rule]], last)
    return table, history, first, listed, grads, now


@pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native library to compare with: {native.unavailable()}"
)
@pytest.mark.parametrize("rule", range(len(rules.RULES)), ids=rules.RULES)
def test_the_bits_are_those_of_the_native_backend(rule, seed, device):
    for case in range(3):
        table, history, first, listed, grads, now = random_case(seed + case, rule)
        p, states, last = table
        last = last.clamp(max=now - 1)
        mine = [tensor.to(device, copy=True) for tensor in (p, *states, last)]
        theirs = [tensor.clone() for tensor in (p, *states, last)]
        n = len(p)
        for where, (q, *more, upto) in ((update, mine), (torch.ops.fastmtl, theirs)):
            put = (lambda t: t.to(device)) if where is update else (lambda t: t)
            where.table_replay(q, more, upto, rule, put(history), first, put(listed), 0, 0, now - 1)
            where.table_step(q, more, upto, rule, put(history), first, put(listed), put(grads), False, n // 3, n // 2)
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.cpu(), other)


def test_lazy_updates_leave_other_rows_alone(seed, device):
    table, history, first, listed, grads, _now = random_case(seed, rules.RULES.index("adam"))
    p, states, last = (table[0].to(device, copy=True), [s.to(device, copy=True) for s in table[1]], table[2].to(device))
    update.table_step(
        p, states, last, rules.RULES.index("adam"), history.to(device), first, listed.to(device), grads.to(device),
        True, 0, 0,
    )  # fmt: skip
    moved = (p.cpu() != table[0]).any(1)
    assert moved.nonzero()[:, 0].tolist() == listed.tolist()
    l2, _, keep, fresh, fresh_square, _, root, eps, neg_lr = history[-1].double()
    q, m, v = (t[listed].double() for t in (table[0], *table[1]))
    g = grads.double() + l2 * q
    m, v = m + fresh * (g - m), keep * v + fresh_square * g * g
    q = q + neg_lr * m / (v.sqrt() / root + eps)
    for got, want in zip((p, *states), (q, m, v), strict=True):
        torch.testing.assert_close(got.cpu()[listed].double(), want, rtol=1e-5, atol=1e-7)


def test_rowwise_adagrad(seed, device):
    """One number of state a row: the mean square of its gradients (as in FBGEMM and TorchRec)."""
    rng = torch.Generator().manual_seed(seed)
    rows, dim = 19, drawer(rng)(1, 12)
    p = torch.randn(rows, dim, generator=rng)
    want, square = p.double(), torch.zeros(rows, dtype=torch.float64)
    mine, state = p.to(device, copy=True), torch.zeros(rows, device=device)
    last = torch.zeros(rows, dtype=torch.int32, device=device)
    step = torch.tensor([[0, 1, 0, 0, 0, 0, 1, 1e-8, -0.1]], device=device)
    for number in range(1, 6):
        listed = torch.randperm(rows, generator=rng)[:7]
        grads = torch.randn(7, dim, generator=rng)
        update.table_step(mine, [state], last, ROWWISE, step, number, listed.to(device), grads.to(device), True, 0, 0)
        g = grads.double()
        square[listed] += g.square().mean(1)
        want[listed] -= 0.1 * g / (square[listed].sqrt() + 1e-8)[:, None]
    torch.testing.assert_close(mine.cpu().double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state.cpu().double(), square, rtol=2e-6, atol=1e-9)


def test_a_row_that_lags_too_far_is_left_alone_and_reported(device):
    p = torch.ones(3, 2, device=device)
    last = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    steps = torch.zeros(4, updates.FIELDS, device=device)
    steps[:, 0], steps[:, 8] = 0.5, -1.0  # p halves in each step
    update.table_replay(p, [], last, 0, steps, 6, None, 0, 3, 9)
    assert p.tolist() == [[1, 1], [1 / 16, 1 / 16], [1, 1]]
    assert last.tolist() == [0, 9, 9]
    with pytest.raises(BackendError, match="missed more steps than were kept"):
        updates.check_reached(p.device)
    updates.check_reached(p.device)


def test_what_does_not_fit_is_refused(device):
    p = torch.ones(3, 2, device=device)
    last, steps = torch.zeros(3, dtype=torch.int32, device=device), torch.zeros(2, 9, device=device)
    rows = torch.tensor([0], device=device)
    with pytest.raises(BackendError, match="no rule 7"):
        update.table_replay(p, [], last, 7, steps, 1, rows, 0, 0, 1)
    with pytest.raises(BackendError, match="'adam' has 2 states, not 1"):
        update.table_replay(p, [p], last, 3, steps, 1, rows, 0, 0, 1)
    with pytest.raises(BackendError, match=r"last must be \[3\] torch.int32"):
        update.table_replay(p, [], last[:2], 0, steps, 1, rows, 0, 0, 1)
    with pytest.raises(BackendError, match=r"steps must be \[2, 9\]"):
        update.table_replay(p, [], last, 0, steps[:, :8], 1, rows, 0, 0, 1)
    with pytest.raises(BackendError, match="rows 0 to 4 are not in a table of 3"):
        update.table_replay(p, [], last, 0, steps, 1, None, 0, 4, 1)
    with pytest.raises(BackendError, match=r"gradients of 1 rows can't be \[2, 2\]"):
        update.table_step(p, [], last, 0, steps, 1, rows, torch.zeros(2, 2, device=device), False, 0, 0)


@pytest.mark.parametrize("rule", range(len(updates.RULES)), ids=updates.RULES)
def test_a_step_in_the_backward_is_the_step_after_it(rule, seed, device):
    """The same bits as the rows' gradients, then their step; tiny tables, long segments and means among them."""
    for case in range(2):
        lookup = random_lookup(seed + case, batch=23)
        rng = torch.Generator().manual_seed(seed + case)
        grad = torch.randn(23, lookup.spec.width(lookup.columns), generator=rng).to(device)
        ids = lookup.ids.to(device)
        shapes = [weight.shape for weight in lookup.weights]
        gradients = backend.embedding_bag_bwd_sparse(
            grad, ids, lookup.columns, lookup.spec, shapes, [True] * len(shapes)
        )
        step = torch.tensor([0.01, 0.99, 0.9, 0.1, 0.01, 0.9, 0.3, 1e-6, -0.1], device=device)
        steps, expected = [], []
        for weight, gradient in zip(lookup.weights, gradients, strict=True):
            like = weight[:, 0] if rule == ROWWISE else weight
            states = [torch.rand(like.shape, generator=rng).to(device) for _ in range(updates.STATES[rule])]
            p = weight.float().to(device)
            last = torch.full((len(p),), 6, dtype=torch.int32, device=device)
            now = torch.tensor([7], dtype=torch.int32, device=device)
            steps.append(updates.Update(p.clone(), [s.clone() for s in states], last.clone(), rule, step, now))
            update.table_step(p, states, last, rule, step[None], 7, *gradient, True, 0, 0)
            expected.append((p, *states, last))
        given = backend.embedding_bag_index(ids, lookup.columns, lookup.spec, shapes, [True] * len(shapes))
        vetoed = [step._replace(now=torch.full_like(step.now, -1)) for step in steps]
        before = [tensor.clone() for step in steps for tensor in (step.p, *step.states, step.last)]
        backend.embedding_bag_bwd_step(grad, ids, lookup.columns, lookup.spec, vetoed)
        after = [tensor for step in steps for tensor in (step.p, *step.states, step.last)]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        if case:  # made ahead, over another batch's
            other = backend.embedding_bag_index(ids.flip(0), lookup.columns, lookup.spec, shapes, [True] * len(shapes))
            given = backend.embedding_bag_index(ids, lookup.columns, lookup.spec, shapes, [True] * len(shapes), other)
            assert all(one is another for one, another in zip(given, other, strict=True))
            steps = [step._replace(index=index) for step, index in zip(steps, given, strict=True)]
        backend.embedding_bag_bwd_step(grad, ids, lookup.columns, lookup.spec, steps)
        for mine, wanted in zip(steps, expected, strict=True):
            for one, other in zip((mine.p, *mine.states, mine.last), wanted, strict=True):
                if rule == ROWWISE:  # a row's mean square may be summed in another order
                    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(one, other)


@pytest.mark.parametrize("rule", [updates.RULES.index("adam"), ROWWISE], ids=["adam", "rowwise_adagrad"])
def test_a_batch_s_rows_catch_up_and_no_others(rule, seed, device):
    """Each once, however often it is looked up; those of tiny tables whether they are or not."""
    for case in range(3):
        lookup = random_lookup(seed + case, batch=23)
        rng = torch.Generator().manual_seed(seed + case)
        shapes = [weight.shape for weight in lookup.weights]
        ids = lookup.ids.to(device, torch.int32)
        steps = torch.tensor([[0.01, 0.99, 0.9, 0.1, 0.01, 0.9, 0.3, 1e-6, -0.1]] * 9, device=device)
        clock = torch.tensor([8], dtype=torch.int32, device=device)
        needs = [True] * len(shapes)
        index = backend.embedding_bag_index(ids, lookup.columns, lookup.spec, shapes, needs)
        pairs = backend.embedding_bag_bwd_sparse(
            torch.zeros(23, lookup.spec.width(lookup.columns), device=device), ids, lookup.columns, lookup.spec, shapes,
            needs,
        )  # fmt: skip
        for weight, rows, pair in zip(lookup.weights, index, pairs, strict=True):
            p = weight.float().to(device)
            like = p[:, 0] if rule == ROWWISE else p
            states = [torch.rand(like.shape, generator=rng).to(device) for _ in range(updates.STATES[rule])]
            last = torch.randint(0, 8, (len(p),), generator=rng).int().to(device)
            mine = [tensor.clone() for tensor in (p, *states, last)]
            update.table_catch_up(mine[0], mine[1:-1], mine[-1], rule, steps, 1, rows, -1, clock)
            tiny = rows.rows[len(rows.keys) :]
            touched = torch.cat([pair[0], tiny]).unique()
            touched = touched[touched < len(p)]
            listed = rows.rows[rows.rows < len(p)]
            assert torch.equal(listed.unique().long(), touched)
            update.table_replay(p, states, last, rule, steps, 1, touched, 0, 0, 7)
            assert all(torch.equal(one, other) for one, other in zip(mine, (p, *states, last), strict=True))
