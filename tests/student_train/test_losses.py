"""Every loss against numbers worked by hand, a naive float64 twin (forward and backward), and its edges."""

import math
from collections.abc import Callable

import pytest
import torch
from tide.shared.config import ConfigError, LossConfig, TidalConfig
from tide.shared.sliced_head import gather_logits, top_logits
from tide.student_train.losses import (
    CHUNK_CLAMP,
    calm_loss,
    calm_tidal_loss,
    clean_token_loss,
    cross_entropy,
    kl_loss,
    lambda_at,
    tidal_loss,
    timestep_weights,
)
from torch import Tensor

AXES = ("both", "training_only", "timestep_only")
WEIGHTS = ("uniform", "midrange")
SHAPES = [(1, 2), (7, 11), (123, 17), (3, 507)]
CHUNK_COUNTS = (1, 7, 123)
TIDAL = {"temperature": 1.0, "lambda_train": 0.4, "lambda_max": 0.9, "axis": "both", "timestep_weight": "uniform"}


def nats(*values: float) -> Tensor:
    return torch.tensor([math.log(v) for v in values], dtype=torch.float64)


def random_logp(n: int, m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(3 * torch.randn(n, m, generator=generator, dtype=torch.float64), dim=1)


def random_chunks(c: int, seed: int) -> Tensor:
    return -3 * torch.rand(c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.01


def random_t(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.999 + 0.001


def test_kl_of_two_coins_is_the_number_worked_by_hand() -> None:
    student, teacher = nats(0.5, 0.5)[None], nats(0.75, 0.25)[None]
    # KL(q || s) = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812; times T^2 = 4
    assert kl_loss(student, teacher, temperature=1.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert kl_loss(student, teacher, temperature=2.0).item() == pytest.approx(0.523248, abs=1e-6)
    # KL(s || q) = 1/2 log(2/3) + 1/2 log 2 = -0.202733 + 0.346574 = 0.143841
    assert kl_loss(student, teacher, temperature=1.0, reverse=True).item() == pytest.approx(0.143841, abs=1e-6)


def test_tidal_of_two_coins_is_the_number_worked_by_hand() -> None:
    student, teacher, t = nats(0.5, 0.5)[None], nats(0.9, 0.1)[None], torch.tensor([0.2], dtype=torch.float64)
    arguments = {**TIDAL, "lambda_train": 0.625, "temperature": 2.0}
    # lambda_t = 0.625 (1 - 0.2) = 1/2; r ~ sqrt(0.5 * 0.9), sqrt(0.5 * 0.1) ~ 3, 1 -> r = (3/4, 1/4)
    # KL(r || s) = 0.130812 as above; times T^2 = 4
    assert tidal_loss(student, teacher, t, **arguments).item() == pytest.approx(0.523248, abs=1e-6)
    # w(0.2) = exp(-0.09 / 0.045) = e^-2 = 0.135335
    midrange = tidal_loss(student, teacher, t, **{**arguments, "timestep_weight": "midrange"})
    assert midrange.item() == pytest.approx(0.523248 * 0.135335, abs=1e-6)


def test_calm_of_one_chunk_is_the_number_worked_by_hand() -> None:
    student, teacher = nats(0.25), nats(0.0625)
    # T = 2: s = 1/2, q = 1/4. -[1/4 log(1/2) + 3/4 log(1/2)] = log 2 = 0.693147
    assert calm_loss(student, teacher, temperature=2.0).item() == pytest.approx(0.693147, abs=1e-6)
    # -[1/2 log(1/4) + 1/2 log(3/4)] = 1/2 (1.386294 + 0.287682) = 0.836988
    assert calm_loss(student, teacher, temperature=2.0, reverse=True).item() == pytest.approx(0.836988, abs=1e-6)


def test_calm_with_tidal_of_one_chunk_is_the_number_worked_by_hand() -> None:
    t = torch.tensor([0.2], dtype=torch.float64)
    value = calm_tidal_loss(nats(0.25), nats(0.81), t, **{**TIDAL, "lambda_train": 0.625, "temperature": 2.0})
    # s = 0.5, q = 0.9, lambda_t = 1/2: target 0.7. -[0.7 log 0.5 + 0.3 log 0.5] = log 2
    assert value.item() == pytest.approx(0.693147, abs=1e-6)
    value = calm_tidal_loss(nats(0.8), nats(0.4), t, **{**TIDAL, "lambda_train": 0.625, "timestep_weight": "midrange"})
    # s = 0.8, q = 0.4: target 0.6. -[0.6 log 0.8 + 0.4 log 0.2] = 0.133886 + 0.643775 = 0.777661; w = e^-2
    assert value.item() == pytest.approx(0.777661 * 0.135335, abs=1e-6)


def test_cross_entropy_and_hard_label_are_the_numbers_worked_by_hand() -> None:
    student = nats(0.5, 0.25)
    # (log 2 / 0.5 + log 4 / 0.25) / 10 = (1.386294 + 5.545177) / 10
    assert cross_entropy(student, 1 / torch.tensor([0.5, 0.25]), 10).item() == pytest.approx(0.693147, abs=1e-6)
    # T^2 (log 2 + log 4) / 2 = 4 * 1.039721
    assert clean_token_loss(student, temperature=2.0).item() == pytest.approx(4.158883, abs=1e-6)


def test_lambda_at_and_timestep_weights_are_the_numbers_worked_by_hand() -> None:
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    expected = {"both": [0.3, 0.0], "training_only": [0.4, 0.4], "timestep_only": [0.675, 0.0]}
    for axis, values in expected.items():
        assert lambda_at(t, lambda_train=0.4, lambda_max=0.9, axis=axis).tolist() == pytest.approx(values)
    assert timestep_weights(t, "uniform").tolist() == [1.0, 1.0]
    # exp(-0.0625 / 0.045) = 0.249352, exp(-0.25 / 0.045) = 0.003866
    assert timestep_weights(t, "midrange").tolist() == pytest.approx([0.249352, 0.003866], abs=1e-6)


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((p[i].exp() * (p[i] - q[i]) for i in range(len(p))), torch.zeros((), dtype=p.dtype))


def naive_token_loss(student: Tensor, teacher: Tensor, t: Tensor | None, *, temperature: float, **options) -> Tensor:
    """One row at a time, as docs/math.md writes it."""
    total = torch.zeros((), dtype=student.dtype)
    for row in range(len(student)):
        s, q = student[row], teacher[row]
        if t is None:
            total = total + (naive_kl(s, q) if options["reverse"] else naive_kl(q, s))
            continue
        lambda_t, weight = naive_lambda(float(t[row]), **options)
        mixed = s.detach().exp() ** (1 - lambda_t) * q.exp() ** lambda_t
        total = total + weight * naive_kl((mixed / mixed.sum()).log(), s)
    return temperature**2 * total / len(student)


def naive_lambda(t: float, *, lambda_train: float, lambda_max: float, axis: str, timestep_weight: str):
    lambda_t = {"both": lambda_train * (1 - t), "training_only": lambda_train, "timestep_only": lambda_max * (1 - t)}
    return lambda_t[axis], math.exp(-((t - 0.5) ** 2) / 0.045) if timestep_weight == "midrange" else 1.0


def naive_calm(student: Tensor, teacher: Tensor, t: Tensor | None, *, temperature: float, **options) -> Tensor:
    total = torch.zeros((), dtype=student.dtype)
    for chunk in range(len(student)):
        s, q, weight = (student[chunk] / temperature).exp(), (teacher[chunk] / temperature).exp(), 1.0
        if t is not None:
            lambda_t, weight = naive_lambda(float(t[chunk]), **options)
            q = (1 - lambda_t) * s.detach() + lambda_t * q
        if options.get("reverse"):
            s, q = q, s
        total = total - weight * (q * s.log() + (1 - q) * (1 - s).log())
    return total / len(student)


def assert_same_with_gradient(ours: Callable[[Tensor], Tensor], naive: Callable[[Tensor], Tensor], at: Tensor) -> None:
    inputs = at.clone().requires_grad_(), at.clone().requires_grad_()
    values = ours(inputs[0]), naive(inputs[1])
    torch.testing.assert_close(values[0], values[1], rtol=1e-11, atol=1e-13)
    grads = [torch.autograd.grad(v, x)[0] for v, x in zip(values, inputs, strict=True)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)
    # float32: a relative rounding error of 6e-8 per operation, on values that cancel to about a tenth.
    single = at.float().requires_grad_()
    value = ours(single)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), values[1], rtol=2e-5, atol=1e-6)
    assert (torch.autograd.grad(value, single)[0].double() - grads[1]).norm() <= 2e-5 * grads[1].norm() + 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_kl_matches_the_naive_twin_forward_and_backward(shape, temperature: float, reverse: bool) -> None:
    student, teacher = random_logp(*shape, seed=0), random_logp(*shape, seed=1)
    options = {"temperature": temperature, "reverse": reverse}
    assert_same_with_gradient(
        lambda s: kl_loss(s, teacher.to(s.dtype), **options),
        lambda s: naive_token_loss(s, teacher, None, **options),
        student,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("timestep_weight", WEIGHTS)
def test_tidal_matches_the_naive_twin_forward_and_backward(shape, axis: str, timestep_weight: str) -> None:
    student, teacher, t = random_logp(*shape, seed=0), random_logp(*shape, seed=1), random_t(shape[0])
    options = {**TIDAL, "temperature": 2.0, "axis": axis, "timestep_weight": timestep_weight}
    assert_same_with_gradient(
        lambda s: tidal_loss(s, teacher.to(s.dtype), t.to(s.dtype), **options),
        lambda s: naive_token_loss(s, teacher, t, **options),
        student,
    )


@pytest.mark.parametrize("num", CHUNK_COUNTS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_calm_matches_the_naive_twin_forward_and_backward(num: int, temperature: float, reverse: bool) -> None:
    student, teacher = random_chunks(num, 0), random_chunks(num, 1)
    options = {"temperature": temperature, "reverse": reverse}
    assert_same_with_gradient(
        lambda s: calm_loss(s, teacher.to(s.dtype), **options),
        lambda s: naive_calm(s, teacher, None, **options),
        student,
    )


@pytest.mark.parametrize("num", CHUNK_COUNTS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("timestep_weight", WEIGHTS)
def test_calm_with_tidal_matches_the_naive_twin_forward_and_backward(num: int, axis: str, timestep_weight: str) -> None:
    student, teacher, t = random_chunks(num, 0), random_chunks(num, 1), random_t(num)
    options = {**TIDAL, "temperature": 2.0, "axis": axis, "timestep_weight": timestep_weight}
    assert_same_with_gradient(
        lambda s: calm_tidal_loss(s, teacher.to(s.dtype), t.to(s.dtype), **options),
        lambda s: naive_calm(s, teacher, t, **options),
        student,
    )


def test_all_losses_pass_gradcheck() -> None:
    teacher, t, chunks = random_logp(3, 5, 1), random_t(3), random_chunks(3, 1)

    def losses(logits: Tensor, chunk: Tensor) -> tuple[Tensor, ...]:
        student = torch.log_softmax(logits, 1)
        return (
            kl_loss(student, teacher, temperature=2.0),
            kl_loss(student, teacher, temperature=2.0, reverse=True),
            calm_loss(chunk, chunks, temperature=2.0),
            calm_loss(chunk, chunks, temperature=2.0, reverse=True),
            clean_token_loss(student[:, 0], temperature=2.0),
            cross_entropy(student[:, 0], 1 / t, 5),
        )

    inputs = random_logp(3, 5, 0).requires_grad_(), random_chunks(3, 0).requires_grad_()
    assert torch.autograd.gradcheck(losses, inputs)


def simplexes(k: int, temperature: float, *, vocab: int = 11, n: int = 7):
    """(student logits, teacher logits, sparse student, sparse teacher) with the teacher's k top tokens."""
    generator = torch.Generator().manual_seed(3)
    eye = torch.eye(vocab, dtype=torch.float64)
    student = (2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    gold = torch.randint(vocab, (n,), generator=generator)
    top = top_logits(teacher, eye, gold, k=k, temperatures=(temperature,))
    ours = gather_logits(student, eye, gold, top.top_ids, temperatures=(temperature,))
    return student, teacher, ours, top


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "tidal"])
def test_with_k_equal_to_the_vocabulary_the_simplex_losses_are_the_dense_losses(loss: str, temperature: float) -> None:
    student, teacher, ours, top = simplexes(11, temperature)
    t = random_t(7)

    def value(s: Tensor, q: Tensor) -> Tensor:
        if loss == "tidal":
            return tidal_loss(s, q, t, **{**TIDAL, "temperature": temperature})
        return kl_loss(s, q, temperature=temperature, reverse=loss == "reverse_kl")

    sparse = value(ours.simplex_logp(temperature), top.simplex_logp(temperature))
    dense = value(torch.log_softmax(student / temperature, 1), torch.log_softmax(teacher / temperature, 1))
    torch.testing.assert_close(sparse, dense, rtol=1e-11, atol=0)
    grads = [torch.autograd.grad(v, student)[0] for v in (sparse, dense)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_tail_proportional_to_the_students_own_gives_the_dense_kl_and_gradient(
    reverse: bool, temperature: float
) -> None:
    student, _, ours, top = simplexes(4, temperature)
    sparse = kl_loss(
        ours.simplex_logp(temperature), top.simplex_logp(temperature), temperature=temperature, reverse=reverse
    )
    # The dense teacher that the simplex stands for: its own top, and the student's tail scaled to the teacher's mass.
    student_logp = torch.log_softmax(student.detach() / temperature, 1)
    scale = top.log_tail - ours.log_tail.detach()
    dense_teacher = (student_logp + scale).scatter(1, top.top_ids, top.simplex_logp(temperature)[:, :-1])
    torch.testing.assert_close(dense_teacher.exp().sum(1), torch.ones(7, dtype=torch.float64))
    dense = kl_loss(
        torch.log_softmax(student / temperature, 1), dense_teacher, temperature=temperature, reverse=reverse
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-11, atol=0)
    grads = [torch.autograd.grad(v, student)[0] for v in (sparse, dense)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_absent_entries_and_an_empty_tail_change_neither_value_nor_gradient() -> None:
    student, teacher, t = random_logp(7, 5, 0), random_logp(7, 5, 1), random_t(7)
    gone = torch.full((7, 2), -torch.inf, dtype=torch.float64)
    for loss in (
        lambda s, q: kl_loss(s, q, temperature=2.0),
        lambda s, q: kl_loss(s, q, temperature=2.0, reverse=True),
        lambda s, q: tidal_loss(s, q, t, **TIDAL),
    ):
        plain, padded = student.clone().requires_grad_(), student.clone().requires_grad_()
        value = loss(plain, teacher)
        with_absent = loss(torch.cat([padded, gone], 1), torch.cat([teacher, gone], 1))
        torch.testing.assert_close(value, with_absent)
        grads = torch.autograd.grad(value, plain), torch.autograd.grad(with_absent, padded)
        torch.testing.assert_close(*grads)


def test_mass_that_only_one_side_has_makes_the_divergence_infinite_not_silent() -> None:
    whole, half = nats(0.5, 0.5)[None], torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert kl_loss(half, whole, temperature=1.0).item() == math.inf  # the student denies a token of the teacher
    assert kl_loss(whole, half, temperature=1.0).item() == pytest.approx(math.log(2))  # 0 log 0 = 0
    assert kl_loss(whole, half, temperature=1.0, reverse=True).item() == math.inf


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reverse_calms_gradient_is_bounded_by_the_teachers_clamp(temperature: float) -> None:
    student = (-torch.logspace(-8, 2.3, 60, dtype=torch.float64)).requires_grad_()
    bound = math.log((1 - CHUNK_CLAMP) / CHUNK_CLAMP) / temperature
    for teacher_logp in (0.0, -1e-30, -1e-9, -0.5, -30.0, -1e4, -math.inf):
        teacher = torch.full_like(student, teacher_logp).detach()
        (grad,) = torch.autograd.grad(60 * calm_loss(student, teacher, temperature=temperature, reverse=True), student)
        q = min(max(math.exp(teacher_logp / temperature), CHUNK_CLAMP), 1 - CHUNK_CLAMP)
        # dL / dlog p = -(s / T) log(q / (1 - q))
        expected = -(student.detach() / temperature).exp() / temperature * math.log(q / (1 - q))
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)
        assert (grad.abs() <= bound * (1 + 1e-12)).all()
    assert grad.abs().max() == pytest.approx(bound, rel=1e-6)  # and reached: s = 1, q at the clamp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_calm_has_the_true_gradient_at_a_chunk_logp_of_minus_200(temperature: float, dtype) -> None:
    student = torch.tensor([-200.0], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([-0.5], dtype=dtype)
    value = calm_loss(student, teacher, temperature=temperature)
    (grad,) = torch.autograd.grad(value, student)
    q = math.exp(-0.5 / temperature)
    assert value.item() == pytest.approx(q * 200 / temperature, rel=1e-6)
    assert grad.item() == pytest.approx(-q / temperature, rel=1e-6)


def test_forward_calm_stays_finite_and_heard_when_the_student_is_certain() -> None:
    # float32 logits so sure that s rounds to 1, while the teacher gives q = 1/2: the loss must push s down.
    logits = torch.tensor([[40.0, 0.0, 1.0]], requires_grad=True)
    log_s = torch.log_softmax(logits, 1)[:, 0]
    assert log_s.item() == 0.0
    value = calm_loss(log_s, torch.tensor([math.log(0.5)]), temperature=1.0)
    # log(1 - s) at the largest float below 1: log 2^-24 = -16.6355; -(1/2) * -16.6355
    assert value.item() == pytest.approx(8.3178, abs=1e-3)
    below = torch.tensor([-1e-6], requires_grad=True)
    (grad,) = torch.autograd.grad(calm_loss(below, torch.tensor([math.log(0.5)]), temperature=1.0), below)
    assert grad.item() == pytest.approx(0.5e6, rel=1e-3)  # (1 - q) s / (1 - s) - q
    at_one = torch.tensor([0.0], requires_grad=True)
    (grad,) = torch.autograd.grad(calm_loss(at_one, torch.tensor([math.log(0.5)]), temperature=1.0), at_one)
    assert grad.item() == pytest.approx(0.5 * 2**24, rel=1e-3)  # large and positive, not cut to -q
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() <= 1


def test_tidal_gives_no_gradient_to_its_target_and_none_at_all_at_lambda_zero() -> None:
    logits = random_logp(7, 5, 0).requires_grad_()
    teacher, t = random_logp(7, 5, 1).requires_grad_(), random_t(7)
    value = tidal_loss(torch.log_softmax(logits, 1), teacher, t, **{**TIDAL, "lambda_train": 0.0})
    grad, teacher_grad = torch.autograd.grad(value, (logits, teacher), allow_unused=True)
    assert teacher_grad is None
    assert grad.abs().max() < 1e-15
    chunk = random_chunks(7, 0).requires_grad_()
    value = calm_tidal_loss(chunk, random_chunks(7, 1), t, **{**TIDAL, "lambda_train": 0.0})
    assert torch.autograd.grad(value, chunk)[0].abs().max() < 1e-14
    # lambda = 1 everywhere: plain KL
    full = tidal_loss(logits, teacher, t, **{**TIDAL, "axis": "training_only", "lambda_train": 1.0})
    torch.testing.assert_close(full, kl_loss(logits, teacher, temperature=1.0))


def test_nothing_to_average_gives_zero_attached_to_the_graph() -> None:
    source = torch.zeros((), requires_grad=True)
    rows, vector, t = torch.zeros(0, 4) + source, torch.zeros(0) + source, torch.zeros(0)
    for value in (
        kl_loss(rows, torch.zeros(0, 4), temperature=2.0),
        kl_loss(rows, torch.zeros(0, 4), temperature=2.0, reverse=True),
        tidal_loss(rows, torch.zeros(0, 4), t, **TIDAL),
        calm_loss(vector, torch.zeros(0), temperature=2.0),
        calm_loss(vector, torch.zeros(0), temperature=2.0, reverse=True),
        calm_tidal_loss(vector, torch.zeros(0), t, **TIDAL),
        clean_token_loss(vector, temperature=2.0),
        cross_entropy(vector, torch.zeros(0), 3),
    ):
        assert value.item() == 0
        (grad,) = torch.autograd.grad(value, source)
        assert grad.item() == 0


def test_half_precision_inputs_are_computed_in_float32() -> None:
    student, teacher = random_logp(7, 11, 0).bfloat16(), random_logp(7, 11, 1).bfloat16()
    expected = naive_token_loss(student.double(), teacher.double(), None, temperature=1.0, reverse=False)
    value = kl_loss(student, teacher, temperature=1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    rows, chunks, t = random_logp(3, 4, 0), random_chunks(3, 0), random_t(3)
    options = {**TIDAL, "temperature": temperature}
    for loss in (
        lambda: kl_loss(rows, rows, temperature=temperature),
        lambda: tidal_loss(rows, rows, t, **options),
        lambda: calm_loss(chunks, chunks, temperature=temperature),
        lambda: calm_tidal_loss(chunks, chunks, t, **options),
        lambda: clean_token_loss(chunks, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=r"temperature = .*: expected a number > 0"):
            loss()


def test_shapes_that_differ_are_refused(as_users_run: None) -> None:
    rows, chunks, t = random_logp(3, 4, 0), random_chunks(3, 0), random_t(3)
    for loss in (
        lambda: kl_loss(rows, rows[:, :3], temperature=1.0),
        lambda: tidal_loss(rows, rows[:2], t, **TIDAL),
        lambda: calm_loss(chunks, chunks[:2], temperature=1.0),
        lambda: calm_tidal_loss(chunks, chunks[:2], t, **TIDAL),
    ):
        with pytest.raises(ValueError, match="differ in shape"):
            loss()
    with pytest.raises(ValueError, match="one diffusion time per row"):
        tidal_loss(rows, rows, t[:1], **TIDAL)


def test_unknown_axis_and_weight_are_refused() -> None:
    rows, t = random_logp(3, 4, 0), random_t(3)
    with pytest.raises(ValueError, match="axis = 'sideways': expected both, training_only or timestep_only"):
        tidal_loss(rows, rows, t, **{**TIDAL, "axis": "sideways"})
    with pytest.raises(ValueError, match="timestep_weight = 'linear': expected uniform or midrange"):
        tidal_loss(rows, rows, t, **{**TIDAL, "timestep_weight": "linear"})


@pytest.mark.parametrize("name", ["kl", "calm"])
def test_tidal_with_a_reverse_loss_is_refused_with_the_reason(name) -> None:
    with pytest.raises(ConfigError, match=r"reverse and tidal exclude each other.*gradient"):
        LossConfig(name=name, reverse=True, tidal=TidalConfig())
