"""Do a recipe and a cache say the same? What would make a training something else than it is called is refused.

A cache fixes its noise and what was kept of the teacher; training reads them from its manifest, whatever the
configuration says. So where the two differ, one of them is not what the user thinks:
- refused: a loss with nothing to act on, and CompDemo asked for (a teacher that is shown half of the masked text) from
  a cache without it. Whoever means that cache says so: --set noise.comp_demo=false.
- told: everything else (the cache is used as it is).
"""

from collections.abc import Iterator, Sequence

from ..shared.cache.manifest import Manifest
from ..shared.config import LossConfig, RunConfig
from ..shared.errors import ConfigError

_TOLD = ("comp_demo", "unit", "timesteps", "demo_ratio", "t_min", "t_max")
"""Settings of `noise` that change what a view means; seed and number of views change which ones there are."""


def require_agreement(config: RunConfig, manifest: Manifest) -> list[str]:
    """What the recipe says otherwise than the cache, a sentence each.

    Raises: ConfigError: a loss has nothing to act on; CompDemo is asked for and not there.
    """
    losses = [loss for loss in config.losses if loss.weight > 0]
    told = list(_require_something(losses, manifest))
    of_teacher = [loss for loss in losses if loss.name != "ce" and loss.target == "teacher"]
    if not of_teacher or manifest.teacher is None:
        return told
    if config.noise.comp_demo and manifest.noise.get("comp_demo") is False:
        raise ConfigError(
            "noise.comp_demo = true, and this cache was dumped without CompDemo: the result would not be what the "
            "recipe says. Dump with it, or say that you mean this cache: --set noise.comp_demo=false"
        )
    for name in _TOLD:
        theirs, ours = manifest.noise.get(name), getattr(config.noise, name)
        matters = name != "demo_ratio" or (config.noise.comp_demo and manifest.noise.get("comp_demo"))
        if theirs is not None and theirs != ours and matters:
            ours, theirs = (str(value).lower() if isinstance(value, bool) else value for value in (ours, theirs))
            told.append(f"the recipe says noise.{name} = {ours}, the cache {theirs}: the cache's holds")
    asked = manifest.teacher.spec.get("attention")
    if asked is not None and asked != config.teacher.attention:
        told.append(
            f"the recipe says teacher.attention = {config.teacher.attention}, the cache's teacher was asked as {asked}"
        )
    return told


def _require_something(losses: Sequence[LossConfig], manifest: Manifest) -> Iterator[str]:
    """Raises: ConfigError: a loss that would be 0 from the first to the last step."""
    found = manifest.statistics
    if found.masked_positions == 0:
        yield "this cache has not one masked position, so every loss stays 0: noise.t_max was too small for its answers"
        return
    nothing = (
        "so it would train on nothing. Look at the verdict and the notes of tide inspect-cache: the two tokenizers may "
        "spell this text differently"
    )
    for loss in losses:
        if loss.name == "kl" and manifest.signal.kind == "topk" and found.targets == 0:
            raise ConfigError(f"losses.kl: this cache has not one token-level target, {nothing}")
        if loss.name == "calm" and manifest.signal.kind != "none" and found.chunks == 0:
            raise ConfigError(f"losses.calm: this cache has not one masked chunk, {nothing}")
        unmatched = found.chunks - found.targets
        if loss.name == "calm" and loss.chunks == "unmatched" and manifest.signal.kind == "topk" and unmatched == 0:
            said = "losses.calm (chunks: unmatched): every chunk of this cache is one token on each side"
            if not any(other.name != "ce" and other is not loss for other in losses):
                raise ConfigError(f"{said}, so it would train on nothing; use chunks: all, or a token-level loss")
            yield f"{said}: this loss stays 0, the token-level one acts on all of them"
