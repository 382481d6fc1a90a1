"""A cache's statistics in one sentence: does its teacher know the text?"""

from typing import Any

from .manifest import Manifest
from .statistics import ShardStatistics


def verdict(manifest: Manifest) -> dict[str, Any] | None:
    """What the teacher's answers are worth, as plain JSON; None: there is no teacher, or nobody counted.

    Returns: `sentence`; `sound`: better than a unigram model, and nothing was doubted; `answered`: teacher tokens;
        `accuracy` and `logp` of the clean tokens, `unigram_accuracy` and `unigram_logp` (nats, means over tokens);
        `by_t`: answered, accuracy and logp by bin of t, None where nothing was asked; `doubts`.
    """
    if manifest.teacher is None or not sum(manifest.statistics.t_answered):
        return None
    numbers, doubts = _numbers(manifest.statistics), list(manifest.teacher.doubts)
    better = numbers["logp"] > numbers["unigram_logp"]
    finds = (
        f"it finds {numbers['accuracy']:.1%} of the clean tokens and gives them {numbers['logp']:.2f} nats on average; "
        f"a unigram model of the text {numbers['unigram_accuracy']:.1%} and {numbers['unigram_logp']:.2f}"
    )
    if not better:
        sentence = f"The teacher says no more about this text than counts of its tokens would: {finds}."
    elif doubts:
        said = "The teacher knows this text, but may not have been asked as it was trained"
        sentence = f"{said}: {finds}. {' '.join(doubts)}"
    else:
        sentence = f"The teacher knows this text: {finds}."
    return {"sentence": sentence, "sound": better and not doubts, **numbers, "doubts": doubts}


def _numbers(s: ShardStatistics) -> dict[str, Any]:
    total = sum(s.t_answered)
    means = [
        (count, correct / count if count else None, logp / count if count else None)
        for count, correct, logp in zip(s.t_answered, s.t_correct, s.t_clean_logp, strict=True)
    ]
    return {
        "answered": total, "accuracy": sum(s.t_correct) / total, "logp": sum(s.t_clean_logp) / total,
        "unigram_accuracy": s.unigram_correct / total, "unigram_logp": s.unigram_logp / total,
        "by_t": {
            "answered": [count for count, _, _ in means], "accuracy": [accuracy for _, accuracy, _ in means],
            "logp": [logp for _, _, logp in means],
        },
    }  # fmt: skip
