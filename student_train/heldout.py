"""Held-out quality of a student by diffusion time: bits per byte and top-1 accuracy, document by document.

clean documents (a cache without a teacher) x a grid of t x fixed masks -> sums per document and t. The masks are
keyed by document, t and draw alone, so every student is asked exactly the same questions and differences can be paired
by document. Averaging bits per byte over t uniformly gives the diffusion bound on the log-likelihood up to the
grid: the 1/t of the bound cancels against the expected number of masked tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..shared.cache import Cache
from ..shared.noising import keyed_generator
from ..shared.rows import blocks_read, clean_piece, join, noised_piece, stack
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
    def summary(self) -> dict[str, float]:
        """Bits per byte, averaged over t, and the share of masked tokens that are guessed right, at all t together."""
        accuracy = self.num_correct.sum() / max(1, self.num_tokens.sum())
        return {"heldout_bits_per_byte": float(self.bits_per_byte.mean()), "heldout_accuracy": float(accuracy)}

    @property
    def document_bits_per_byte(self) -> np.ndarray:
        """[documents] mean over t, for pairing; NaN for a document that was never masked."""
        ratio = np.where(self.num_bytes > 0, self.nll / (math.log(2) * np.maximum(1, self.num_bytes)), np.nan)
        known = ~np.isnan(ratio)
        return np.where(known.any(1), np.nansum(ratio, axis=1) / np.maximum(1, known.sum(1)), np.nan)


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
    questions = HeldoutQuestions(cache, mask_id=mask_id, t_grid=t_grid, num_draws=num_draws, seed=seed)
    scores = questions.ask(Student(model), lambda: False)
    assert scores is not None
    return scores


class HeldoutQuestions:
    """The masked documents of an evaluation in batches, made once and asked as often as one likes.

    Args: see `evaluate_heldout`.
    """

    def __init__(
        self, cache: Cache, *, mask_id: int, t_grid: Sequence[float] = T_GRID, num_draws: int = 1, seed: int = 0
    ) -> None:
        manifest = cache.manifest
        self.t_grid, self._mask_id, self._block_size = tuple(t_grid), mask_id, manifest.block_size
        self._eos_id = manifest.student.eos_id
        self._documents = cache.rows(np.arange(0, len(cache), manifest.noise["views"]))
        self._bytes_of = np.array([len(token) for token in cache.vocabulary().token_bytes])
        self.batches: list[list[tuple[int, int, np.ndarray]]] = [[]]
        """Document, number of t, mask: runs of similar length, each of at most `_MAX_POSITIONS` positions."""
        for number, document in sorted(enumerate(self._documents), key=lambda item: len(item[1].x_0)):
            length = len(document.x_0)
            for column, t in enumerate(t_grid):
                for draw in range(num_draws):
                    key = document.sample_id, "heldout", repr(t), draw
                    masked = keyed_generator(seed, *key).random(length) < t
                    masked[: document.prompt_tokens] = False
                    if self.batches[-1] and (len(self.batches[-1]) + 1) * 2 * length > _MAX_POSITIONS:
                        self.batches.append([])
                    self.batches[-1].append((number, column, masked))

    @torch.no_grad()
    def ask(
        self, student: Student, stop: Callable[[], bool], *, rank: int = 0, num_ranks: int = 1,
        add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> HeldoutScores | None:  # fmt: skip
        """Score a student; every process of a run asks its share of the batches, and as many as every other.

        Args:
            student: is in evaluation mode afterwards.
            stop: asked before each batch, with the same answer on every process; True: give up.
            rank, num_ranks: of this process. add_up: sums over processes.
        Returns: the scores of all processes together, or None if `stop` said so.
        """
        student.eval()
        sums = np.zeros((4, len(self._documents), len(self.t_grid)))
        for start in range(0, len(self.batches), num_ranks):
            if stop():
                return None
            place = start + rank
            # One batch too few: ask any, for shares of a sharded student are gathered on all processes together.
            counts = place < len(self.batches)
            self._ask(student, self.batches[place if counts else 0], sums if counts else np.zeros_like(sums))
        device = student.model.device
        total = torch.from_numpy(sums)
        if num_ranks > 1:
            total = add_up(total.to(device)).cpu()
        return HeldoutScores(self.t_grid, *total.numpy())

    def _ask(self, student: Student, batch: list, sums: np.ndarray) -> None:
        """Add one batch to the sums of nats, bytes, tokens and right answers, each [documents, len(t)]."""
        pieces, read, gold, place = [], [], [], []
        for row, (number, column, masked) in enumerate(batch):
            x_0 = self._documents[number].x_0
            noised = noised_piece(x_0, masked[None], mask_id=self._mask_id, block_size=self._block_size)
            pieces.append(join(noised.piece, clean_piece(x_0, blocks_read(noised), self._block_size)))
            keep = x_0[noised.position] != self._eos_id
            read.append((row, noised.read[keep]))
            gold.append(x_0[noised.position[keep]])
            place += [(number, column)] * int(keep.sum())
        rows = stack(pieces)
        index = np.concatenate([row * rows.ids.shape[1] + positions for row, positions in read])
        gold_ids = np.concatenate(gold).astype(np.int64)
        device = student.model.device
        nll, correct = student.answers(
            rows.to(device), torch.from_numpy(index).to(device), torch.from_numpy(gold_ids).to(device)
        )
        where = np.array(place, np.int64).reshape(-1, 2)
        values = np.stack([
            nll.cpu().double().numpy(), self._bytes_of[gold_ids], np.ones(len(place)), correct.cpu().numpy()
        ])  # fmt: skip
        for total, value in zip(sums, values, strict=True):
            np.add.at(total, (where[:, 0], where[:, 1]), value)  # pyright: ignore[reportArgumentType]
