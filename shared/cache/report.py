"""A cache's description (inspect.py) -> styled lines for a terminal; the same lines without colour when piped.

Everything a stranger wrote goes into `Text`, never through the console's markup, and stays on its own line.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from ..shown_text import bytes_text, number_text, terminal_text
from .decoded_views import MARKS
from .facts import MAX_SENTENCE_CHARS, identity, in_words, means, origin, sizes, value_chars

BAR_WIDTH = 24
MAX_VALUE_CHARS = 200
MAX_DISTRIBUTION_LINES = 16
_STYLES = {"prompt": "dim", "clean": "", "chunk": "bold cyan", "masked": "bold yellow"}


def report(description: Mapping[str, Any]) -> Text:
    """The report of `describe_cache`'s answer, one section after another."""
    first = ("Cache", {"folder": description["cache"], **identity(description)})
    sections = [first, *origin(description, description["size"]["samples"])]
    lines = [line for title, rows in sections for line in _section(title, rows)][1:]
    if description["verdict"]:
        sound = description["verdict"]["sound"]
        said = terminal_text(description["verdict"]["sentence"], max_chars=MAX_SENTENCE_CHARS)
        lines = [Text(said.replace("\n", " "), "bold" if sound else "bold red"), Text(), *lines]
    lines += [*_numbers(description), *_by_t(description)]
    chunks, targets = description["chunks"], description["targets"]
    if chunks:
        lines += _distribution("Chunk length in tokens", chunks["length_counts"])
    if targets:
        lines += _distribution("Tokens kept per target (k)", targets["k_counts"])
    if description["sample"]:
        lines += _sample(description["sample"])
    return Text("\n").join(lines)


def _numbers(d: Mapping[str, Any]) -> Iterator[Text]:
    """Sizes, bytes by column, means of the signal."""
    size = d["size"]
    yield from _section(*sizes(d))
    columns = sorted(size["column_bytes"].items(), key=lambda item: -item[1])
    per_position = max(1, size["masked_positions"])
    yield from _bars("Bytes by column, and per masked position", [
        (name, count, f"{bytes_text(count):>9} {count / per_position:8.2f}") for name, count in columns[:32]
    ])  # fmt: skip
    for title, rows in means(d):
        yield from _section(title, rows)


def _by_t(d: Mapping[str, Any]) -> Iterator[Text]:
    """Views by diffusion time and, where there are targets, head mass and entropy."""
    edges, views, targets = d["t"]["bin_edges"], d["t"]["views"], d["targets"]
    rows = []
    for number, count in enumerate(views):
        numbers = f"{count:>9,}"
        if targets:
            by_t = targets["by_t"]
            mass, entropy = by_t["head_mass"][number], by_t["entropy"][number]
            numbers += f" {by_t['targets'][number]:>11,}  {number_text(mass):>9}  {number_text(entropy):>7}"
        rows.append((f"{edges[number]:.2f} - {edges[number + 1]:.2f}", count, numbers))
    header = "    views" + ("     targets  head mass  entropy" if targets else "")
    yield from _bars("Diffusion time t", rows, header)


def _distribution(title: str, counts: Sequence[int]) -> Iterator[Text]:
    """How often 0, 1, 2, ... occur; a long tail as one line."""
    total, occurring = max(1, sum(counts)), [(value, count) for value, count in enumerate(counts) if count]
    shown = [(str(value), count) for value, count in occurring[:MAX_DISTRIBUTION_LINES]]
    if len(occurring) > MAX_DISTRIBUTION_LINES:
        value, _ = occurring[MAX_DISTRIBUTION_LINES - 1]
        shown[-1] = (f"{value} or more", sum(counts[value:]))
    yield from _bars(title, [(name, count, f"{count:>13,} {count / total:7.1%}") for name, count in shown])


def _sample(sample: Mapping[str, Any]) -> Iterator[Text]:
    """One decoded view, and what the teacher said about it."""
    yield from _section("Sample", {
        "id": f"{sample['sample_id']}, view {sample['view']}",
        "t": f"{sample['t']:.3f}, {sample['masked_positions']:,} of {sample['tokens'] - sample['prompt_tokens']:,} "
        f"response tokens masked, prompt {sample['prompt_tokens']:,}",
        "marks": "⟦masked chunk⟧ ⟨masked token outside chunks⟩",
    })  # fmt: skip
    text = Text()
    for segment in sample["segments"]:
        left, right = MARKS.get(segment["kind"], "  ")
        shown = segment["text"].replace("\t", "    ")
        text.append(f"{left}{shown}{right}" if segment["kind"] in MARKS else shown, _STYLES[segment["kind"]])
    for line in text.split("\n", allow_blank=True):
        yield Text("  │ ", "dim").append_text(line)  # the margin tells cached text from the report's own lines
    if sample["tokens_not_shown"]:
        yield Text(f"  and {sample['tokens_not_shown']:,} more tokens, which are not shown", "dim")
    padding = sample["padding"]
    if padding["tokens"]:
        masked = f"{padding['masked']:,} of them masked"
        yield Text(f"  then {padding['tokens']:,} tokens of end-of-text padding, {masked}", "dim")
    if sample["teacher"]:
        yield Text()
        yield Text("Teacher at some positions: probability of the clean token, then its most likely ones", "bold")
    for says in sample["teacher"]:
        line = Text(f"  {says['position']:>6}  ", "dim")
        line.append(f"{_quoted(says['token'])} {says['probability']:.3f}", "bold").append("   ")
        for top in says["top"]:
            same = top["token"] == says["token"]
            line.append(f"  {_quoted(top['token'])} {top['probability']:.3f}", "green" if same else "")
        yield line


def _section(title: str, rows: Mapping[str, Any]) -> Iterator[Text]:
    yield Text()
    yield Text(title, "bold")
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        yield Text(f"  {name:{width}}  ", "dim").append(_one_line(in_words(value), value_chars(name, MAX_VALUE_CHARS)))


def _bars(title: str, rows: Sequence[tuple[str, int, str]], header: str = "") -> Iterator[Text]:
    """(name, size of the bar, numbers) per line."""
    if not rows:
        return
    width, largest = max(12, *(len(name) for name, _, _ in rows)), max(1, *(size for _, size, _ in rows))
    yield Text()
    yield Text(title, "bold")
    if header:
        yield Text(f"  {'':{width}}{header}", "dim")
    for name, size, numbers in rows:
        bar = "█" * round(BAR_WIDTH * size / largest)
        yield Text(f"  {_one_line(name):{width}}", "dim").append(numbers).append(f"  {bar}".rstrip(), "cyan")


def _one_line(text: str, max_chars: int = MAX_VALUE_CHARS) -> str:
    return terminal_text(text, max_chars=max_chars).replace("\n", "\\n").replace("\t", "\\t")


def _quoted(token: str) -> str:
    """A token between quotes, so that its spaces are seen."""
    return f"'{_one_line(token)}'"
