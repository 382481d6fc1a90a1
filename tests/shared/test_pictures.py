"""What all pictures have in common: colours by name, labels apart, outliers at the edge, no trace in anybody's home."""

import itertools
import os
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest
from tide.shared.pictures import ARM_COLOURS, PALETTE, arm_colour, arm_looks, bulk, drawing, make_figure, room, spread


def test_an_arm_has_its_colour_whoever_else_is_in_the_picture():
    names = [*ARM_COLOURS, *(f"kl-max_top_k-{k}" for k in range(20))]
    alone = {name: arm_looks([name])[name]["color"] for name in names}
    for subset in (names, names[::-1], names[3:9]):
        assert {name: look["color"] for name, look in arm_looks(subset).items()} == {n: alone[n] for n in subset}
    assert arm_colour("my-own") == "#882255"  # for good: no order of arms, and no salt of this process, decides
    assert len({(look["color"], look["marker"]) for look in arm_looks(names).values()}) == len(names)


def lab(colour: str, blindness: np.ndarray) -> np.ndarray:
    """CIELAB of what a dichromat sees (Viénot, Brettel and Mollon 1999: a projection in linear RGB)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = blindness @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 1e-9, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


PROTAN = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
DEUTAN = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])


@pytest.mark.parametrize("blindness", [np.eye(3), PROTAN, DEUTAN], ids=["none", "protan", "deutan"])
def test_colours_of_the_demos_arms_stay_apart_for_the_colour_blind(blindness):
    arms = ["ce", "ce-fresh", "hard-label", "kl", "tide-hybrid", "tidal", "calm", "reverse-calm"]
    seen = [lab(ARM_COLOURS[arm], blindness) for arm in arms]
    for (one, a), (other, b) in itertools.combinations(zip(arms, seen, strict=True), 2):
        assert np.linalg.norm(a - b) > 8, (one, other)
    assert all(100 - colour[0] > 25 for colour in seen)  # seen on white


@pytest.mark.parametrize(
    "values, inside",
    [
        ([3.82, 3.83, 3.91, 3.95, 3.99, 4.75], (3.82, 3.99)),
        ([1.0, 1.1, 1.2, -9.0], (1.0, 1.2)),
        ([1, 2, 3, 4, 5, 6, 7, 8, 50, 1000], (1, 8)),
        ([-99, 1, 2, 3, 4, 5, 6, 7, 8, 99], (1, 8)),
        ([3.65, 3.70, 3.95, 4.23], (3.65, 4.23)),  # far, but no farther than the others are apart
        ([1, 2, 99], (1, 99)),  # of three, nobody knows which is the odd one
        ([1, 1, 99, 99], (1, 99)),
        ([4.0, 4.0, 4.0, 4.01], (4.0, 4.01)),
        ([5], (5, 5)),
        (list(range(40)), (0, 39)),
    ],
)
def test_outliers_are_few_and_farther_off_than_the_rest_is_wide(values, inside):
    assert bulk(values) == inside
    assert bulk(values[::-1]) == inside
    low, high = room(inside, values)
    assert low < inside[0] <= inside[1] < high


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_apart_in_order_and_as_near_as_can_be(seed):
    draw = np.random.default_rng(seed)
    places = draw.random(6).round(2).tolist()
    moved = spread(places, 0.1, 0.0, 1.0)
    order = np.argsort(places, kind="stable")
    gaps = np.diff(np.array(moved)[order])
    assert (gaps > 0.1 - 1e-9).all()
    assert min(moved) >= 0
    assert max(moved) <= 1 + 1e-9
    far = np.sum((np.array(moved) - places) ** 2)
    for _ in range(2000):  # the slow twin: no other admissible places are nearer
        other = np.sort(draw.random(6)) * 0.5 + 0.1 * np.arange(6)
        assert np.sum((other - np.array(places)[order]) ** 2) > far - 1e-9


def test_labels_that_have_room_stay_where_they_belong():
    assert spread([0.9, 0.1, 0.5], 0.1, 0, 1) == pytest.approx([0.9, 0.1, 0.5])


def test_a_picture_does_not_depend_on_anybodys_settings(tmp_path, monkeypatch):
    import matplotlib as mpl

    with drawing():
        expected = {name: mpl.rcParams[name] for name in ("font.size", "axes.grid", "savefig.dpi", "lines.linewidth")}
    with mpl.rc_context({"font.size": 40, "axes.grid": True, "lines.linewidth": 9}):
        with drawing():
            assert {name: mpl.rcParams[name] for name in expected} == expected
            assert make_figure(300, 200, "t", "n").texts[1].get_color() == PALETTE["muted"][0]
        assert mpl.rcParams["font.size"] == 40


DRAW = """
import os, sys
from tide.shared.pictures import drawing, make_figure, png_bytes
with drawing():
    figure = make_figure(300, 200, "title", "note")
    figure.add_subplot().plot([1, 2])
    sys.stdout.buffer.write(png_bytes(figure, "alt"))
assert "MPLCONFIGDIR" not in os.environ
assert "matplotlib.pyplot" not in sys.modules
"""


def test_without_a_home_that_can_be_written_a_picture_is_drawn_and_nothing_is_left_or_said(tmp_path):
    blocked, scratch = tmp_path / "blocked", tmp_path / "scratch"
    blocked.write_text("a file, in which no folder can be made")
    scratch.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    drawn = []
    for environment in ({"HOME": str(blocked)}, {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(blocked)}):
        environment = {**clean, **environment, "TMPDIR": str(scratch)}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", DRAW], capture_output=True, env=environment, check=True
        )
        assert done.stderr == b""
        assert done.stdout.startswith(b"\x89PNG")
        drawn.append(done.stdout)
    assert drawn[0] == drawn[1]
    assert list(scratch.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocked", "scratch"]


def test_in_a_home_only_tides_own_folder_is_written(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], capture_output=True, env={**environment, "HOME": str(tmp_path)}, check=True
    )
    assert done.stderr == b""
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert [name.rpartition("/")[0] for name in files] == [".cache/tide/matplotlib"]
