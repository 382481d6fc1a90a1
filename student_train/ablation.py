"""`tide ablate`: a matrix of arms x seeds from one or several caches -> one table, one picture, one JSON.

1. plan: for every arm a cache among those given, or the reason why it has to be left out and what to dump for it
2. train and score what is not finished (arms.py)
3. compare with the baseline, and decide the matrix's claims (comparison.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.addresses import require_apart
from ..shared.cache import Manifest
from ..shared.cache.files import atomic_write, output_errors, readable_json
from ..shared.config import RunConfig, to_tree
from ..shared.errors import CacheMismatch, ConfigError, TideError
from .ablation_report import claims_table, draw, missing, table
from .arms import Job, Outcome, Say, described, run_jobs
from .batches import require_in_cache
from .comparison import AllScores, gain, seeds_of, summarise, verdict_on
from .matrix import Arm, Claim, Matrix
from .objective import Objective
from .open_student import open_encoder

RESULT_NAME, TABLE_NAME, PICTURE_NAME = "ablation.json", "ablation.md", "ablation.png"


@dataclass(frozen=True)
class Planned:
    """What will be run.

    Args:
        jobs: seed by seed, every arm once per seed.
        caches: of each arm.
        left_out: why other arms cannot be run, and what would help.
    """

    jobs: Sequence[Job]
    caches: Mapping[str, str]
    left_out: Mapping[str, str]


def plan_ablation(matrix: Matrix, base: RunConfig, caches: Sequence[str], heldout: str, *, num_seeds: int) -> Planned:
    """Find a cache for every arm.

    Args:
        base: what all arms share; seeds count from its `train.seed`.
        caches: folders or hub ids, all of the same samples; the first serves arms that ask for nothing in particular.
        heldout: a cache of unseen documents for the same student.
    Raises:
        ConfigError: an arm is not valid; or none can be run. CacheMismatch: the caches do not belong together, or not
            to the student.
    """
    manifests = {cache: described(cache).manifest for cache in caches}
    _require_same_samples(manifests)
    for cache in (*caches, heldout):
        open_encoder(base, described(cache))
    chosen, left_out = {}, {}
    for name, arm in matrix.arms.items():
        try:
            chosen[name] = _cache_for(arm, manifests)
            _require_served(arm.config(base, base.train.seed), manifests[chosen[name]])
        except _NotServed as reason:
            chosen.pop(name, None)
            left_out[name] = str(reason)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(f"no arm of the matrix can be run with this cache: {reasons}")
    seeds = range(base.train.seed, base.train.seed + num_seeds)
    jobs = [Job(name, matrix.arms[name].config(base, seed), cache, heldout)
            for seed in seeds for name, cache in chosen.items()]  # fmt: skip
    return Planned(jobs, chosen, left_out)


class _NotServed(Exception):
    """None of the caches serves an arm; the message says what would."""


def _require_same_samples(manifests: Mapping[str, Manifest]) -> None:
    """Caches that hold other samples would be compared for their data, whatever the arms are called."""
    (first, ours), *others = manifests.items()
    for name, theirs in others:
        if (ours.sources, ours.totals.samples) != (theirs.sources, theirs.totals.samples):
            raise CacheMismatch(
                f"{name} holds {theirs.totals.samples:,} samples of {_sources(theirs)}, and {first} "
                f"{ours.totals.samples:,} of {_sources(ours)}: arms would differ in their data. Give caches of the same"
            )


def _sources(manifest: Manifest) -> str:
    return " + ".join(f"{source.source}@{source.revision:.12}" for source in manifest.sources)


def _cache_for(arm: Arm, manifests: Mapping[str, Manifest]) -> str:
    """The first cache that is what an arm asks for, under the names that dump-teacher gives it. Raises: _NotServed."""
    for name, manifest in manifests.items():
        facts = {f"noise.{k}": v for k, v in manifest.noise.items()}
        facts |= {f"signal.{k}": getattr(manifest.signal, k) for k in ("kind", "top_k", "min_probability")}
        unknown = next((setting for setting in arm.cache if setting not in facts), None)
        if unknown is not None:
            raise ConfigError(f"an arm asks for a cache by {unknown!r:.80}; expected one of {', '.join(sorted(facts))}")
        if all(facts[setting] == value for setting, value in arm.cache.items()):
            return name
    wanted = [f"{setting}={str(value).lower()}" for setting, value in arm.cache.items()]
    options = ["--teacher none" if item == "signal.kind=none" else f"--set {item}" for item in wanted]
    means = " (no teacher, clean samples only)" if "--teacher none" in options else ""
    raise _NotServed(
        f"needs a cache with {', '.join(wanted)}: run the tide dump-teacher command that made {next(iter(manifests))} "
        f"again with {' '.join(options)}{means} and another --out, and give it as one more --cache"
    )


def _require_served(config: RunConfig, manifest: Manifest) -> None:
    """Raises: _NotServed: a loss, a temperature, or more views or top tokens are needed than the cache has."""
    try:
        Objective(config.losses, signal=manifest.signal.kind, temperatures=manifest.signal.temperatures)
        require_in_cache(config.train, manifest)
    except ConfigError as error:
        raise _NotServed(str(error)) from error


def refuse_own_inputs(planned: Planned, out: Path) -> None:
    """Raises: ConfigError: `out` lies in a cache or in the student that the arms start from, or around them."""
    student = planned.jobs[0].config.student
    caches = {f"cache {number}": cache for number, cache in enumerate(dict.fromkeys(planned.caches.values()), 1)}
    read = {"student.path": student.path, "student.tokenizer": student.tokenizer}
    require_apart(out, {**caches, "--heldout": planned.jobs[0].heldout, **read})


def run_ablation(matrix: Matrix, planned: Planned, out: Path, *, workers: int, say: Say) -> dict[str, Any]:
    """Train, score, compare; writes ablation.json, ablation.md and ablation.png into `out`.

    Returns: the content of ablation.json.
    Raises: ConfigError: see `refuse_own_inputs`. TryAgain: stopped, the same command continues. TideError: no
        student could be trained.
    """
    refuse_own_inputs(planned, out)
    outcome = run_jobs(planned.jobs, out, workers=workers, say=say)
    if not outcome.scores:
        raise TideError(f"no student was trained: {next(iter(outcome.failed.values()))}")
    result = compare(matrix, planned, outcome)
    with output_errors(out):
        atomic_write(out / RESULT_NAME, readable_json(result))
        parts = table(result), claims_table(result), missing(result)
        atomic_write(out / TABLE_NAME, ("\n\n".join(filter(None, parts)) + "\n").encode())
        draw(result, out / PICTURE_NAME)
    return result


def compare(matrix: Matrix, planned: Planned, outcome: Outcome) -> dict[str, Any]:
    """What the scores say of the arms and of the claims."""
    result = summarise(outcome.scores, list(planned.caches), against=[matrix.baseline])
    keys = {(job.arm, job.seed): job.key for job in planned.jobs}
    config = planned.jobs[0].config
    return result | {
        "baseline": matrix.baseline,
        "claims": [_decided(claim, outcome.scores, keys) for claim in matrix.claims],
        "caches": {arm: described(cache).manifest.hash for arm, cache in planned.caches.items()},
        "heldout": described(planned.jobs[0].heldout).manifest.hash,
        "losses": {job.arm: to_tree(job.config.losses) for job in planned.jobs},
        "train": to_tree(config.train),
        "left_out": dict(planned.left_out),
        "failed": {f"{arm} seed {seed}": str(error) for (arm, seed), error in outcome.failed.items()},
    }


def _decided(claim: Claim, scores: AllScores, keys: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    said = {**to_tree(claim), "seeds": 0}
    missing = next((arm for arm in (claim.better, claim.than) if not any(name == arm for name, _ in scores)), None)
    if missing is not None:
        return {**said, "verdict": f"not asked: {missing} was not run"}
    seeds = seeds_of(scores, claim.better, claim.than)
    if not seeds:
        return {**said, "verdict": "not asked: the two arms have no seed in common"}
    if keys[claim.better, seeds[0]] == keys[claim.than, seeds[0]]:
        return {**said, "verdict": f"not asked: with these caches, {claim.better} and {claim.than} are the same run"}
    over = gain(scores, claim.better, claim.than, at=claim.at, metric=claim.metric)
    return {**said, "seeds": len(seeds), **over, "verdict": verdict_on(over)}
