"""The split by site and the teacher pool."""

from __future__ import annotations

import pytest

from bbu.conversion.split import site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.errors import DataError
from bbu.schema import BBUObject, View

SITES = [f"S{i}" for i in range(20)]


def test_site_is_the_first_group_in_the_stem_and_else_the_stem() -> None:
    assert site_of("batch/S01-0003", r"^([^-_]+)") == "S01"
    assert site_of("batch/S01-0003", r"S\d+") == "S01"
    assert site_of("batch/odd", r"^(S\d+)") == "odd"


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.01, 1), (0.25, 5), (0.99, 19), (1.0, 19)])
def test_share_of_sites_with_at_least_one_on_each_side(ratio: float, count: int) -> None:
    assert len(val_sites(SITES, ratio, 42)) == count


def test_split_depends_on_seed_and_not_on_order() -> None:
    assert val_sites(SITES, 0.25, 1) == val_sites(reversed(SITES * 2), 0.25, 1) != val_sites(SITES, 0.25, 2)


def test_single_site_cannot_be_split() -> None:
    with pytest.raises(DataError, match="site_pattern"):
        val_sites(["S1"], 0.1, 42)


def view(name: str, *labels: str) -> View:
    return View((name,), tuple(BBUObject((0, 0, 1, 1), label) for label in labels), 28, 28)


def test_teachers_cover_the_labels_with_short_answers_first() -> None:
    views = [view("long", *"aaaaab"), view("short", *"ab"), view("c", "c"), view("none")]
    assert [v.images[0] for v in choose_teachers(views, 2, 0)] == ["short", "c"]


def test_pool_goes_on_when_everything_was_shown_and_ends_with_the_photos() -> None:
    views = [view("1", "a"), view("2", "a"), view("none")]
    assert sorted(v.images[0] for v in choose_teachers(views, 9, 0)) == ["1", "2"]
    assert choose_teachers(views, 0, 0) == []
