"""What a training step does with a student on its processes: forward, summed gradient, clipping, optimisers.

`Engine` is all that the training loop sees, whether every process holds a whole copy (DDP) or shares (sharding.py). The
launcher decides; numbers agree to rounding. The learning rate is a function of the step alone, so a resumed run needs
no scheduler state.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_scheduler

from ..shared.config import TrainConfig
from .open_student import vocabulary_weights
from .sharding import shard, sharding_asked_for, whole_tensor
from .student import Student, StudentOutput


class Engine:
    """One student and its optimisers on all processes: whole copies, by plain torch on one process and DDP on several.

    Each process makes the same calls, on its share of the batch.
    """

    def __init__(self, student: Student, accelerator: Accelerator, train: TrainConfig) -> None:
        self._student, self._accelerator = student, accelerator
        self._largest_norm = train.grad_clip or float("inf")
        self._wrapped = self._wrap(student)
        self.optimizers: dict[str, Optimizer] = build_optimizers(student.model, train)
        """By name; learning rates are set and state is saved here."""

    def _wrap(self, student: Student) -> Any:
        return self._accelerator.prepare(student)  # autocast and DDP

    def forward(self, *arguments: Any) -> StudentOutput:
        """The student's, under tide's precision."""
        return self._wrapped(*arguments)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; gradients are added up over processes in the last alone."""
        return contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of the loss; after the last micro-batch it is that of all."""
        # DDP averages gradients over processes, and every process holds only its share of a global mean.
        self._accelerator.backward(loss * self._accelerator.num_processes)

    def step(self) -> Tensor:
        """Clip the gradient, step, forget it; its norm before, the same on every process."""
        parameters = [p for p in self._student.parameters() if p.grad is not None]
        norm = whole_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        torch.nn.utils.clip_grads_with_norm_(parameters, self._largest_norm, norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm


class ShardedEngine(Engine):
    """A student that lies in shares (FSDP2)."""

    def _wrap(self, student: Student) -> Any:
        def forward(*arguments: Any) -> StudentOutput:
            # autocast's cache would keep all layers' weights in half precision for the whole forward pass
            with self._accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                return student(*arguments)

        return forward

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Shares are added up in each micro-batch: whole gradients would need the memory that sharding saves."""
        yield


def open_engine(student: Student, accelerator: Accelerator, train: TrainConfig) -> Engine:
    """The engine that the launcher asks for; `student` stays the module inside."""
    asked = None if accelerator.num_processes == 1 else sharding_asked_for()
    if asked is None:
        return Engine(student, accelerator, train)
    shard(student, accelerator, asked)
    return ShardedEngine(student, accelerator, train)


def build_optimizers(model: PreTrainedModel, train: TrainConfig) -> dict[str, Optimizer]:
    """AdamW on everything, or Muon on hidden matrices and AdamW on embeddings, head and norms.

    Muon's update is scaled to AdamW's typical size (`match_rms_adamw`), so learning rates of both are comparable.
    Vectors (norms, biases) are not decayed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    vocabulary = {id(weight) for weight in vocabulary_weights(model)}
    by_muon = [p for p in parameters if train.optimizer == "muon" and p.dim() == 2 and id(p) not in vocabulary]
    taken = {id(p) for p in by_muon}
    rest = [p for p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: dict[str, Optimizer] = {
        "adamw": torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=train.betas)
    }
    if by_muon:
        optimizers["muon"] = torch.optim.Muon(
            by_muon, lr=train.muon_lr, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
    return optimizers


def schedule_factor(train: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """transformers' schedule `train.schedule` as a function: steps done -> factor of the learning rate, in [0, 1]."""
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.lr)
    scheduler: Any = get_scheduler(train.schedule, probe, round(train.warmup_ratio * num_steps), num_steps)
    return scheduler.lr_lambdas[0]


def set_learning_rates(optimizers: Mapping[str, Optimizer], train: TrainConfig, factor: float) -> None:
    """Scale every optimiser's configured learning rate."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = (train.muon_lr if name == "muon" else train.lr) * factor
