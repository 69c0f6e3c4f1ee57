"""Tests numbers and lists as text for readers."""

from __future__ import annotations

import pytest

from datm_ray.config import parse_bytes
from datm_ray.words import counted, data_size, dimensions, duration, listed, one_line, percent

MIB, GIB = 2**20, 2**30


def test_a_count_has_its_noun_in_the_plural_unless_it_is_one() -> None:
    """Nouns get their plural for every number but 1, also for a share; thousands are separated."""
    assert [counted(number, "image") for number in (0, 1, 2, 1234, 0.5)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,234 images",
        "0.5 images",
    ]
    assert [counted(2, noun) for noun in ("class", "box", "epoch")] == ["2 classes", "2 boxes", "2 epochs"]
    assert counted(4.0, "CPU") == "4 CPUs"


def test_durations_are_shown_in_units_that_people_use() -> None:
    """Durations are in seconds, minutes, hours or days, at most two of them, and in fractions only below ten."""
    shown = {
        0: "0 s",
        0.42: "0.4 s",
        4: "4 s",
        9.97: "10 s",
        95.4: "95 s",
        119.6: "2 min",
        150: "2.5 min",
        720: "12 min",
        3569: "59 min",
        3599: "1 h",
        3900: "1 h 5 min",
        172_799: "2 days",
        273_600: "3 days 4 h",
        86_400 * 1500: "1,500 days",
    }
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_sizes_of_data_have_three_digits_and_can_be_given_back() -> None:
    """Sizes are in the largest unit that leaves 1 or more, and options such as --memory read them."""
    shown = {
        0: "0 B",
        1023: "1023 B",
        1536: "1.5 KiB",
        310 * MIB: "310 MiB",
        3.25 * GIB: "3.25 GiB",
        8 * GIB: "8 GiB",
        12.34 * GIB: "12.3 GiB",
        5000 * GIB: "4.88 TiB",
        2**60: "1024 PiB",
    }
    assert {size: data_size(size) for size in shown} == shown
    for size, text in shown.items():
        assert not size or parse_bytes(text) == pytest.approx(size, rel=0.005), text


def test_lists_end_in_and_or_in_the_number_of_the_others() -> None:
    """A list reads as in a sentence; a limit names the first ones and counts the others."""
    names = ["a", "b", "c"]
    assert [listed(names[:number]) for number in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert [listed(names, most) for most in (1, 2, 3)] == ["a and 2 more", "a, b and 1 more", "a, b and c"]
    assert listed((name for name in "abcd"), 3) == "a, b, c and 1 more"


def test_shapes_shares_and_lines() -> None:
    """Shapes are joined by x, shares have two or three digits, and a line hides no control character."""
    assert dimensions((3, 32, 32)) == "3x32x32"
    assert [percent(share).replace("\xa0", " ") for share in (0.0012, 0.456, 1)] == ["0.12 %", "45.6 %", "100 %"]
    assert one_line(" a\r\n  b\x1b[1m ") == r"a b\x1b[1m"
