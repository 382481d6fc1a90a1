"""Tails cut into ranges of ids: the sliced head against a dense twin, forward and backward, and the losses on them."""

from itertools import pairwise

import pytest
import torch
from tide.shared.sliced_head import gather_at_targets, gather_logits, top_logits
from tide.shared.tails import TailBuckets
from tide.student_train.losses import kl_loss
from torch import Tensor

TEMPERATURES = (0.5, 1.0, 2.0)
CUTS = (3, 4, 20)


def random_head(n: int, vocab: int, k: int, *, with_support: bool, seed: int = 0):
    """Random head inputs in float64; row i holds only its first i mod (k + 1) top tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 5, generator=generator, dtype=torch.float64)
    gold = torch.randint(vocab, (n,), generator=generator)
    support = torch.arange(vocab) % 4 > 0 if with_support else None
    allowed = torch.arange(vocab) if support is None else torch.nonzero(support)[:, 0]
    top = torch.stack([allowed[torch.randperm(len(allowed), generator=generator)[:k]] for _ in range(n)])
    for row in range(n):
        top[row, row % (k + 1) :] = -1
    return hidden, weight, gold, top, support


def dense_twin(hidden: Tensor, weight: Tensor, top: Tensor, support: Tensor | None) -> Tensor:
    """log_buckets [n, T, B] by the definition, token by token."""
    logp = torch.log_softmax(hidden @ weight.T, dim=1)
    inside = [i for i in range(logp.shape[1]) if support is None or support[i]]
    edges = [0, *CUTS, logp.shape[1]]
    rows = []
    for row in range(len(logp)):
        of_temperature = []
        for temperature in TEMPERATURES:
            scaled, found = logp[row] / temperature, []
            for low, high in pairwise(edges):
                members = [i for i in inside if low <= i < high and i not in top[row].tolist()]
                mass = torch.logsumexp(scaled[members], 0) if members else scaled.new_full((), -torch.inf)
                found.append(mass - torch.logsumexp(scaled[inside], 0))
            of_temperature.append(torch.stack(found))
        rows.append(torch.stack(of_temperature))
    return torch.stack(rows)


@pytest.mark.parametrize("rows_per_slice", [1, 3, 100])
@pytest.mark.parametrize("with_support", [False, True])
def test_masses_by_range_equal_a_dense_twin_forward_and_backward(with_support, rows_per_slice):
    vocab = 31
    hidden, weight, gold, top, support = random_head(7, vocab, 5, with_support=with_support)
    results = []
    for sliced in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if sliced:
            output = gather_logits_in_buckets(h, w, gold, top, support, rows_per_slice)
            assert output.log_buckets is not None
            masses = output.log_buckets
            whole = gather_logits(h, w, gold, top, temperatures=TEMPERATURES, support=support)
            torch.testing.assert_close(output.log_tail, whole.log_tail, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(output.log_z, whole.log_z, rtol=1e-6, atol=1e-6)
        else:
            masses = dense_twin(h, w, top, support)
        weights = torch.randn(masses.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        total = (weights * torch.where(torch.isfinite(masses), masses, 0.0)).sum()
        results.append((masses, *torch.autograd.grad(total, (h, w))))
    assert torch.isinf(results[0][0]).any() == with_support  # the range of id 3 alone, where 3 is kept
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-9, atol=1e-10)


def gather_logits_in_buckets(h: Tensor, w: Tensor, gold: Tensor, top: Tensor, support: Tensor | None, rows: int):
    return gather_at_targets(
        h, w, gold, torch.arange(len(h)), top, temperatures=TEMPERATURES, support=support,
        buckets=TailBuckets.of_ids(torch.arange(len(w)), CUTS), max_slice_bytes=4 * len(w) * rows,
    )[1]  # fmt: skip


def test_all_outputs_together_pass_gradcheck():
    hidden, weight, gold, top, _ = random_head(2, 31, 3, with_support=False)

    def outputs(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        o = gather_logits_in_buckets(h, w, gold, top, None, 1)
        assert o.log_buckets is not None
        return tuple(torch.where(torch.isfinite(v), v, 0.0) for v in (o.gold_logp, o.top_logp, o.log_z, o.log_buckets))

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()))


def test_the_teachers_ranges_are_those_of_the_students_ids():
    """Row r of the teacher's head is token student_id[r] of the student."""
    vocab = 31
    hidden, weight, gold, _, _ = random_head(6, vocab, 4, with_support=False)
    student_id = torch.randperm(vocab, generator=torch.Generator().manual_seed(2))
    got = top_logits(hidden, weight, gold, k=4, temperatures=TEMPERATURES, buckets=TailBuckets.of_ids(student_id, CUTS))
    in_order = torch.empty_like(weight)
    in_order[student_id] = weight
    assert got.log_buckets is not None
    twin = dense_twin(hidden, in_order, student_id[got.top_ids], None)
    torch.testing.assert_close(got.log_buckets, twin, rtol=1e-6, atol=1e-6)


def test_float32_masses_far_below_the_largest_do_not_vanish():
    weight = torch.cat([torch.tensor([[0.0], [-1.0]]), torch.full((30, 1), -200.0)])
    hidden, gold = torch.ones(1, 1), torch.tensor([0])
    buckets = TailBuckets.of_ids(torch.arange(32), (2,))
    got = top_logits(hidden, weight, gold, k=1, temperatures=(1.0,), buckets=buckets)
    assert got.log_buckets is not None
    expected = -200 + torch.log(torch.tensor(30.0)) - torch.log1p(torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(got.log_buckets[0, 0, 1], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_range_for_each_token_gives_the_dense_loss_and_gradient(reverse):
    generator = torch.Generator().manual_seed(3)
    student = (2 * torch.randn(5, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 2 * torch.randn(5, 9, generator=generator, dtype=torch.float64)
    eye, gold = torch.eye(9, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    buckets = TailBuckets.of_ids(torch.arange(9), tuple(range(1, 9)))
    theirs = top_logits(teacher, eye, gold, k=2, temperatures=(2.0,), buckets=buckets)
    _, ours = gather_at_targets(
        student, eye, gold, torch.arange(5), theirs.top_ids, temperatures=(2.0,), buckets=buckets
    )
    sparse = kl_loss(ours.simplex_logp(2.0), theirs.simplex_logp(2.0), temperature=2.0, reverse=reverse)
    dense = kl_loss(
        torch.log_softmax(student / 2, 1), torch.log_softmax(teacher / 2, 1), temperature=2.0, reverse=reverse
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-7, atol=0)  # sums over ranges are a product in float32 or 64
    grads = [torch.autograd.grad(value, student)[0] for value in (sparse, dense)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)
