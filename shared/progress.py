"""What the terminal shows while a command works: progress, rates and ETA on stderr, never on stdout.

On a terminal a bar that moves; in a log file one line per finished shard or logged step.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .cache.store import Store


@contextlib.contextmanager
def dump_progress(prepare: Callable[[], int], root: "str | Path | Store") -> Iterator[Callable[[int, int], None]]:
    """Shards, token-forwards per second and ETA of a dump.

    Args:
        prepare: makes or reads the plan; returns its number of shards.
        root: the cache folder; shards with a receipt count as done from the start.
    Yields: a function to call with (shards finished, token-forwards) since the last call.
    """
    from .cache.receipts import listed_receipts

    console = Console(stderr=True)
    with console.status("planning: tokenising both sides ..."):
        total = prepare()
    done = len(listed_receipts(root))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    start, finished, tokens = time.perf_counter(), 0, 0
    begun: float | None = None  # when the first answer came: loading a teacher says nothing about its speed
    first: tuple[float, int] | None = None  # when the first shard ended, and how many had by then
    with Progress(*columns, console=console, speed_estimate_period=3600, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=total, completed=done, rate="")

        def report(num_shards: int, num_tokens: int) -> None:
            nonlocal finished, tokens, begun, first
            now = time.perf_counter()
            if begun is None:
                begun, num_tokens = now, 0
            finished, tokens = finished + num_shards, tokens + num_tokens
            if num_shards and first is None:
                first = now, finished
            rate = f"{tokens / (now - begun):,.0f} tokens/s" if tokens and now > begun else ""
            progress.update(task, advance=num_shards, rate=rate)
            if num_shards and not console.is_terminal:
                parts = [f"shards {done + finished}/{total}", rate, f"{now - start:,.0f} s"]
                if first is not None and finished > first[1]:
                    left_s = (total - done - finished) * (now - first[0]) / (finished - first[1])
                    parts.append(f"about {left_s:,.0f} s left")
                _line(console, "  ".join(filter(None, parts)))

        yield report


@contextlib.contextmanager
def train_progress() -> Iterator[Callable[[dict[str, float]], None]]:
    """One line per logged step: losses, gradient norm, learning rate, positions per second."""
    console = Console(stderr=True)

    def report(metrics: dict[str, float]) -> None:
        parts = [f"step {metrics['step']:,.0f}", f"epoch {metrics['epoch']:.2f}"]
        parts += [f"{k} {v:.4g}" for k, v in metrics.items() if k not in ("step", "epoch")]
        _line(console, "  ".join(parts))

    yield report


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
