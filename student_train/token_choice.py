"""From hidden states to tokens: which token a masked position would take, and how sure the student is of it.

hidden states [n, d] and the head -> token [n] and confidence [n], in slices of the vocabulary's logits, so [n, V] never
exists. The mask token and ids that spell nothing are out of reach. Randomness is one number a position, drawn outside
from a keyed generator: the token is where it falls in the cumulative distribution (math as Gumbel's trick, one draw
instead of V, and the same on every device).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear

from ..shared.config import DecodingConfig
from ..shared.head_slices import MAX_SLICE_BYTES


@torch.no_grad()
def choose_tokens(
    hidden: Float[Tensor, "n d"], unguided: Float[Tensor, "n d"] | None, weight: Float[Tensor, "v d"],
    allowed: Bool[Tensor, " v"], uniform: Float[Tensor, " n"], settings: DecodingConfig, *,
    max_slice_bytes: int = MAX_SLICE_BYTES,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:  # fmt: skip
    """A token for each of n positions.

    Args:
        hidden: last hidden states.
        unguided: those with a masked prompt; None: no guidance.
        weight: of the head.
        allowed: ids that may be chosen.
        uniform: in [0, 1); read at temperature > 0 only.
        settings: `temperature`, `top_p` and `guidance`.
    Returns: token ids, and their probabilities at temperature 1 among all allowed tokens.
    """
    barred = torch.zeros(len(weight), device=hidden.device).masked_fill_(~allowed, -torch.inf)
    rows_per_slice = max(1, max_slice_bytes // (4 * len(weight)))
    ids, confidence = [], []
    for start in range(0, len(hidden), rows_per_slice):
        rows = slice(start, start + rows_per_slice)
        logits = linear(hidden[rows], weight).float()
        if unguided is not None:
            base = linear(unguided[rows], weight).float()
            logits = base + (1 + settings.guidance) * (logits - base)
        logits += barred
        if settings.temperature == 0:
            best, chosen = logits.max(1)
        else:
            chosen = sampled_tokens(logits, uniform[rows], temperature=settings.temperature, top_p=settings.top_p)
            best = logits.gather(1, chosen[:, None])[:, 0]
        ids.append(chosen)
        confidence.append((best - logits.logsumexp(1)).exp())
    if not ids:
        return torch.zeros(0, dtype=torch.int64, device=hidden.device), uniform
    return torch.cat(ids), torch.cat(confidence)


def sampled_tokens(
    logits: Float[Tensor, "n v"], uniform: Float[Tensor, " n"], *, temperature: float, top_p: float
) -> Int[Tensor, " n"]:
    """The first token whose cumulative probability, in the order of ids, exceeds `uniform`.

    Args: top_p: only the fewest most likely tokens that hold so much are kept, with all that are as likely as the last.
    """
    probability = (logits / temperature).softmax(1)
    if top_p < 1:
        descending = probability.sort(1, descending=True).values
        needed = descending.cumsum(1) - descending < top_p
        probability = probability.masked_fill(probability < descending.where(needed, torch.inf).amin(1)[:, None], 0)
    cumulative = probability.cumsum(1)
    total = cumulative[:, -1:]
    # rounding may carry the product up to the total itself, which no token exceeds
    point = torch.minimum(uniform.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def tokens_to_fix(confidence: Sequence[float] | np.ndarray, quota: int, threshold: float | None) -> np.ndarray:
    """Low-confidence remasking: the `quota` surest positions keep their token, the others stay masked.

    Args: threshold: every position at least this sure keeps its token too.
    Returns: indices, ascending; equally sure positions: the earlier first.
    """
    values = np.asarray(confidence)
    fixed = np.zeros(len(values), bool)
    fixed[np.argsort(-values, kind="stable")[:quota]] = True
    if threshold is not None:
        fixed |= values >= threshold
    return np.flatnonzero(fixed)
