"""Charts: valid SVG in the page's colours, safe with any name, honest averages."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark3d.reports.curves import (
    MOST_POINTS,
    VARIABLES,
    Curve,
    Scores,
    box_chart,
    line_chart,
    moving_average,
    pair_chart,
)


def checked(svg: str) -> ET.Element:
    """Parse the chart; no stand-in colour may be left in it."""
    assert not any(colour in svg for colour in VARIABLES)
    return ET.fromstring(svg)


def test_a_line_chart_is_one_svg_in_the_colours_of_the_page():
    curve = Curve("a", range(3000), np.random.default_rng(0).random(3000).tolist(), colour=2)
    svg = line_chart([curve], "loss & more")
    root = checked(svg)
    assert root.get("aria-label") == "loss & more"
    assert "var(--run-2)" in svg
    assert "var(--run-0)" not in svg
    assert "font-family" not in svg
    longest = max(
        len(p.get("d", "").split("L")) for p in root.iter("{http://www.w3.org/2000/svg}path")
    )
    assert longest <= MOST_POINTS + 1


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [1.0], [1.0, math.inf, 2.0]])
def test_gaps_and_short_curves_are_drawn_without_a_fuss(values):
    checked(line_chart([Curve("a", range(len(values)), values)], "loss"))


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60),
    width=st.integers(1, 70),
)
def test_the_moving_average_is_the_mean_of_the_neighbours_there_are(values, width):
    array = np.array(values)
    expected = [array[max(i - width, 0) : i + width + 1].mean() for i in range(len(array))]
    np.testing.assert_allclose(moving_average(array, width), expected, atol=1e-6)


def test_boxes_and_pairs_take_any_name_and_missing_values():
    names = ["<b>liver</b>", "a $x_1$ & b", "ö"]
    runs = [Scores(run, {n: [0.1 * i, math.nan, 0.5] for i, n in enumerate(names)}) for run in "ab"]
    runs[0].groups[names[0]][:] = [math.nan] * 3  # type: ignore[index]
    text = "".join(checked(box_chart(runs, "Dice", (0, 1))).itertext())
    assert all(name in text for name in names)
    first = {"x": 0.5, "y": math.nan, "only first": 0.1, "z": 0.2}
    text = "".join(checked(pair_chart(first, {"x": 0.6, "y": 0.5, "z": 0.1}, "Dice")).itertext())
    assert "only first" not in text
    assert "y" not in text.split()
    checked(pair_chart({}, {}, "Dice"))
