"""Numbers as people read them, and a caption and a name for everything that is shown."""

from stages.lib.analysis.names import RANKER_LABELS
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.text_features import RANKERS
from stages.lib.analysis.wording import NO_DIFFERENCE, NO_FINDING, ends, estimate, finding, number, percent


def test_numbers_have_a_real_minus_sign_and_zero_has_none():
    assert number(-0.0112, 3, signed=True) == "\N{MINUS SIGN}0.011"
    assert number(0.0112, 3, signed=True) == "+0.011"
    assert number(-0.0001, 2) == number(0.0001, 2, signed=True) == "0.00"
    assert number(12345.6, 0) == "12,346"
    assert number(0.125, None) == "0.125"


def test_intervals_and_shares():
    interval = Interval(-0.005, -0.014, 0.004)
    assert estimate(interval, 3, signed=True) == "\N{MINUS SIGN}0.005 [\N{MINUS SIGN}0.014, +0.004]"
    assert estimate(Interval(1.5, None, None), 1) == estimate(1.5, 1) == "1.5"
    assert percent(Interval(0.97, 0.853, 0.994)) == "97 % [85, 99]"
    assert percent(0.5) == percent(Interval(0.5, None, None)) == "50 %"
    assert ends(Interval(0.97, 0.853, 0.994), 0, scale=100) == "[85, 99]" and ends(Interval(1.0, None, None)) == ""


def test_a_finding_needs_an_interval_clear_of_nothing():
    assert finding(Interval(0.3, 0.1, 0.5), 0, "more", "less") == "more"
    assert finding(Interval(0.3, 0.1, 0.4), 0.5, "more", "less") == "less"
    assert finding(Interval(0.3, -0.1, 0.5), 0, "more", "less") == NO_DIFFERENCE
    assert finding(Interval(0.3, None, None), 0, "more", "less") == NO_FINDING


def test_every_ranker_has_a_name():
    assert set(RANKERS) <= set(RANKER_LABELS)
