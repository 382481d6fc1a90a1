"""`tide train-student`: cache + student checkpoint -> trained student, in one plain loop over accelerate.

1. open the cache and the student (never the teacher), check that they belong together
2. for every step: the global batch of `ViewOrder`, this process's share of it in micro-batches, one student forward
   each, the recipe's losses, one optimiser step
3. metrics as JSONL (and trackers by name), checkpoints, exact resume; at the end `<out>/student`

Several processes run the same loop, the same number of steps each, on shares of the same global batches. The state of
a run is the step number, the student and the optimisers; order, noise, learning rate and random numbers follow from the
step.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..shared.addresses import require_apart
from ..shared.cache import Cache, open_cache
from ..shared.cache.files import output_errors
from ..shared.cache.trained_from import trained_from
from ..shared.config import RunConfig, to_tree
from ..shared.devices import speaks
from ..shared.errors import ConfigError, TryAgain
from ..shared.noising import keyed_generator
from ..shared.stop_signals import noted_signals
from .agreement import require_agreement
from .batches import Batch, GlobalCounts, Item, ViewOrder, collate, views_of
from .checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_student,
    load_optimizers,
    open_checkpoint,
    remove_run,
    save_checkpoint,
    save_student,
    saved_checkpoints,
)
from .divergence import require_finite, weight_limit, weights_error, wrecked
from .engines import open_engine, schedule_factor, set_learning_rates
from .heartbeat import Heartbeat
from .heldout import HeldoutQuestions
from .metrics import MetricsFile, MetricsWindow, flat_settings
from .objective import Objective
from .open_student import begins_at_random, open_encoder, open_model, refuse_own_input, student_card
from .processes import join_processes, on_any_process, on_main, own_accelerator_state
from .student import Student

_log = logging.getLogger(__name__)
Report = Callable[[dict[str, float]], None]
_NOT_IDENTITY = {
    "log_every", "save_every", "keep_checkpoints", "report_to", "micro_batch_size", "gradient_checkpointing",
    "heldout_every", "collective_timeout_s", "device",
}  # fmt: skip


def train_student(
    config: RunConfig, cache_path: str, out: Path, *, resume: bool | Path = True, heldout: str | None = None,
    report: Report = lambda metrics: None, say: Callable[[str], object] = lambda line: None,
) -> Path:  # fmt: skip
    """Train a student from a cache.

    Args:
        config: `student`, `losses` and `train` are read; data, noise and codec come from the cache's manifest.
        cache_path: folder or hub id of a complete cache.
        out: run folder; gets `metrics.jsonl`, `checkpoints/` and, at the end, `student/`.
        resume: continue from the newest checkpoint below `out`, if there is one; False: remove what is there and begin
            anew; a path: continue from this checkpoint. A run that is finished already is left as it is, unless a
            path is given.
        heldout: folder or hub id of a cache of unseen documents for the same student, to score it on while it trains.
        report: called with the metrics of every logged step, on the main process.
        say: told there, before the first step, whether the student begins at random, and what of the cache is not used.
    Returns: the folder of the finished student.
    Raises: CacheMismatch: the cache was made for another tokenizer, or `out` holds another run.
        ConfigError: the recipe needs something the cache does not have; `out` lies in what is read, or around it.
        TryAgain: stopped by a signal, state saved; or another process of the run died. OutputError: nothing can be
        written below `out`. DataError: the student holds NaN from the start. TideError: a loss or a weight became NaN,
        infinite or absurd.
    """
    refuse_own_input(config, out, cache_path, heldout)  # before anything is touched
    require_apart(out, {"--resume": resume if isinstance(resume, Path) else None}, may_hold=True)
    cache = None
    if speaks(on_machine=True):  # a folder that is new here is checked in full, once per machine
        cache = open_cache(cache_path, shard_cache=config.shard_cache)
    with own_accelerator_state(), contextlib.ExitStack() as stack:
        accelerator, size = join_processes(config.train, out), config.train.batch_size
        if size % accelerator.num_processes:
            raise ConfigError(
                f"train.batch_size = {size} is not a multiple of the {accelerator.num_processes} processes; change one "
                "of the two"
            )
        stack.enter_context(Heartbeat(accelerator, timeout_s=config.train.collective_timeout_s))
        if cache is None:
            cache = open_cache(cache_path, shard_cache=config.shard_cache)
        identity = run_identity(config, cache)
        finished, checkpoint = on_main(accelerator, lambda: _find_start(out, identity, resume))
        if finished:
            return out / "student"
        run = Run(config, cache, out, checkpoint, accelerator=accelerator, heldout=heldout)
        stack.callback(run.close)
        if accelerator.is_main_process and checkpoint is None and begins_at_random(config.student.path):
            say(f"{config.student.path} holds no weights: the student begins with random ones (train.seed)")
        for line in run.order.unused(run.num_steps) if accelerator.is_main_process else ():
            say(line)
        has_generators = run.device.type not in ("cpu", "mps")  # torch cannot fork that of mps
        kind = run.device.type if has_generators else "cuda"
        stack.enter_context(torch.random.fork_rng([run.device] if has_generators else [], device_type=kind))
        stop = stack.enter_context(noted_signals())
        run.prepare_folder(anew=resume is False)
        _train(run, stop, report)
        return run.finish()


def _find_start(out: Path, identity: Mapping[str, Any], resume: bool | Path) -> tuple[bool, Checkpoint | None]:
    """(is the run finished already?, where it continues), from what lies on the disk."""
    if resume is False:
        return False, None
    finished = find_student(out / "student", identity)
    if isinstance(resume, Path):
        return False, open_checkpoint(resume, identity)
    return (True, None) if finished else (False, find_checkpoint(out / "checkpoints", identity))


def _train(run: "Run", stop: Sequence[int], report: Report) -> None:
    """All steps that are left, with evaluations between them and one after the last."""
    save_every = run.config.train.save_every

    def asked_to_stop() -> bool:
        return on_any_process(run.accelerator, bool(stop))

    def leave(steps_done: int) -> None:
        if stop and stop[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise TryAgain(f"{run.out}: stopped after step {steps_done}, which is saved; run the same command again")

    with contextlib.closing(run.batches()) as batches:
        for step, micro_batches, counts in batches:
            if not run.evaluate(step, report, asked_to_stop):
                run.save(step)
                leave(step)
            run.step(step, micro_batches, counts, report)
            is_last, stopped = step + 1 == run.num_steps, asked_to_stop()
            if is_last or stopped or (step + 1) % save_every == 0:
                run.save(step + 1)
            if stopped and not is_last:
                leave(step + 1)
    if not run.evaluate(run.num_steps, report, asked_to_stop):
        leave(run.num_steps)


def run_identity(config: RunConfig, cache: Cache) -> dict[str, Any]:
    """What must be equal for a run to continue: cache, student, losses, and the settings that change numbers."""
    train = {name: value for name, value in to_tree(config.train).items() if name not in _NOT_IDENTITY}
    tree = {"student": to_tree(config.student), "losses": to_tree(config.losses), "train": train}
    return {"cache": cache.manifest.hash, **flat_settings(tree)}


class Run:
    """Everything one training run holds; made and used inside `own_accelerator_state`."""

    def __init__(
        self, config: RunConfig, cache: Cache, out: Path, checkpoint: Checkpoint | None = None, *,
        accelerator: Accelerator | None = None, heldout: str | None = None,
    ) -> None:  # fmt: skip
        self.config, self.cache, self.out, self.checkpoint = config, cache, out, checkpoint
        self.identity = run_identity(config, cache)
        train, manifest = config.train, cache.manifest
        self.encoder = open_encoder(config, cache)
        self.objective = Objective(
            config.losses, signal=manifest.signal.kind, temperatures=manifest.signal.temperatures
        )
        told = require_agreement(config, manifest)
        for said in told if speaks() else ():
            _log.warning(said)
        self.accelerator = accelerator or join_processes(train, out)
        self.device = self.accelerator.device
        fresh_ratio = 0.0 if train.ce_noise == "cached" else 1.0 if self.objective.is_ce_only else train.fresh_ratio
        self.order = ViewOrder(cache, train, fresh_ratio=fresh_ratio)
        self.num_steps = train.steps or max(1, round(train.epochs * self.order.num_samples / train.batch_size))
        self.first_step = checkpoint.step if checkpoint else 0
        in_support = torch.from_numpy(cache.vocabulary().teacher_id >= 0)
        model = open_model(config, cache, checkpoint.folder if checkpoint else None)
        self._weight_limit = weight_limit(model, str(checkpoint.folder if checkpoint else config.student.path))
        self.student = Student(model, in_support if in_support.any() else None, manifest.signal.tail_buckets)
        self.engine = open_engine(self.student, self.accelerator, train)
        self.factor = schedule_factor(train, self.num_steps)
        self.heldout = None
        if heldout:
            unseen = open_cache(heldout, shard_cache=config.shard_cache)
            self.heldout = HeldoutQuestions(unseen, mask_id=open_encoder(config, unseen).mask_id)
        self.window, self.metrics_file = MetricsWindow(), MetricsFile(out)
        self._doubtful = [path for step, path in saved_checkpoints(out / "checkpoints") if step > self.first_step]
        if checkpoint:
            load_optimizers(checkpoint.folder, self.engine.optimizers)
            main = self.accelerator.is_main_process  # it takes the totals of all; the others hold zeros
            shares = {
                name: (total if main or name == "grad_norm" else 0.0, count)
                for name, (total, count) in checkpoint.window.items()
            }
            self.window.restore(shares, self.device)
        self._tokens, self._clock = 0, time.perf_counter()

    def prepare_folder(self, *, anew: bool) -> None:
        """Make `out` hold what belongs to the steps done so far, and nothing else."""
        if self.accelerator.is_main_process:
            with output_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            if anew:
                remove_run(self.out)
            self.metrics_file.keep_until(self.first_step)
        self.accelerator.wait_for_everyone()
        if self.config.train.report_to:
            settings = flat_settings(to_tree(self.config))
            scalars = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("tide", config=scalars)

    def batches(self) -> Generator[tuple[int, list[Batch], GlobalCounts]]:
        """The steps that are left, each built in a thread while the one before it trains."""
        self._clock = time.perf_counter()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tide-batches") as thread:
            steps = range(self.first_step, self.num_steps)
            futures = (thread.submit(self.build, step) for step in steps)
            following = next(futures, None)
            for step in steps:
                assert following is not None
                batches, counts = following.result()
                following = next(futures, None)
                yield step, batches, counts

    def build(self, step: int) -> tuple[list[Batch], GlobalCounts]:
        """This process's share of the global batch of `step`, in micro-batches, and the counts of the whole."""
        items = self.order.items(step)
        mine = sorted(self.share(items), key=self.order.length, reverse=True)  # little padding
        share = len(mine)
        micro = min(share, self.config.train.micro_batch_size or share)
        signal, block_size = self.cache.manifest.signal, self.cache.manifest.block_size
        batches = []
        for start in range(0, share, micro):
            samples = [
                views_of(item, self.cache.rows(self.order.row_numbers(item)), self.config.train.seed)
                for item in mine[start : start + micro]
            ]
            batch = collate(
                samples, mask_id=self.encoder.mask_id, block_size=block_size,
                top_k=signal.top_k if signal.kind == "topk" else 0, temperatures=tuple(signal.temperatures),
                max_top_k=self.config.train.max_top_k,
            )  # fmt: skip
            batches.append(batch)
        return batches, self.order.counts(items)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a global batch: parts of all processes in rank order are the batch."""
        size = len(items) // self.accelerator.num_processes
        first = size * self.accelerator.process_index
        return items[first : first + size]

    def losses(self, batch: Batch, counts: GlobalCounts, step: int) -> dict[str, Tensor]:
        """Student forward and losses of one micro-batch: its share of the global means, by name."""
        batch = batch.to(self.device)
        fresh = self.order.is_fresh(step)
        output = self.engine.forward(
            batch.rows, batch.read, batch.gold_ids, batch.target, batch.teacher.top_ids,
            () if fresh else self.objective.temperatures,
        )  # fmt: skip
        return self.objective(output, batch, counts, progress=step / self.num_steps, fresh=fresh)

    def gradient(self, step: int, batches: Sequence[Batch], counts: GlobalCounts) -> dict[str, Tensor]:
        """Losses and gradient of the global batch, the latter summed over micro-batches and processes."""
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with self.engine.micro_batch(is_last=number + 1 == len(batches)):
                values = self.losses(batch, counts, step)
                loss = self.objective.total(values)
                self.engine.backward(loss)
            for name, value in {**values, "loss": loss}.items():
                value = value.detach().float()
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def step(self, step: int, batches: Sequence[Batch], counts: GlobalCounts, report: Report) -> None:
        """One optimiser step on one global batch."""
        train, accelerator = self.config.train, self.accelerator
        # Dropout, if the student has any: keyed by the step, so that resuming needs no generator state.
        seed = keyed_generator(train.seed, "torch", step, accelerator.process_index).integers(2**62)
        torch.manual_seed(int(seed))
        self.student.train()
        values = self.gradient(step, batches, counts)
        factor = self.factor(step)
        set_learning_rates(self.engine.optimizers, train, factor)
        norm = self.engine.step()
        self.window.add({**values, "grad_norm": norm.detach().float()})
        self._tokens += sum(batch.rows.ids.numel() for batch in batches) * accelerator.num_processes
        if (step + 1) % train.log_every == 0 or step + 1 == self.num_steps:
            self._log(step + 1, train.lr * factor, report)

    def evaluate(self, steps_done: int, report: Report, stop: Callable[[], bool]) -> bool:
        """Score the student on held-out documents if it is time to; False: given up, because `stop` said so."""
        is_time = steps_done == self.num_steps or steps_done % self.config.train.heldout_every == 0
        if self.heldout is None or not is_time:
            return True
        begin = time.perf_counter()
        with self.accelerator.autocast():
            scores = self.heldout.ask(
                self.student, stop, rank=self.accelerator.process_index, num_ranks=self.accelerator.num_processes,
                add_up=lambda sums: self.accelerator.reduce(sums, "sum"),  # type: ignore[arg-type, return-value]
            )  # fmt: skip
        if scores is not None:
            self._write({"step": steps_done, "epoch": self._epoch(steps_done), **scores.summary}, report)
        self._clock += time.perf_counter() - begin
        return scores is not None

    def save(self, steps_done: int) -> None:
        """Write a checkpoint: the main process writes, and gathers what others hold.

        Raises: TideError: metrics or weights say that training diverged.
        """
        totals, fault = self._totals(steps_done), wrecked(self.student.model, self._weight_limit)
        if on_any_process(self.accelerator, fault is not None):
            raise weights_error(fault, steps_done, self.out)
        save_checkpoint(
            self.out / "checkpoints", steps_done, self.student.model, self.engine.optimizers,
            identity=self.identity, window=totals, keep=self.config.train.keep_checkpoints,
            doubtful=self._doubtful, is_main=self.accelerator.is_main_process,
        )  # fmt: skip
        self._doubtful = []
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the finished student."""
        folder = self.out / "student"
        decodes = {"block_size": self.encoder.block_size, "mask_token_id": self.encoder.mask_id}
        self.student.model.config.update(decodes)  # of this training, whatever the start said
        save_student(
            folder, self.student.model, self.encoder.tokenizer,
            student_card(self.config, self.cache, self.encoder, self.num_steps), step=self.num_steps,
            identity=self.identity, origin=trained_from(self.cache).to_bytes(),
            is_main=self.accelerator.is_main_process,
        )  # fmt: skip
        self.accelerator.wait_for_everyone()
        return folder

    def close(self) -> None:
        """Let the trackers write what they hold back. (`end_training` would also end the caller's process group.)"""
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _log(self, steps_done: int, lr: float, report: Report) -> None:
        """Mean over the steps since the last line; with `save`, the only place where numbers leave the device."""
        totals, now = self._totals(steps_done), time.perf_counter()
        self.window.clear()
        metrics: dict[str, float] = {
            "step": steps_done,
            "epoch": self._epoch(steps_done),
            **{name: total / count for name, (total, count) in totals.items()},
            "lr": lr,
            "tokens_per_s": self._tokens / max(1e-9, now - self._clock),
        }
        self._tokens, self._clock = 0, now
        self._write(metrics, report)

    def _write(self, metrics: dict[str, float], report: Report) -> None:
        if self.accelerator.is_main_process:
            self.metrics_file.append(metrics)
            report(metrics)
        if self.config.train.report_to:
            self.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def _epoch(self, steps_done: int) -> float:
        return steps_done * self.config.train.batch_size / self.order.num_samples

    def _totals(self, steps_done: int) -> dict[str, tuple[float, int]]:
        def add_up(name: str, value: Tensor) -> Tensor:
            if name == "grad_norm" or self.accelerator.num_processes == 1:  # the norm is the same everywhere
                return value
            return self.accelerator.reduce(value, "sum")  # type: ignore[return-value]

        totals = self.window.totals(add_up)
        require_finite(totals, steps_done, self.out)
        return totals
