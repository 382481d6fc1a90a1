"""Held-out quality of a student by diffusion time: bits per byte and top-1 accuracy, document by document.

clean documents (a cache without a teacher) x a grid of t x fixed masks -> sums per document and t. The masks are
keyed by document, t and draw alone, so every student is asked exactly the same questions and differences can be paired
by document. Averaging bits per byte over t uniformly gives the diffusion bound on the log-likelihood up to the
grid: the 1/t of the bound cancels against the expected number of masked tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..shared.cache import Cache, ViewRow
from ..shared.noising import keyed_generator
from ..shared.rows import RowTensors, blocks_read, clean_piece, join, noised_piece, stack
from ..shared.sliced_head import top_logits
from .student import Student

T_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
_MAX_POSITIONS = 8192
"""Positions of one forward."""


@dataclass(frozen=True)
class HeldoutScores:
    """Sums over masked tokens that spell text (EOS filling is left out), each [documents, len(t)]."""

    t: tuple[float, ...]
    nll: np.ndarray  # nats
    num_bytes: np.ndarray
    num_tokens: np.ndarray
    num_correct: np.ndarray

    @property
    def bits_per_byte(self) -> np.ndarray:
        """[len(t)] pooled over documents."""
        return self.nll.sum(0) / (math.log(2) * np.maximum(1, self.num_bytes.sum(0)))

    @property
    def accuracy(self) -> np.ndarray:
        """[len(t)] share of masked tokens whose most likely token is the clean one."""
        return self.num_correct.sum(0) / np.maximum(1, self.num_tokens.sum(0))

    @property
    def document_bits_per_byte(self) -> np.ndarray:
        """[documents] mean over t, for pairing; NaN for a document that was never masked."""
        ratio = np.where(self.num_bytes > 0, self.nll / (math.log(2) * np.maximum(1, self.num_bytes)), np.nan)
        known = ~np.isnan(ratio)
        return np.where(known.any(1), np.nansum(ratio, axis=1) / np.maximum(1, known.sum(1)), np.nan)


@torch.inference_mode()
def evaluate_heldout(
    model: PreTrainedModel, cache: Cache, *, mask_id: int, t_grid: Sequence[float] = T_GRID, num_draws: int = 1,
    seed: int = 0,
) -> HeldoutScores:  # fmt: skip
    """Score a student on clean documents.

    Args:
        model: a BD3LM student, on its device.
        cache: one view per document is enough; only x_0 and the prompt length are read.
        mask_id: the student's.
        t_grid: times to ask at; num_draws: masks per document and time.
        seed: of the masks; not of any training.
    """
    student = Student(model.eval())
    manifest = cache.manifest
    num_views = manifest.noise["views"]
    documents = cache.rows(np.arange(0, len(cache), num_views))
    bytes_of = np.array([len(token) for token in cache.vocabulary().token_bytes])
    sums = np.zeros((4, len(documents), len(t_grid)))
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].x_0))
    questions = [
        (number, column, _mask(documents[number], t, seed, draw))
        for number in order for column, t in enumerate(t_grid) for draw in range(num_draws)
    ]  # fmt: skip
    for batch in _batches(questions, documents):
        pieces, read, gold, place = [], [], [], []
        for row, (number, column, masked) in enumerate(batch):
            x_0 = documents[number].x_0
            noised = noised_piece(x_0, masked[None], mask_id=mask_id, block_size=manifest.block_size)
            pieces.append(join(noised.piece, clean_piece(x_0, blocks_read(noised), manifest.block_size)))
            keep = x_0[noised.position] != manifest.student.eos_id
            read.append((row, noised.read[keep]))
            gold.append(x_0[noised.position[keep]])
            place += [(number, column)] * int(keep.sum())
        rows = stack(pieces)
        index = np.concatenate([row * rows.ids.shape[1] + positions for row, positions in read])
        gold_ids = np.concatenate(gold).astype(np.int64)
        nll, correct = _answers(student, rows, torch.from_numpy(index), torch.from_numpy(gold_ids))
        where = np.array(place, np.int64).reshape(-1, 2)
        values = np.stack([nll, bytes_of[gold_ids], np.ones(len(place)), correct])
        for total, value in zip(sums, values, strict=True):
            np.add.at(total, (where[:, 0], where[:, 1]), value)  # pyright: ignore[reportArgumentType]
    return HeldoutScores(tuple(t_grid), *sums)


def _answers(student: Student, rows: RowTensors, read: Tensor, gold_ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(-log-probability of the clean token, is it the most likely one) at the given places of the flattened rows."""
    device = student.model.device
    hidden = student.hidden(rows.to(device)).flatten(0, 1)[read.to(device)]
    best = top_logits(hidden, student.head_weight(), gold_ids.to(device), k=1)
    correct = best.top_ids[:, 0].cpu() == gold_ids
    return -best.gold_logp.double().cpu().numpy(), correct.numpy()


def _mask(document: ViewRow, t: float, seed: int, draw: int) -> np.ndarray:
    masked = keyed_generator(seed, document.sample_id, "heldout", repr(t), draw).random(len(document.x_0)) < t
    masked[: document.prompt_tokens] = False
    return masked


def _batches(questions: list, documents: Sequence[ViewRow]) -> list[list]:
    """Questions in runs of similar length, each run at most `_MAX_POSITIONS` positions of [x_t, x_0]."""
    batches: list[list] = [[]]
    for question in questions:
        length = 2 * len(documents[question[0]].x_0)
        if batches[-1] and (len(batches[-1]) + 1) * length > _MAX_POSITIONS:
            batches.append([])
        batches[-1].append(question)
    return batches
