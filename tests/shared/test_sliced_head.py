"""The sliced head and the k+1 simplex against a dense float64 twin, forward and backward, and the memory it takes."""

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from tide.shared.sliced_head import gather_at_targets, gather_logits, top_logits
from tide.shared.sparse_logits import SparseLogits, log1mexp, log_z_from_tail
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# n positions, V tokens, k top tokens: empty, single and odd sizes; k = V has no tail, k = 0 no top.
SIZES = [(0, 11, 3), (1, 11, 3), (7, 11, 11), (7, 11, 0), (7, 507, 16), (123, 11, 1)]
TEMPERATURES = (0.5, 1.0, 2.0)


def make_head(n: int, vocab: int, k: int, *, with_support: bool, absent: bool, d: int = 5, seed: int = 0):
    """Random head inputs in float64; with `absent`, row i holds only its first i mod (k + 1) top tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64) * 2
    weight = torch.randn(vocab, d, generator=generator, dtype=torch.float64)
    gold = torch.randint(vocab, (n,), generator=generator)
    support = torch.rand(vocab, generator=generator) < 0.8 if with_support else None
    allowed = torch.arange(vocab) if support is None else torch.nonzero(support)[:, 0]
    k = min(k, len(allowed))
    top = torch.empty(n, k, dtype=torch.int64)
    for row in range(n):
        top[row] = allowed[torch.randperm(len(allowed), generator=generator)[:k]]
        if absent:
            top[row, row % (k + 1) :] = -1
    return hidden, weight, gold, top, support


def dense_twin(
    hidden: Tensor, weight: Tensor, gold: Tensor, top: Tensor, temperatures, support: Tensor | None
) -> SparseLogits:
    """The definition, row by row over the whole vocabulary."""
    logp = torch.log_softmax(hidden @ weight.T, dim=1)
    n, k = top.shape
    top_logp = torch.full((n, k), -torch.inf, dtype=logp.dtype)
    log_z = torch.zeros(n, len(temperatures), dtype=logp.dtype)
    log_tail = torch.zeros(n, len(temperatures), dtype=logp.dtype)
    for row in range(n):
        inside = set(range(logp.shape[1])) if support is None else set(torch.nonzero(support)[:, 0].tolist())
        ids = [i for i in top[row].tolist() if i >= 0]
        top_logp[row, : len(ids)] = logp[row, ids]
        outside = sorted(inside - set(ids))
        for column, temperature in enumerate(temperatures):
            log_z[row, column] = torch.logsumexp(logp[row, sorted(inside)] / temperature, 0)
            tail = torch.logsumexp(logp[row, outside] / temperature, 0) - log_z[row, column]
            log_tail[row, column] = tail if outside else -torch.inf
    gold_logp = logp[torch.arange(n), gold]
    return SparseLogits(gold_logp, top, top_logp, log_z, log_tail, tuple(temperatures))


def weighted_sum(output: SparseLogits, seed: int = 1) -> Tensor:
    """A scalar that depends on every finite output with its own random weight."""
    generator, total = torch.Generator().manual_seed(seed), output.gold_logp.new_zeros(())
    for values in (output.gold_logp, output.top_logp, output.log_z, output.log_tail):
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.dtype)
        total = total + (weights * torch.where(torch.isfinite(values), values, 0.0)).sum()
    return total


def assert_same(ours: SparseLogits, twin: SparseLogits, **tolerance: float) -> None:
    assert torch.equal(ours.top_ids, twin.top_ids)
    for name in ("gold_logp", "top_logp", "log_z", "log_tail"):
        torch.testing.assert_close(getattr(ours, name), getattr(twin, name), **tolerance)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gather_logits_equals_dense_log_softmax_forward_and_backward(size, with_support: bool, absent: bool) -> None:
    hidden, weight, gold, top, support = make_head(*size, with_support=with_support, absent=absent)
    results = []
    for rows_per_slice in (None, 1, 5, 1000):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if rows_per_slice is None:
            output = dense_twin(h, w, gold, top, TEMPERATURES, support)
        else:
            output = gather_logits(
                h, w, gold, top, temperatures=TEMPERATURES, support=support,
                max_slice_bytes=4 * len(weight) * rows_per_slice,
            )  # fmt: skip
        results.append((output, torch.autograd.grad(weighted_sum(output), (h, w), allow_unused=True)))
    (twin, twin_grads), *rest = results
    for output, grads in rest:
        # Float64 sums of up to 507 terms in another order.
        assert_same(output, twin, rtol=1e-11, atol=1e-11)
        for grad, twin_grad in zip(grads, twin_grads, strict=True):
            expected = torch.zeros_like(grad) if twin_grad is None else twin_grad
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("k", [0, 3, 11])
def test_gradient_passes_gradcheck(k: int, with_support: bool) -> None:
    hidden, weight, gold, top, support = make_head(2, 11, k, with_support=with_support, absent=k == 3, d=2)

    def outputs(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        o = gather_logits(h, w, gold, top, temperatures=(1.0, 2.0), support=support, max_slice_bytes=4 * 11)
        return tuple(torch.where(torch.isfinite(v), v, 0.0) for v in (o.gold_logp, o.top_logp, o.log_z, o.log_tail))

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("num_targets", [0, 1, 4, 7])
def test_targets_in_any_order_among_other_positions_equal_a_head_per_group(num_targets: int) -> None:
    hidden, weight, gold, top, support = make_head(7, 507, 5, with_support=True, absent=True)
    target = torch.tensor([5, 2, 6, 0, 3, 1, 4])[:num_targets]
    results = []
    for merged in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if merged:
            gold_logp, at = gather_at_targets(
                h, w, gold, target, top[target], temperatures=(2.0,), support=support, max_slice_bytes=4 * 507 * 2
            )
        else:
            gold_logp = dense_twin(h, w, gold, top, (), None).gold_logp
            at = dense_twin(h[target], w, gold[target], top[target], (2.0,), support)
        loss = (gold_logp * torch.arange(1.0, 8.0)).sum() + weighted_sum(at)
        results.append((gold_logp, at, torch.autograd.grad(loss, (h, w))))
    (gold_logp, at, grads), (twin_gold_logp, twin, twin_grads) = results
    torch.testing.assert_close(gold_logp, twin_gold_logp)
    assert_same(at, twin)
    torch.testing.assert_close(grads, twin_grads)


def test_without_a_tail_log_tail_is_minus_infinity_and_no_gradient_is_nan() -> None:
    for with_support in (False, True):
        hidden, weight, gold, top, support = make_head(7, 11, 11, with_support=with_support, absent=False)
        hidden.requires_grad_()
        output = gather_logits(hidden, weight, gold, top, temperatures=(1.0, 2.0), support=support)
        assert (output.log_tail == -torch.inf).all()
        assert output.simplex_logp(2.0)[:, :-1].exp().sum(1).allclose(torch.ones(7, dtype=torch.float64))
        (grad,) = torch.autograd.grad(output.simplex_logp(2.0).exp().square().sum(), hidden)
        assert torch.isfinite(grad).all()


def test_no_rows_give_no_values_and_zero_gradients_attached_to_the_graph() -> None:
    hidden, weight, gold, top, _ = make_head(0, 11, 3, with_support=False, absent=False)
    output = gather_logits(hidden.requires_grad_(), weight.requires_grad_(), gold, top, temperatures=(2.0,))
    assert output.simplex_logp(2.0).shape == (0, 4)
    output.simplex_logp(2.0).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == (0, 5)
    assert not weight.grad.any()


def test_the_gradient_of_a_tail_too_small_for_float32_stays_finite() -> None:
    # One logit of 200 against zeros: the tail's mass at T = 1 is e^-200, and 1 / mass overflows float32.
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0], [0.0]], requires_grad=True)
    output = gather_logits(hidden, weight, torch.tensor([0]), torch.tensor([[0]]), temperatures=(1.0,))
    assert output.log_tail.item() == pytest.approx(math.log(3) - 200)
    grad_hidden, grad_weight = torch.autograd.grad(output.log_tail.sum(), (hidden, weight))
    # log_tail = log 3 - h w_0 up to e^-200: -1 in h, -h in w_0, and h / 3 in each of the others.
    torch.testing.assert_close(grad_hidden, torch.tensor([[-1.0]]))
    torch.testing.assert_close(grad_weight, 200 * torch.tensor([[-1.0], [1 / 3], [1 / 3], [1 / 3]]))


def test_float32_matches_float64_at_a_real_vocabulary_size() -> None:
    hidden, weight, gold, top, support = make_head(3, 50_257, 16, with_support=True, absent=False, d=32)
    inputs = hidden.float().requires_grad_(), weight.float().requires_grad_()
    output = gather_logits(*inputs, gold, top, temperatures=(1.0, 2.0), support=support)
    twins = hidden.requires_grad_(), weight.requires_grad_()
    twin = gather_logits(*twins, gold, top, temperatures=(1.0, 2.0), support=support)
    # Logits up to 40 carry a rounding error of 2e-6 each in float32.
    for name in ("gold_logp", "top_logp", "log_z", "log_tail"):
        torch.testing.assert_close(getattr(output, name).double(), getattr(twin, name), rtol=1e-6, atol=2e-5)
    for grad, twin_grad in zip(
        torch.autograd.grad(weighted_sum(output), inputs), torch.autograd.grad(weighted_sum(twin), twins), strict=True
    ):
        assert (grad.double() - twin_grad).norm() < 1e-5 * twin_grad.norm()


def test_bf16_autocast_stays_close_to_float32_and_returns_gradients_in_the_inputs_dtype() -> None:
    hidden, weight, gold, top, support = (
        v.float() if v is not None and v.is_floating_point() else v
        for v in make_head(123, 507, 5, with_support=True, absent=True, d=64)
    )
    hidden, weight = hidden / 4, weight / 4
    results = []
    for autocast in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = gather_logits(h, w, gold, top, temperatures=(1.0, 2.0), support=support)
            assert output.gold_logp.dtype == output.log_tail.dtype == torch.float32
            grads = torch.autograd.grad(weighted_sum(output), (h, w))
        assert grads[0].dtype == grads[1].dtype == torch.float32
        results.append((output, grads))
    (half, half_grads), (full, full_grads) = results
    # bf16 keeps 8 bits: inputs and logits are each off by up to 2^-9 relative, and logits reach 8 here.
    for name in ("gold_logp", "top_logp", "log_z", "log_tail"):
        torch.testing.assert_close(getattr(half, name), getattr(full, name), rtol=0, atol=0.06)
    for half_grad, full_grad in zip(half_grads, full_grads, strict=True):
        assert (half_grad - full_grad).norm() < 0.01 * full_grad.norm()


def test_a_bf16_weight_gathers_its_gradient_over_slices_in_float32() -> None:
    hidden, weight, gold, top, _ = make_head(123, 11, 3, with_support=False, absent=False)
    half = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    output = gather_logits(*half, gold, top, temperatures=(1.0,), max_slice_bytes=4 * 11)
    _, grad = torch.autograd.grad(weighted_sum(output), half)
    full = hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    _, full_grad = torch.autograd.grad(weighted_sum(dense_twin(*full, gold, top, (1.0,), None)), full)
    assert grad.dtype == torch.bfloat16
    # 123 sums in bf16 would lose an addend below 1/256 of the running total; one rounding at the end loses 2^-9.
    assert (grad.double() - full_grad).norm() < 0.006 * full_grad.norm()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("with_support", [False, True])
def test_no_tensor_exceeds_a_slice_forward_or_backward(with_support: bool, k: int) -> None:
    n, vocab, rows = 123, 1009, 4
    hidden, weight, gold, top, support = make_head(n, vocab, k, with_support=with_support, absent=True, d=3)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    arguments = {"temperatures": (1.0, 2.0), "support": support, "max_slice_bytes": 4 * vocab * rows}
    with LargestTensor() as forward:
        output = gather_at_targets(hidden, weight, gold, torch.arange(0, n, 2), top[::2], **arguments)[1]
        loss = weighted_sum(output)
    with LargestTensor() as backward:
        loss.backward()
    with LargestTensor() as teacher:
        top_logits(hidden.detach(), weight.detach(), gold, k=k, **arguments)
    with LargestTensor() as dense:
        torch.log_softmax(hidden @ weight.T, dim=1)
    for measured in (forward, backward, teacher):
        assert measured.numel == rows * vocab, "the largest tensor is one slice, and the measurement saw it"
    assert dense.numel == n * vocab


@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_top_logits_equals_dense_topk(size, with_support: bool) -> None:
    n, vocab, k = size
    hidden, weight, gold, _, support = make_head(*size, with_support=with_support, absent=False)
    output = top_logits(
        hidden, weight, gold, k=k, temperatures=TEMPERATURES, support=support, max_slice_bytes=4 * vocab * 3
    )
    logp = torch.log_softmax(hidden @ weight.T, dim=1)
    inside = torch.arange(vocab) if support is None else torch.nonzero(support)[:, 0]
    for row in range(n):
        ranked = inside[logp[row, inside].argsort(descending=True)].tolist()
        expected = (ranked + [-1] * k)[:k]  # a support smaller than k leaves the rest absent
        assert output.top_ids[row].tolist() == expected
    twin = dense_twin(hidden, weight, gold, output.top_ids, TEMPERATURES, support)
    assert_same(output, twin, rtol=1e-11, atol=1e-11)


def test_dropped_ids_have_no_mass_and_are_never_named() -> None:
    hidden, weight, gold, _, _ = make_head(7, 11, 3, with_support=False, absent=False)
    drop = torch.zeros(11, dtype=torch.bool)
    drop[[0, 4]] = True
    kept = torch.nonzero(~drop)[:, 0]
    gold = kept[gold % len(kept)]
    output = top_logits(hidden, weight, gold, k=11, temperatures=(2.0,), drop=drop)
    smaller = torch.log_softmax(hidden @ weight[kept].T, dim=1)  # the same head without those rows
    expected_logp, order = smaller.sort(dim=1, descending=True)
    assert torch.equal(output.top_ids[:, :9], kept[order])
    assert (output.top_ids[:, 9:] == -1).all()
    torch.testing.assert_close(output.top_logp[:, :9], expected_logp)
    torch.testing.assert_close(output.log_z[:, 0], torch.logsumexp(smaller / 2, 1))
    assert (output.log_tail == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_accurate_to_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e-30, -1e-12, -1e-6, -0.01, -0.5, -0.693, -0.6932, -1.0, -5.0, -30.0, -80.0], dtype=dtype)
    with mpmath.workdps(60):
        exact = [mpmath.log(1 - mpmath.exp(mpmath.mpf(float(v)))) for v in x]
    expected = torch.tensor([float(v) for v in exact], dtype=dtype)
    torch.testing.assert_close(log1mexp(x), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_log1mexp_has_its_limits_and_a_finite_gradient_between() -> None:
    x = torch.tensor([-1e30, -1e4, -1e-3], dtype=torch.float64, requires_grad=True)
    assert log1mexp(torch.zeros(1)).item() == -math.inf
    assert log1mexp(torch.tensor([-math.inf])).item() == 0
    (grad,) = torch.autograd.grad(log1mexp(x).sum(), x)
    # d/dx log(1 - e^x) = -e^x / (1 - e^x)
    torch.testing.assert_close(grad, torch.exp(x) / torch.expm1(x))


def test_log_z_from_the_tail_is_that_of_the_distribution() -> None:
    hidden, weight, gold, _, support = make_head(123, 507, 16, with_support=True, absent=False)
    exact = top_logits(hidden, weight, gold, k=16, temperatures=TEMPERATURES, support=support)
    log_z = log_z_from_tail(exact.top_logp, exact.log_tail, TEMPERATURES)
    torch.testing.assert_close(log_z, exact.log_z, rtol=1e-10, atol=1e-10)
    # float32 tails are off by 2^-24 of their logarithm: a share of the head that stays small however small the tail is
    stored = log_z_from_tail(exact.top_logp.float(), exact.log_tail.float(), TEMPERATURES)
    torch.testing.assert_close(stored.double(), exact.log_z, rtol=1e-6, atol=1e-5)


def test_log_z_from_the_tail_has_its_limits() -> None:
    half = torch.full((1, 2), math.log(0.5))
    assert log_z_from_tail(half, torch.tensor([[-math.inf]]), (1.0,)).item() == pytest.approx(0.0, abs=1e-7)
    nothing = torch.full((1, 2), -torch.inf)
    assert log_z_from_tail(nothing, torch.zeros(1, 1), (1.0,)).item() == 0
    assert math.isfinite(
        log_z_from_tail(half, torch.zeros(1, 1), (1.0,)).item()
    )  # a tail that rounding made everything
    assert log_z_from_tail(torch.zeros(3, 0), torch.zeros(3, 2), (1.0, 2.0)).tolist() == [[0.0, 0.0]] * 3
    assert log_z_from_tail(torch.zeros(3, 0), torch.zeros(3, 0), ()).shape == (3, 0)


def test_simplex_holds_the_whole_mass_at_every_temperature() -> None:
    hidden, weight, gold, top, support = make_head(7, 507, 16, with_support=True, absent=True)
    output = gather_logits(hidden, weight, gold, top, temperatures=TEMPERATURES, support=support)
    for temperature in TEMPERATURES:
        mass = output.simplex_logp(temperature).exp().sum(1)
        torch.testing.assert_close(mass, torch.ones(7, dtype=torch.float64))
    dense = torch.log_softmax(hidden @ weight.T / 2, dim=1)[torch.arange(7), gold]
    everywhere = gather_logits(hidden, weight, gold, top, temperatures=(2.0,))
    torch.testing.assert_close(everywhere.gold_logp_at(2.0), dense)


@pytest.mark.parametrize("k", [0, 1, 5, 16])
def test_narrowed_to_k_equals_asking_for_k(k: int) -> None:
    hidden, weight, gold, _, support = make_head(31, 127, 16, with_support=True, absent=False)
    wide = top_logits(hidden, weight, gold, k=16, temperatures=TEMPERATURES, support=support)
    if k == 0:  # everything is tail
        torch.testing.assert_close(wide.narrowed(0).log_tail, torch.zeros_like(wide.log_tail))
        return
    narrow = top_logits(hidden, weight, gold, k=k, temperatures=TEMPERATURES, support=support)
    got = wide.narrowed(k)
    assert torch.equal(got.top_ids, narrow.top_ids)
    for temperature in TEMPERATURES:
        torch.testing.assert_close(got.simplex_logp(temperature), narrow.simplex_logp(temperature))


def test_rows_that_were_kept_short_stay_as_they_are_when_narrowed() -> None:
    """Absent entries have no mass to move, not even where all of what is dropped is absent."""
    hidden, weight, gold, top, support = make_head(9, 31, 4, with_support=True, absent=True)
    output = gather_logits(hidden, weight, gold, top, temperatures=TEMPERATURES, support=support)
    for temperature in TEMPERATURES:
        mass = output.narrowed(2).simplex_logp(temperature).exp().sum(1)
        torch.testing.assert_close(mass, torch.ones(9, dtype=torch.float64))


def test_rows_are_chosen_by_index_or_mask() -> None:
    hidden, weight, gold, top, _ = make_head(7, 11, 3, with_support=False, absent=False)
    output = gather_logits(hidden, weight, gold, top, temperatures=(1.0,))
    chosen = output[torch.tensor([5, 1])]
    assert torch.equal(chosen.top_ids, top[[5, 1]])
    assert torch.equal(chosen.log_tail, output.log_tail[[5, 1]])
    assert torch.equal(output[gold < 6].gold_logp, output.gold_logp[gold < 6])


def test_a_temperature_without_log_sum_exp_is_refused() -> None:
    hidden, weight, gold, top, _ = make_head(1, 11, 3, with_support=False, absent=False)
    output = gather_logits(hidden, weight, gold, top, temperatures=(1.0,))
    with pytest.raises(ValueError, match=r"temperature 2\.0 has no log-sum-exp here; available: \(1\.0,\)"):
        output.simplex_logp(2.0)


def test_shapes_that_do_not_fit_are_refused(as_users_run: None) -> None:
    hidden, weight, gold, top, _ = make_head(7, 11, 3, with_support=False, absent=False)
    with pytest.raises(ValueError, match="expected hidden"):
        gather_logits(hidden[:, :4], weight, gold, top)
    with pytest.raises(ValueError, match="one clean token per hidden state"):
        top_logits(hidden, weight, gold[:3], k=1)


def test_buckets_refuse_a_smaller_k() -> None:
    hidden, weight, gold, top, support = make_head(9, 31, 4, with_support=True, absent=False)
    output = gather_logits(hidden, weight, gold, top, temperatures=TEMPERATURES, support=support)
    with pytest.raises(ValueError, match="buckets"):
        replace(output, log_buckets=output.log_tail[:, :, None]).narrowed(2)
