"""Means over groups, their intervals, and differences of two methods on the same groups."""

from __future__ import annotations

import pytest

from easyref_core.evaluation.statistics import by_group, difference, estimate, paired_difference


def share(part: float, count: int = 200) -> list[float]:
    """So large a part of ones, spread evenly."""
    return [float((n + 1) * part // 1 > n * part // 1) for n in range(count)]


def test_the_interval_contains_the_mean_and_shrinks_with_more_groups() -> None:
    few, many = estimate(share(0.5, 40)), estimate(share(0.5, 4000))
    assert few.low < few.value == 0.5 < few.high
    assert 0.2 < few.high - few.low < 0.4
    assert many.high - many.low < 0.04
    assert (few.count, many.count) == (40, 4000)
    assert estimate(share(0.5, 40)) == few
    sure = estimate([1.0] * 10)
    assert (sure.low, sure.high) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no score"):
        estimate([])


def test_differences_are_taken_group_by_group() -> None:
    ones = share(0.5, 400)
    better = [min(1.0, score + 0.5) for score in ones]
    paired = difference(better, ones)
    assert paired.value == 0.25
    assert paired.high - paired.low < estimate(ones).high - estimate(ones).low
    with pytest.raises(ValueError, match="zip"):
        difference(ones, ones[1:])


def test_groups_that_look_the_same_are_resampled_together() -> None:
    scores = share(0.5, 100)
    twice = [score for score in scores for _ in range(2)]
    apart, together = estimate(twice), estimate(twice, [n // 2 for n in range(200)])
    assert (together.value, together.count) == (apart.value, apart.count) == (0.5, 200)
    assert together.high - together.low > 1.3 * (apart.high - apart.low)
    assert estimate(scores, range(100)) == estimate(scores)


def test_a_group_of_many_images_counts_as_much_as_one_of_few() -> None:
    found = by_group(["b", "a", "b", "b"], [1.0, 0.0, 0.0, 0.5])
    assert found == {"b": 0.5, "a": 0.0}
    assert list(found) == ["b", "a"]
    assert estimate(list(found.values())).value == 0.25
    with pytest.raises(ValueError, match="zip"):
        by_group(["a"], [])


def test_methods_are_compared_on_the_groups_that_both_have() -> None:
    first = {"a": 0.9, "b": 0.5, "failed in the other": 1.0}
    second = {"b": 0.4, "failed here": 0.0, "a": 0.8}
    found = paired_difference(first, second)
    assert found is not None
    assert found.count == 2
    assert found.low == pytest.approx(0.1) == found.high == found.value
    assert paired_difference(first, {"z": 1.0}) is None
