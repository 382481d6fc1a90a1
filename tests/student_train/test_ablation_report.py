"""The picture of a comparison: what stands where, read from the figure's artists."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from tide.shared.pictures import ARM_COLOURS, arm_colour, drawing
from tide.student_train.ablation_report import comparison_figure, draw
from tide.student_train.matrix import read_matrix

T = [0.1, 0.5, 0.9]


def compared(bits: dict[str, list[float]]) -> dict:
    """A result with these bits per byte of each seed; at each t a little more."""
    arms = {}
    for name, seeds in bits.items():
        mean, error = np.mean(seeds), np.std(seeds, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else None
        arms[name] = {
            "bits_per_byte": float(mean), "standard_error": error, "seeds": seeds,
            "bits_per_byte_by_t": [mean - 0.1, mean, mean + 0.1], "accuracy_by_t": [0.3, 0.2, 0.1],
        }  # fmt: skip
    return {"arms": arms, "t": T, "seeds": [1, 2], "documents": 7}


ARMS = {"ce": [3.9, 4.0], "kl": [3.5, 3.7], "calm": [3.8, 3.84], "tidal": [3.75, 3.79], "mine": [3.6, 3.8]}


def figure_of(bits: dict[str, list[float]]):
    with drawing():
        figure = comparison_figure(compared(bits), "Title")
        figure.draw_without_rendering()
    return figure


def test_dots_intervals_and_seeds_are_where_the_numbers_say():
    left = figure_of(ARMS).axes[0]
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert rows == ["kl", "mine", "tidal", "calm", "ce"]  # best first,
    assert left.get_ylim()[0] > left.get_ylim()[1]  # at the top
    assert len(left.containers) == len(ARMS)
    for row, container in enumerate(left.containers):
        seeds = ARMS[rows[row]]
        dot, _, (interval,) = container.lines
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (pytest.approx(np.mean(seeds)), row)
        error = abs(seeds[1] - seeds[0]) / 2
        ends = interval.get_segments()[0]
        assert ends[:, 0] == pytest.approx([np.mean(seeds) - error, np.mean(seeds) + error])
        assert any(line.get_xdata().tolist() == seeds and set(line.get_ydata()) == {row} for line in left.lines
                   if len(line.get_xdata()) == 2)  # fmt: skip
    assert [text.get_text() for text in left.texts] == ["3.600", "3.700", "3.770", "3.820", "3.950"]


def test_an_arm_has_its_colour_in_every_panel_and_every_picture():
    for bits in (ARMS, dict(list(ARMS.items())[1:3])):
        left, middle, right = figure_of(bits).axes
        labels = {label.get_text(): to_hex(label.get_color()) for label in left.get_yticklabels()}
        assert labels == {name: arm_colour(name) for name in labels}
        for axes in (middle, right):
            assert {text.get_text(): to_hex(text.get_color()) for text in axes.texts} == labels
            drawn = {to_hex(line.get_color()) for line in axes.lines if len(line.get_xdata()) == len(T)}
            assert drawn == set(labels.values())


@pytest.mark.parametrize("name", ["paper", "demo"])
def test_arms_that_tide_ships_have_colours_of_their_own(name):
    assert set(read_matrix(name).arms) <= set(ARM_COLOURS)
    assert len(set(ARM_COLOURS.values())) == len(ARM_COLOURS)


def test_lines_are_named_at_their_ends_and_no_name_lies_on_another():
    many = {f"arm-{number}": [3.5 + number / 1000, 3.6] for number in range(16)}
    figure = figure_of(many)
    for axes in figure.axes[1:]:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 16
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])
            assert box.x0 > axes.get_window_extent().x1
            assert box.x1 <= figure.bbox.x1


def test_an_outlier_is_an_arrow_with_its_value_and_squeezes_nothing():
    left, middle, _ = figure_of({**ARMS, "hard-label": [9.0, 9.2]}).axes
    assert left.get_xlim()[1] < 4.2
    (arrow,) = [line for line in left.lines if line.get_marker() == ">"]
    assert (arrow.get_xdata()[0], arrow.get_ydata()[0]) == (left.get_xlim()[1], 5)
    assert left.texts[-1].get_text() == "9.100"
    assert middle.get_ylim()[1] < 4.3
    arrows = [line for line in middle.lines if line.get_marker() == "^"]
    assert [line.get_xdata()[0] for line in arrows] == T
    assert {line.get_ydata()[0] for line in arrows} == {middle.get_ylim()[1]}
    assert {"9.00", "9.10", "9.20"} <= {text.get_text() for text in middle.texts}
    assert "Arrows: far off the axis" in figure_of({**ARMS, "hard-label": [9.0, 9.2]}).texts[1].get_text()


@pytest.mark.parametrize(
    "bits, said",
    [
        (ARMS, "7 unseen documents. Large dots: mean of 2 seeds; bars: plus and minus one standard error of it; small "
               "dots: each seed."),
        ({"ce": [4.0], "kl": [3.9, 3.8, 3.7]}, "mean of 1 to 3 seeds"),
        ({"ce": [4.0], "kl": [3.9]}, "One seed, so no interval"),
    ],
)  # fmt: skip
def test_seeds_and_intervals_are_explained_in_the_picture(bits, said, tmp_path):
    title, *note = (text.get_text() for text in figure_of(bits).texts)
    assert title == "Title"
    assert said in " ".join(note)
    assert "Arrows" not in " ".join(note)
    draw(compared(bits), tmp_path / "one.png")
    draw(compared(bits), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert "Best: kl with 3." in Image.open(tmp_path / "one.png").text["Description"]
