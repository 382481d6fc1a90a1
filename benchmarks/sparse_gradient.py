"""How well a sparse teacher steers the student: gradients from k kept tokens against the dense gradient.

Simulated peaked distributions (Zipf-like logits; the student is the teacher plus noise) -> cosine and norm ratio of
d KL / d logits, summed over positions, for what a cache might hold:

    k + tail          the exact mass of the tail at the training temperature, as a category (SparseLogits)
    ... as cached     the same with log-probabilities rounded to 1/16 nat and tails to float16, as caches do by default
    renormalised      the top k renormalised to mass 1, no tail, on both sides
    tail guessed      top k and tail from temperature-1 probabilities alone: the tail's mass at T from a uniform tail

Run: python benchmarks/sparse_gradient.py [--vocab 20000]. Takes seconds on one core.
"""

import argparse
import math

import torch
from tide.shared.sparse_logits import log_z_from_tail
from tide.student_train.losses import kl_loss
from torch import Tensor

TEMPERATURES = (1.0, 2.0)


def simulate(n: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(student logits, teacher logits) [n, V]: power-law tails under heads of varying sharpness."""
    rank = torch.rand(n, vocab, generator=generator).argsort(1) + 1
    sharpness = 1.2 + 1.0 * torch.rand(n, 1, generator=generator)
    teacher = -sharpness * rank.double().log() + 0.5 * torch.randn(n, vocab, generator=generator).double()
    student = 0.8 * teacher + 0.8 * torch.randn(n, vocab, generator=generator).double()
    return student, teacher


def dense_gradient(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    z = student.clone().requires_grad_()
    pair = torch.log_softmax(z / temperature, 1), torch.log_softmax(teacher / temperature, 1)
    return torch.autograd.grad(kl_loss(*pair, temperature=temperature, reverse=reverse), z)[0]


def simplex(logits: Tensor, top_ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [n, k + 1] of the top tokens and the tail (tests prove the sliced head equal to this)."""
    logp = torch.log_softmax(logits / temperature, 1)
    tail = torch.logsumexp(logp.scatter(1, top_ids, -torch.inf), 1, keepdim=True)
    return torch.cat([logp.gather(1, top_ids), tail], 1)


def stored_teacher(teacher: Tensor, temperature: float, k: int, stored: str) -> tuple[Tensor, Tensor]:
    """(ids [n, k], log-probabilities [n, k + 1] at `temperature`) of what `stored` keeps."""
    logp = torch.log_softmax(teacher, 1)
    top_logp, top_ids = logp.topk(k, 1)
    log_tail = simplex(teacher, top_ids, temperature)[:, -1:]
    if stored == "... as cached":
        top_logp, log_tail = torch.round(top_logp * 16) / 16, log_tail.half().double()
    if stored == "tail guessed":
        tail, num = 1 - top_logp.exp().sum(1, keepdim=True), teacher.shape[1] - k
        uniform = num * torch.exp((tail / num).log() / temperature)
        log_tail = torch.log(uniform / (torch.exp(top_logp / temperature).sum(1, keepdim=True) + uniform))
    log_z = log_z_from_tail(top_logp, log_tail, (temperature,))
    return top_ids, torch.cat([top_logp / temperature - log_z, log_tail], 1)


def sparse_gradient(student: Tensor, teacher: Tensor, temperature: float, k: int, reverse: bool, stored: str) -> Tensor:
    """Gradient [n, V] of the KL on what `stored` keeps of the teacher."""
    z = student.clone().requires_grad_()
    top_ids, theirs = stored_teacher(teacher, temperature, k, stored)
    mine = simplex(z, top_ids, temperature)
    if stored == "renormalised":
        theirs, mine = (torch.log_softmax(logp[:, :-1], 1) for logp in (theirs, mine))
    return torch.autograd.grad(kl_loss(mine, theirs, temperature=temperature, reverse=reverse), z)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=5_000)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--k", type=int, default=16)
    arguments = parser.parse_args()
    student, teacher = simulate(arguments.positions, arguments.vocab, torch.Generator().manual_seed(0))
    for temperature in TEMPERATURES:
        head = torch.log_softmax(teacher / temperature, 1).topk(arguments.k, 1)[0].exp().sum(1).mean()
        print(f"V = {arguments.vocab:,}, k = {arguments.k}, T = {temperature:g}: the top k hold {head:.0%} of the mass")
        print(f"  {'stored':<14} {'KL cosine':>10} {'norm':>6} {'rev. KL cosine':>16} {'norm':>6}")
        for stored in ("k + tail", "... as cached", "renormalised", "tail guessed"):
            cells = []
            for reverse in (False, True):
                dense = dense_gradient(student, teacher, temperature, reverse)
                sparse = sparse_gradient(student, teacher, temperature, arguments.k, reverse, stored)
                cosine = float((dense * sparse).sum() / (dense.norm() * sparse.norm()))
                cells += [cosine, float(sparse.norm() / dense.norm())]
                assert math.isfinite(cosine)
            print(f"  {stored:<14} {cells[0]:>10.3f} {cells[1]:>6.2f} {cells[2]:>16.3f} {cells[3]:>6.2f}")


if __name__ == "__main__":
    main()
