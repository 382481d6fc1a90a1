"""The table and the picture of a comparison of students, from what `comparison.summarise` made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shared.cache.files import atomic_write
from ..shared.pictures import arm_looks, bulk, drawing, label_ends, make_figure, mark_outliers, png_bytes, room
from ..shared.shown_text import markdown_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
            shown = f"{saved} | {wins} | {_p(over['p'])} | {z_text(over['z'])}"
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


def draw(result: Mapping[str, Any], path: Path, title: str = "One variable at a time") -> None:
    """Write the picture of a comparison as PNG, with what it says in words."""
    best, arm = min(result["arms"].items(), key=lambda item: item[1]["bits_per_byte"])
    alt = (
        f"{title}. Bits per byte of {len(result['arms'])} kinds of students, then bits per byte and top-1 accuracy by "
        f"diffusion time. Best: {best} with {arm['bits_per_byte']:.3f} bits per byte."
    )
    with drawing():
        atomic_write(path, png_bytes(comparison_figure(result, title), alt))


def comparison_figure(result: Mapping[str, Any], title: str) -> "Figure":
    """Bits per byte of the arms, best first, with each seed; then bits and top-1 accuracy by diffusion time."""
    arms = dict(sorted(result["arms"].items(), key=lambda item: item[1]["bits_per_byte"]))
    numbers, bits = [len(arm["seeds"]) for arm in arms.values()], [arm["bits_per_byte"] for arm in arms.values()]
    seeds = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    note = f"{result['documents']} unseen documents. " + (
        f"Large dots: mean of {seeds} seeds; bars: plus and minus one standard error of it; small dots: each seed."
        if max(numbers) > 1 else "One seed, so no interval: nobody knows how far another seed would be from it."
    )  # fmt: skip
    if bulk(bits) != (min(bits), max(bits)):
        note += " Arrows: far off the axis, at the value beside them."
    looks = arm_looks(list(arms))
    figure = make_figure(1000, max(270, 60 + 21 * len(arms)), title, note)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    _draw_dots(left, arms, looks)
    for axes, key, scale, y_label in (
        (middle, "bits_per_byte_by_t", 1, "bits per byte"), (right, "accuracy_by_t", 100, "top-1 accuracy, %"),
    ):  # fmt: skip
        _draw_lines(axes, result["t"], {name: [scale * v for v in arm[key]] for name, arm in arms.items()}, looks)
        axes.set_title(y_label, loc="left", fontsize=11)
    return figure


def _draw_dots(axes: "Axes", arms: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    """A row per arm: seeds, their mean and its interval; one far from all others is an arrow at the edge."""
    low, high = bulk([arm["bits_per_byte"] for arm in arms.values()])
    inside = [arm for arm in arms.values() if low <= arm["bits_per_byte"] <= high]
    reach = [arm["bits_per_byte"] + side * (arm["standard_error"] or 0) for arm in inside for side in (-1, 1)]
    axes.set_xlim(*room([*reach, *(bits for arm in inside for bits in arm["seeds"])], reach))
    for row, (name, arm) in enumerate(arms.items()):
        look, value = looks[name], arm["bits_per_byte"]
        if arm in inside:
            if len(arm["seeds"]) > 1:
                axes.plot(arm["seeds"], [row] * len(arm["seeds"]), "o", color=look["color"], markersize=3.5, alpha=0.55)
            axes.errorbar(value, row, xerr=arm["standard_error"], markersize=8, elinewidth=2.2, **look)
        else:
            edge, marker = (axes.get_xlim()[1], ">") if value > high else (axes.get_xlim()[0], "<")
            axes.plot(edge, row, marker, color=look["color"], markersize=9, clip_on=False)
        axes.text(1.04, row, f"{value:.3f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9.5,
                  fontweight="normal" if arm in inside else "bold")  # fmt: skip
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks(range(len(arms)), list(arms))
    for label, look in zip(axes.get_yticklabels(), looks.values(), strict=True):
        label.set_color(look["color"])
    axes.grid(axis="x")
    axes.set_title("bits per byte (less is better)", loc="left", fontsize=11)


def _draw_lines(
    axes: "Axes", t: Sequence[float], lines: Mapping[str, Sequence[float]], looks: Mapping[str, Any]
) -> None:
    low, high = bulk([sum(line) / len(line) for line in lines.values()])
    inside = [value for line in lines.values() for value in line if low <= sum(line) / len(line) <= high]
    axes.set_ylim(*room(inside, [value for line in lines.values() for value in line]))
    for name, line in reversed(list(lines.items())):  # the best on top
        axes.plot(t, line, linewidth=1.6, markersize=4.5, **looks[name])
        mark_outliers(axes, zip(t, line, strict=True), looks[name]["color"])
    axes.set_xticks(t)
    axes.grid(axis="y")
    axes.set_xlabel("diffusion time t (share of tokens masked)")
    label_ends(axes, {name: (t[-1], line[-1]) for name, line in lines.items()},
               {name: look["color"] for name, look in looks.items()})  # fmt: skip


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def z_text(value: float | None) -> str:
    """A z value; "" where there is none."""
    return "" if value is None else f"{value:+.1f}"
