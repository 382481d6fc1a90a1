"""The picture of a comparison: bits per byte of every arm with each seed, then bits and top-1 accuracy by time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw_comparison(result: Mapping[str, Any], path: Path, *, colours: Sequence[str], title: str) -> None:
    """Draw what `comparison.summarise` made, as PNG.

    Args: colours: arms in the order in which they get theirs, so that an arm looks the same in every picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    arms = sorted(result["arms"].items(), key=lambda item: -item[1]["bits_per_byte"])
    figure, axes = plt.subplots(
        1, 3, figsize=(13, max(4.2, 0.36 * len(arms) + 1.2)), width_ratios=[1.15, 1, 1], layout="constrained"
    )
    colour = {name: plt.colormaps["tab20" if len(colours) > 10 else "tab10"](i) for i, name in enumerate(colours)}
    for place, (name, arm) in enumerate(arms):
        axes[0].barh(place, arm["bits_per_byte"], xerr=arm["standard_error"], color=colour[name], alpha=0.75)
        axes[0].plot(arm["seeds"], [place] * len(arm["seeds"]), "k|", markersize=9)
        axes[0].text(max(arm["seeds"]), place, f"  {arm['bits_per_byte']:.3f}", va="center", fontsize=9)
        axes[1].plot(result["t"], arm["bits_per_byte_by_t"], "o-", color=colour[name], markersize=4)
        shares = np.array(arm["accuracy_by_t"]) * 100
        axes[2].plot(result["t"], shares, "o-", color=colour[name], label=name, markersize=4)
    values = [arm["bits_per_byte"] for _, arm in arms]
    axes[0].set_yticks(range(len(arms)), [name for name, _ in arms])
    margin = 0.35 * (max(values) - min(values) + 0.02)
    axes[0].set_xlim(min(values) - margin, max(values) + margin)
    axes[0].set_xlabel("bits per byte on unseen documents (less is better)")
    axes[1].set_xlabel("diffusion time t (share of tokens masked)")
    axes[1].set_ylabel("bits per byte")
    axes[2].set_xlabel("diffusion time t")
    axes[2].set_ylabel("top-1 accuracy, %")
    many = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(arms) > 8 else {}  # would cover the lines
    axes[2].legend(fontsize=8, reverse=True, **many)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
