"""The split by site and the teacher pool."""

from __future__ import annotations

import pytest

from bbu.conversion.split import moved_sites, site_of, val_sites
from bbu.conversion.teachers import choose_teachers
from bbu.errors import DataError
from bbu.schema import BBUObject, View

SITES = [f"S{i}" for i in range(20)]


def test_site_is_the_first_group_in_the_stem_and_else_the_stem() -> None:
    assert site_of("batch/S01-0003", r"^([^-_]+)") == "S01"
    assert site_of("batch/S01-0003", r"S\d+") == "S01"
    assert site_of("batch/odd", r"^(S\d+)") == "odd"


MANY = [f"S{i}" for i in range(2000)]


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.9])
def test_many_sites_come_to_the_ratio(ratio: float) -> None:
    assert len(val_sites(MANY, ratio, 42)) / len(MANY) == pytest.approx(ratio, abs=0.03)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_no_site_moves_when_others_are_added(ratio: float, seed: int) -> None:
    for count in range(20, 60):
        fewer, more = MANY[:count], MANY[: count + 1]
        stays = set(fewer) - set(moved_sites(fewer, ratio, seed)) - set(moved_sites(more, ratio, seed))
        assert val_sites(fewer, ratio, seed) & stays == val_sites(more, ratio, seed) & stays


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_both_sides_have_a_site_however_few_there_are(count: int, ratio: float) -> None:
    for seed in range(20):
        assert 0 < len(val_sites(SITES[:count], ratio, seed)) < count
        assert len(moved_sites(SITES[:count], ratio, seed)) <= 1


def test_ratio_0_leaves_all_in_training_and_moves_none() -> None:
    assert not val_sites(SITES, 0.0, 42) and not moved_sites(SITES, 0.0, 42) and not moved_sites(["S1"], 0.0, 42)


def test_a_site_that_had_to_change_sides_is_named() -> None:
    assert moved_sites(SITES, 0.0001, 42) == sorted(val_sites(SITES, 0.0001, 42))
    assert set(moved_sites(SITES, 1.0, 42)) == set(SITES) - val_sites(SITES, 1.0, 42)


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
