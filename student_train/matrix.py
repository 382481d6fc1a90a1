"""A matrix of experiments: YAML -> named arms, what each is trained with, which cache it needs, and claims about them.

    baseline: ce
    arms:
      ce: {recipe: ce}                                    # the losses of a recipe that ships with tide, or
      kl: {losses: [{name: ce}, {name: kl, temperature: 2.0}], train: {ce_noise: fresh}}
      kl-comp-demo: {recipe: kl, cache: {noise.comp_demo: true}}       # what the cache's manifest must say
    sweeps:
      - {arm: kl, setting: train.max_top_k, values: [1, 4]}            # makes kl-max_top_k-1 and kl-max_top_k-4
    claims:
      - {claim: CompDemo helps at high t, better: kl-comp-demo, than: kl, at: [0.9]}

Everything an arm does not name is the command's own configuration, the same for all arms.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..shared.config import LossConfig, RunConfig, from_tree, load_config, to_tree
from ..shared.config_tree import merge, override, read_yaml, suggest
from ..shared.errors import ConfigError
from .comparison import Metric

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_SECTIONS = ("train", "losses")
"""What a sweep may change: the rest belongs to the cache or is the same for all."""


@dataclass(frozen=True)
class Arm:
    """What is particular about one kind of student.

    Args:
        recipe: take this recipe's losses; or give `losses`. train: settings of that section.
        cache: what the manifest must say, for example {"noise.comp_demo": True}; {}: any cache, the first one.
    """

    recipe: str | None = None
    losses: tuple[LossConfig, ...] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.losses is None):
            raise ConfigError("an arm takes its losses either from `recipe` or from `losses`: give one of the two")

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """A training's whole configuration. Raises: ConfigError: an unknown recipe, or a setting that is wrong."""
        tree = to_tree(base)
        tree["losses"] = to_tree(self.losses if self.losses is not None else load_config(self.recipe).losses)
        merge(tree["train"], {**self.train, "seed": seed})
        return from_tree(RunConfig, tree)


@dataclass(frozen=True)
class Sweep:
    """An arm once more for each value of one of its settings (`train.…` or `losses.…`)."""

    arm: str
    setting: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Claim:
    """A statement that the scores decide: students of arm `better` are better than those of arm `than`.

    Args: at: at these diffusion times, of those that are asked; None: over all.
    """

    claim: str
    better: str
    than: str
    at: tuple[float, ...] | None = None
    metric: Metric = "bits_per_byte"


@dataclass(frozen=True)
class Matrix:
    """All arms (sweeps included, once `read_matrix` made it), and what they are compared for."""

    baseline: str
    arms: Mapping[str, Arm]
    sweeps: tuple[Sweep, ...] = ()
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        for name in self.arms:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"arm {name!r:.80}: expected letters, digits, '.', '_' and '-', at most 60")


def matrix_names() -> list[str]:
    """Names of the matrices that ship with tide, sorted."""
    folder = resources.files("tide.recipes").joinpath("matrices")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_matrix(name_or_file: str) -> Matrix:
    """A matrix that ships with tide, or one in a YAML file.

    Raises: ConfigError: neither; or something in it is unknown, missing or of the wrong type.
    """
    if name_or_file in matrix_names():
        text = resources.files("tide.recipes").joinpath("matrices", f"{name_or_file}.yaml").read_text()
    else:
        try:
            text = Path(name_or_file).read_text()
        except OSError as error:
            raise ConfigError(
                f"--matrix {name_or_file}: no such file ({error.strerror}), and no matrix of tide's"
                f"{suggest(name_or_file, matrix_names())}"
            ) from error
    matrix = from_tree(Matrix, read_yaml(text, name_or_file))
    arms = dict(matrix.arms)
    for sweep in matrix.sweeps:
        for name, arm in _swept(sweep, matrix.arms):
            if name in arms:
                raise ConfigError(f"{name_or_file}: arm {name} is there twice; give a sweep every value once")
            arms[name] = arm
    named = [matrix.baseline, *(name for claim in matrix.claims for name in (claim.better, claim.than))]
    unknown = next((name for name in named if name not in arms), None)
    if unknown is not None:
        raise ConfigError(f"{name_or_file}: no arm {unknown!r:.80}{suggest(unknown, list(arms))}")
    return replace(matrix, arms=arms)


def _swept(sweep: Sweep, arms: Mapping[str, Arm]) -> Iterator[tuple[str, Arm]]:
    if sweep.arm not in arms:
        raise ConfigError(f"sweeps: no arm {sweep.arm!r:.80}{suggest(sweep.arm, list(arms))}")
    section, _, setting = sweep.setting.partition(".")
    if section not in _SECTIONS or not setting:
        raise ConfigError(f"sweeps: {sweep.setting!r:.80}: expected a setting below train or losses")
    arm = arms[sweep.arm]
    losses = arm.losses if arm.losses is not None else load_config(arm.recipe).losses
    for value in sweep.values:
        tree = {"losses": to_tree(losses), "train": dict(arm.train)}
        override(tree, f"{sweep.setting}={json.dumps(value)}")
        shown = value if isinstance(value, str) else json.dumps(value)
        name = f"{sweep.arm}-{setting.split('.')[-1]}-{shown}"
        made = from_tree(RunConfig, {"losses": tree["losses"]}).losses
        yield name, Arm(losses=made, train=tree["train"], cache=arm.cache)
