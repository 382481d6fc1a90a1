"""tokenkit's `get_alignment_indices` as documented: its arguments, what it returns, and what it does not see.

Tokens are strings of byte-level letters. It compares lengths from one pair of special tokens to the next, evens out
blanks at the beginning, by changing what it was given, and afterwards leaves out pairs that are not the same text.
"""

from itertools import takewhile

BLANK = "Ġ"


def get_alignment_indices(
    tokens_teacher, tokens_student, tokenizer_teacher, tokenizer_student, attention_mask_teacher=None,
    attention_mask_student=None, check=True,
):  # fmt: skip
    sides = tokens_teacher, tokens_student
    assert attention_mask_teacher is attention_mask_student is None, "this stand-in reads every token"
    blanks = [sum(1 for _ in takewhile(BLANK.__eq__, "".join(side))) for side in sides]
    for side, own, other in zip(sides, blanks, reversed(blanks), strict=True):
        side[0] = BLANK * max(0, other - own) + side[0]
    kinds = [tokenizer.model_kind_cls.replacements for tokenizer in (tokenizer_teacher, tokenizer_student)]
    roles = [(kinds[0][role], kinds[1][role]) for role in kinds[0] if kinds[0][role] and kinds[1][role]]
    pairs, special = [], []
    start, at, length = [0, 0], [0, 0], [0, 0]
    while all(i < len(side) for i, side in zip(at, sides, strict=True)):
        ahead = [side[i:] for side, i in zip(sides, at, strict=True)]
        role = next((r for r in roles if all(a[: len(t)] == t for a, t in zip(ahead, r, strict=True))), None)
        if role is not None:
            at, length = [i + len(tokens) for i, tokens in zip(at, role, strict=True)], [0, 0]
        else:
            ahead = [done + len(side[i]) for done, side, i in zip(length, sides, at, strict=True)]
            for n in (0, 1):
                if ahead[n] <= ahead[1 - n]:
                    at[n], length[n] = at[n] + 1, ahead[n]
            if ahead[0] != ahead[1]:
                continue
        pairs.append((start[0], at[0], start[1], at[1]))
        special.append(role is not None)
        start = list(at)
    if check:
        pairs = [
            (a, b, c, d)
            for (a, b, c, d), known in zip(pairs, special, strict=True)
            if known or "".join(tokens_teacher[a:b]) == "".join(tokens_student[c:d])
        ]
    masks = [[False] * len(side) for side in sides]
    return pairs, list(tokens_teacher), list(tokens_student), *masks
