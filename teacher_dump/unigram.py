"""What a unigram model of the answers would find of them: what any teacher has to beat.

Teacher tokens of all samples -> mean log-probability and top-1 accuracy of each answer's tokens under the counts of the
others, smoothed as Witten and Bell do (1991): (count + K / V) / (N + K), with K distinct tokens among N. An answer's
own tokens are left out: on few samples, counts of the answer itself would beat every honest teacher.
"""

import numpy as np

from ..shared.tokens import PairedSample

MAX_SCORED = 512
"""Answers that are scored, spread over the plan; all are counted."""


def answered_tokens(sample: PairedSample) -> np.ndarray:
    """[n] teacher ids inside chunks: the tokens that the teacher may be asked about."""
    edges = np.zeros(len(sample.teacher.x_0) + 1, np.int8)
    edges[sample.chunks[:, 0]] += 1
    edges[sample.chunks[:, 1]] -= 1
    return sample.teacher.x_0[np.cumsum(edges[:-1]) > 0]


class Unigram:
    """Counts of answers, given one by one.

    Args: num_samples: how many will come, about.
    """

    def __init__(self, num_samples: int, vocab_size: int) -> None:
        self._every = max(1, -(-num_samples // MAX_SCORED))
        self._counts, self._seen = np.zeros(vocab_size, np.int64), 0
        self._scored: list[np.ndarray] = []

    def add(self, tokens: np.ndarray) -> None:
        """Take one answer, teacher ids [n]."""
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        if self._seen % self._every == 0:
            self._scored.append(tokens)
        self._seen += 1

    def score(self) -> dict[str, float]:
        """`logp`, nats, and `accuracy` a token; rounded, so that a plan is the same on every machine."""
        logp = correct = total = 0.0
        for tokens in self._scored:
            if not len(tokens):
                continue
            others = self._counts - np.bincount(tokens, minlength=len(self._counts))
            seen = int((others > 0).sum())
            p = (others[tokens] + max(1, seen) / len(others)) / (others.sum() + max(1, seen))
            logp += float(np.log(p).sum())
            correct += float((tokens == others.argmax()).sum())
            total += len(tokens)
        return {"logp": round(logp / max(1.0, total), 4), "accuracy": round(correct / max(1.0, total), 4)}
