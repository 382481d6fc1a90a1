"""Optimisers and learning rates: model + settings -> optimisers by name, and the rate of any step.

The learning rate is a function of the step alone, so a resumed run needs no scheduler state.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, get_scheduler

from ..shared.config import TrainConfig
from .open_student import vocabulary_weights


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
