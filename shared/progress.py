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
    with Progress(*columns, console=console, speed_estimate_period=3600, disable=not console.is_terminal) as progress:
        task = progress.add_task("shards", total=total, completed=done, rate="")

        def report(num_shards: int, num_tokens: int) -> None:
            nonlocal finished, tokens
            finished, tokens = finished + num_shards, tokens + num_tokens
            elapsed = max(1e-9, time.perf_counter() - start)
            rate = f"{tokens / elapsed:,.0f} tokens/s"
            progress.update(task, advance=num_shards, rate=rate)
            if num_shards and not console.is_terminal:
                left = total - done - finished
                eta = f"about {left * elapsed / finished:,.0f} s left"
                _line(console, f"shards {done + finished}/{total}  {rate}  {elapsed:,.0f} s  {eta}")

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
