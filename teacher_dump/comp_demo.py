"""CompDemo (paper §2.2): which passes a view costs, and which answers are taken from each.

The masked set M is split into A and B. Pass 1 shows A clean and masks B; pass 2 the reverse. The teacher's answer at
a position comes from the pass in which it was masked. An empty half costs no pass, and neither does one without a
chunk, whose answers nobody would keep. The student sees all of M masked.
"""

import numpy as np

from ..shared.noising import ViewMasks


def passes(masks: ViewMasks, chunks: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The teacher's passes over one view.

    Args: chunks: [c, 4] int, the sample's chunks.
    Returns: up to two pairs: bool [l_teacher], the tokens that are masked in this pass; int [?], the active chunks
        among them. Over the passes, each active chunk occurs once.
    """
    both = []
    for masked in (masks.teacher_b, masks.teacher_a):
        answered = masks.active_chunks[masked[chunks[masks.active_chunks, 0]]]
        if len(answered):
            both.append((masked, answered))
    return both
