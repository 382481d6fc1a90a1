"""The student's one forward against the naive [x_t, x_0] of every view: logits, loss and gradient."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from tide.shared.attention import block_diffusion_mask
from tide.shared.models.a2d import A2DQwen3LMHeadModel
from tide.shared.rows import RowTensors, blocks_read, clean_piece, join, noised_piece, stack
from tide.student_train.losses import kl_loss
from tide.student_train.student import Student
from tiny_caches import BLOCK, MASK, VOCAB, sharp_student
from tiny_caches import TOP_K as K
from torch import Tensor


class Example(NamedTuple):
    """Samples with their views, and teacher numbers for every third masked position."""

    x_0: list[np.ndarray]
    masked: list[np.ndarray]
    rows: RowTensors
    read: Tensor
    gold_ids: Tensor
    target: Tensor
    top_ids: Tensor
    teacher_logp: Tensor


def make_example(num_views: int, lengths: tuple[int, ...] = (13, 24, 7, 16)) -> Example:
    """Odd lengths beside even ones; one view of the first sample and all views of the third have no mask."""
    rng = np.random.default_rng(num_views)
    x_0 = [rng.integers(0, MASK, length) for length in lengths]
    masked = [rng.random((num_views, length)) < 0.25 for length in lengths]
    masked[0][0, :] = False
    masked[2][:] = False
    for one in masked:
        one[:, :3] = False  # a prompt
    noised = [noised_piece(x, m, mask_id=MASK, block_size=BLOCK) for x, m in zip(x_0, masked, strict=True)]
    rows = stack([join(n.piece, clean_piece(x, blocks_read(n), BLOCK)) for n, x in zip(noised, x_0, strict=True)])
    length = rows.ids.shape[1]
    read = np.concatenate([row * length + n.read for row, n in enumerate(noised)])
    gold = np.concatenate([x[n.position] for x, n in zip(x_0, noised, strict=True)])
    target = np.arange(0, len(read), 3)
    top = np.stack([rng.permutation(VOCAB)[:K] for _ in target])
    top[::4, -2:] = -1
    teacher = torch.log_softmax(torch.from_numpy(rng.normal(0, 2, (len(target), K + 1))).float(), 1)
    teacher[::4, K - 2 : K] = -torch.inf
    tensors = [torch.from_numpy(v.astype(np.int64)) for v in (read, gold, target, top)]
    return Example(x_0, masked, rows, *tensors, teacher)


def naive_logits(model: A2DQwen3LMHeadModel, example: Example) -> Tensor:
    """Full logits of [x_t, x_0] for one view at a time, read at its masked positions."""
    parts = []
    for x_0, views in zip(example.x_0, example.masked, strict=True):
        clean, length = torch.from_numpy(x_0), len(x_0)
        padded = -(-length // BLOCK) * BLOCK
        kept = torch.cat([torch.arange(length), padded + torch.arange(length)])
        mask = block_diffusion_mask(padded, BLOCK)[kept][:, kept]
        for masked in torch.from_numpy(views):
            x_t = torch.where(masked, MASK, clean)
            logits = model(
                input_ids=torch.cat([x_t, clean])[None], position_ids=torch.arange(length).repeat(2)[None],
                attention_mask=mask[None, None], use_cache=False,
            ).logits[0, :length]  # fmt: skip
            parts.append(logits[masked])
    return torch.cat(parts)


def naive_simplex(logits: Tensor, top_ids: Tensor, temperature: float) -> Tensor:
    """Top and tail of softmax(logits / T), the tail as a plain sum over what is not in the top."""
    logp = torch.log_softmax(logits / temperature, 1)
    top = logp.gather(1, top_ids.clamp(min=0)).masked_fill(top_ids < 0, -torch.inf)
    outside = torch.ones_like(logp, dtype=torch.bool)
    for row, ids in enumerate(top_ids.tolist()):
        outside[row, [i for i in ids if i >= 0]] = False
    return torch.cat([top, torch.logsumexp(logp.masked_fill(~outside, -torch.inf), 1, keepdim=True)], 1)


@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_rows_with_blocks_left_out_equal_the_naive_layout_in_logits_loss_and_gradient(num_views: int) -> None:
    model, example, results = sharp_student(), make_example(num_views), []
    for naive in (False, True):
        model.zero_grad()
        if naive:
            logits = naive_logits(model, example)
            gold_logp = torch.log_softmax(logits, 1).gather(1, example.gold_ids[:, None])[:, 0]
            simplex = naive_simplex(logits[example.target], example.top_ids, 2.0)
        else:
            output = Student(model)(
                example.rows, example.read, example.gold_ids, example.target, example.top_ids, (2.0,)
            )
            gold_logp, simplex = output.gold_logp, output.targets.simplex_logp(2.0)
        loss = -gold_logp.sum() / 50 + kl_loss(simplex, example.teacher_logp, temperature=2.0)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((gold_logp.detach(), simplex.detach(), loss.detach(), gradients))
    (gold_logp, simplex, loss, gradients), (gold_twin, simplex_twin, loss_twin, gradient_twins) = results
    assert len(gold_logp) >= 9 * num_views
    assert gold_logp.std() > 1, "distributions far from uniform"
    # float32 through two layers, sums in another order: 1e-6 relative on logits up to 20.
    torch.testing.assert_close(gold_logp, gold_twin, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(simplex, simplex_twin, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(loss, loss_twin, rtol=1e-5, atol=0)
    assert gradients.keys() == gradient_twins.keys()
    for name, gradient in gradients.items():
        assert (gradient - gradient_twins[name]).norm() <= 3e-5 * gradient_twins[name].norm(), name


def test_hidden_states_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    student, example = Student(sharp_student()), make_example(2)
    with torch.no_grad():
        together = student.hidden(example.rows)
        for row in range(len(example.x_0)):
            length = max(1, int((example.rows.labels.stream[row] >= 0).sum()))
            alone = RowTensors(
                example.rows.ids[row : row + 1, :length], example.rows.position[row : row + 1, :length],
                type(example.rows.labels)(*(label[row : row + 1, :length] for label in example.rows.labels)),
            )  # fmt: skip
            assert torch.isfinite(together[row]).all()
            # Batched products may sum in another order.
            torch.testing.assert_close(student.hidden(alone)[0], together[row, :length], rtol=1e-5, atol=1e-5)


def test_without_temperatures_no_target_is_read_and_the_clean_tokens_are_the_same() -> None:
    student, example = Student(sharp_student(tied=True)), make_example(2)
    arguments = (example.rows, example.read, example.gold_ids, example.target, example.top_ids)
    with torch.no_grad():
        plain, full = student(*arguments, ()), student(*arguments, (1.0, 2.0))
    assert plain.targets.top_logp.shape == (0, K)
    assert full.targets.top_logp.shape == (len(example.target), K)
    torch.testing.assert_close(plain.gold_logp, full.gold_logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(full.targets.gold_logp, full.gold_logp[example.target], rtol=0, atol=0)


def test_a_batch_without_masks_gives_a_loss_of_zero_with_gradients_of_zero() -> None:
    student = Student(sharp_student())
    rows = stack([noised_piece(np.arange(8), np.zeros((1, 8), bool), mask_id=MASK, block_size=BLOCK).piece])
    nothing = torch.zeros(0, dtype=torch.int64)
    output = student(rows, nothing, nothing, nothing, torch.zeros(0, K, dtype=torch.int64), (2.0,))
    loss = output.gold_logp.sum() + kl_loss(output.targets.simplex_logp(2.0), torch.zeros(0, K + 1), temperature=2.0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize("known", [VOCAB - 11, VOCAB, VOCAB + 7])
def test_the_support_is_fitted_to_the_rows_of_the_head(known: int) -> None:
    support = torch.arange(known) % 3 != 0
    student = Student(sharp_student(), support)
    assert student.support is not None
    assert student.support.tolist() == [i < known and i % 3 != 0 for i in range(VOCAB)]
    example = make_example(1)
    with torch.no_grad():
        output = student(
            example.rows, example.read, example.gold_ids, example.target, torch.full_like(example.top_ids, -1), (1.0,)
        )
        logp = torch.log_softmax(naive_logits(student.model, example), 1)[example.target]
    expected = torch.logsumexp(logp[:, student.support], 1)
    torch.testing.assert_close(output.targets.log_z[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert "support" not in student.state_dict()
