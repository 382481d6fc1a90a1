"""The table and the picture of an ablation, from the content of ablation.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..shared.shown_text import markdown_text
from .comparison_plot import draw_comparison


def table(result: Mapping[str, Any]) -> str:
    """A row per arm: mean and standard error over seeds, and the difference from the baseline, paired by seed."""
    base, grid = result["baseline"], " | ".join(f"t = {t:g}" for t in result["t"])
    lines = [
        f"| arm | bits per byte | gain over {base} | seeds | p | z | {grid} | top-1 |",
        "|---|" + "---|" * (6 + len(result["t"])),
    ]
    for name, arm in sorted(result["arms"].items(), key=lambda item: item[1]["bits_per_byte"]):
        over = arm["against"].get(base)
        shown = "| | | "
        if over and over["gain"] is not None:
            wins = f"{sum(value > 0 for value in over['gain_by_seed'])} of {len(over['gain_by_seed'])}"
            saved = _with_error(over["gain"], over["standard_error"], sign="+")
            shown = f"{saved} | {wins} | {_p(over['p'])} | {_z(over['z'])}"
        by_t = " | ".join(f"{value:.3f}" for value in arm["bits_per_byte_by_t"])
        bits = _with_error(arm["bits_per_byte"], arm["standard_error"])
        lines.append(f"| {name} | {bits} | {shown} | {by_t} | {100 * arm['accuracy']:.1f} % |")
    return "\n".join(lines)


def claims_table(result: Mapping[str, Any]) -> str:
    """A row per claim: which arms decide it, by how much, and whether it holds."""
    lines = ["| claim | arms | gain | p | verdict |", "|---|---|---|---|---|"]
    for claim in result["claims"]:
        arms = f"{claim['better']} over {claim['than']}"
        if claim["at"]:
            arms += f" at t = {', '.join(f'{t:g}' for t in claim['at'])}"
        shown = ""
        if claim.get("gain") is not None:
            scale, unit = (100, " % right") if claim["metric"] == "accuracy" else (1, "")
            error = claim["standard_error"]
            shown = _with_error(scale * claim["gain"], error and scale * error, sign="+") + unit
        said = markdown_text(claim["claim"], max_chars=200)
        lines.append(f"| {said} | {arms} | {shown} | {_p(claim.get('p'))} | {claim['verdict']} |")
    return "\n".join(lines)


def missing(result: Mapping[str, Any]) -> str:
    """A line for every arm that was left out and every student that could not be trained, with the reason; "": none."""
    said = [f"left out: {name} {why}" for name, why in result["left_out"].items()]
    said += [f"not trained: {name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(f"- {markdown_text(line, max_chars=1000)}" for line in said)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bits per byte of the arms, and gains over the baseline and top-1 accuracy by diffusion time."""
    num = len(result["seeds"])
    draw_comparison(
        result, path, colours=list(result["losses"]),
        title=f"One variable at a time: {num} seed{'s' * (num != 1)}, {result['documents']} held-out documents",
    )  # fmt: skip


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _z(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"
