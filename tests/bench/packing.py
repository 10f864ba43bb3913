"""Packed rows of 8,192 tokens: how full they are, how evenly steps load the ranks, and how long the plan takes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from statistics import mean

from bbu.data.packing import PackingBatchSampler, SampleCost, _best_fit_decreasing
from bbu.data.sampling import epoch_order
from tests.bench._results import Row

ROW, SEED = 8192, 7
SYSTEM, QUESTION, OBJECT = 290, 278, 42
"""Tokens of the system prompt, of a turn's instruction, and of an object in an answer, so that a sample of four objects
in a photo of 532x728 has about 1,230."""
VISION_WEIGHT = 0.25
CASES = (
    (1_000, 1, "99 %"),
    (1_000, 8, "97.5 %"),
    (1_000, 64, ""),
    (10_000, 1, "99 %"),
    (10_000, 8, ""),
    (10_000, 64, ""),
)
"""(samples, ranks, least share of the rows' tokens that is filled)"""


def run() -> list[Row]:
    return [row for case in CASES for row in measure(*case)]


def measure(samples: int, ranks: int, limit: str) -> list[Row]:
    draws = [measure_draw(samples, ranks, draw) for draw in range(10_000 // samples)]
    ours, bound, seconds, first, best, our_wait, their_wait = (mean(values) for values in zip(*draws, strict=True))
    size = f"{samples:,} samples on {ranks} ranks"
    text, remark = f"{ours:.1%} in {seconds:.2f} s", f"no plan of whole steps fills more than {bound:.1%}"
    rows = [
        Row(f"rows filled, {size}", text, f"first fit {first:.1%}", ours / first, limit, remark),
        Row(f"rows filled, {size}", text, f"best-fit-decreasing {best:.1%}", ours / best, limit, remark),
    ]
    if ranks == 1:
        return [*rows, ten_epochs(samples)]
    ratio = their_wait / max(our_wait, 1e-4)
    return [*rows, Row(f"ranks wait, {size}", f"{our_wait:.1%}", f"first fit {their_wait:.1%}", ratio, "")]


def measure_draw(samples: int, ranks: int, draw: int) -> tuple[float, ...]:
    """Our share, the greatest possible share, our seconds, the shares of the peers, our and first fit's waiting."""
    costs = draw_costs(samples, draw)
    start = time.process_time()
    steps = plan_of(lambda epoch: costs, ranks, epochs=1).steps_of(0)
    seconds = time.process_time() - start
    check_plan(steps, costs)
    total = sum(cost.tokens for cost in costs) / ROW
    bound = total / (math.ceil(total / ranks) * ranks)
    first, best = peer_plans(costs, ranks)
    shares = filled(first, costs), filled(best, costs)
    return filled(steps, costs), bound, seconds, *shares, waiting(steps, costs), waiting(first, costs)


def ten_epochs(samples: int) -> Row:
    """All epochs get the rows of the epoch with the most, because teachers change the lengths."""
    costs = [draw_costs(samples, epoch) for epoch in range(10)]
    start = time.process_time()
    plan = plan_of(lambda epoch: costs[epoch], 1, epochs=10)
    seconds = time.process_time() - start
    tokens = [sum(cost.tokens for cost in epoch) for epoch in costs]
    share = sum(tokens) / 10 / ROW / len(plan)
    bound = sum(tokens) / 10 / ROW / math.ceil(max(tokens) / ROW)
    text = f"no plan of equally many rows fills more than {bound:.1%}"
    return Row(f"rows filled, {samples:,} samples, ten epochs", f"{share:.1%} in {seconds:.2f} s", "", None, "", text)


def draw_costs(samples: int, epoch: int) -> list[SampleCost]:
    """Costs as of the real photos: mostly 532x728, median 4 objects, at most 26, a worked example for 70 %."""
    students, teachers = draw_views(samples, "students"), draw_views(80, "teachers")
    rng = random.Random(f"{SEED}/{epoch}")
    costs = []
    for tokens, patches in students:
        extra = rng.choice(teachers) if rng.random() < 0.7 else (0, 0)
        costs.append(SampleCost(SYSTEM + tokens + extra[0], patches + extra[1]))
    return costs


def draw_views(count: int, name: str) -> list[tuple[int, int]]:
    """(tokens, patches) of turns."""
    rng = random.Random(name)
    views = []
    for _ in range(count):
        placeholders = 494 if rng.random() < 0.55 else rng.randint(420, 504)
        objects = min(26, max(1, round(rng.lognormvariate(math.log(4), 0.68))))
        answer = sum(round(rng.gauss(OBJECT, 5)) for _ in range(objects))
        views.append((QUESTION + placeholders + answer, 4 * placeholders))
    return views


def plan_of(costs: Callable[[int], Sequence[SampleCost]], ranks: int, epochs: int) -> PackingBatchSampler:
    return PackingBatchSampler(
        costs, epochs=lambda rows: epochs, max_total_length=ROW, buffer_size=512, vision_weight=VISION_WEIGHT,
        seed=SEED, shuffle=True, world_size=ranks,
    )  # fmt: skip


def peer_plans(costs: Sequence[SampleCost], ranks: int) -> list[list[list[list[int]]]]:
    """First fit, which one would otherwise write, and best-fit-decreasing, which trl packs by."""
    order = epoch_order(len(costs), SEED, 0, True)
    tokens = [cost.tokens for cost in costs]
    plans = first_fit(tokens, order), _best_fit_decreasing(tokens, order, ROW)
    return [[rows[at : at + ranks] for at in range(0, len(rows), ranks)] for rows in plans]


def first_fit(tokens: Sequence[int], order: Sequence[int]) -> list[list[int]]:
    """Rows in order of arrival: a sample joins the first row that has space for it."""
    rows: list[list[int]] = []
    spaces: list[int] = []
    for index in order:
        row = next((number for number, space in enumerate(spaces) if space >= tokens[index]), len(rows))
        if row == len(rows):
            rows.append([])
            spaces.append(ROW)
        rows[row].append(index)
        spaces[row] -= tokens[index]
    return rows


def check_plan(steps: Sequence[Sequence[Sequence[int]]], costs: Sequence[SampleCost]) -> None:
    rows = [row for step in steps for row in step]
    assert set(index for row in rows for index in row) == set(range(len(costs))), "a sample is missing"
    assert all(sum(costs[index].tokens for index in row) <= ROW for row in rows), "a row is too long"


def filled(steps: Sequence[Sequence[Sequence[int]]], costs: Sequence[SampleCost]) -> float:
    """Share of the tokens that all rows can hold which is filled, with empty rows for ranks that go without."""
    rows = len(steps) * max(len(step) for step in steps)
    return sum(cost.tokens for cost in costs) / (rows * ROW)


def waiting(steps: Sequence[Sequence[Sequence[int]]], costs: Sequence[SampleCost]) -> float:
    """Share of the ranks' time that is spent waiting for the slowest of each step."""
    ranks = max(len(step) for step in steps)
    weights = [cost.tokens + VISION_WEIGHT * cost.patches for cost in costs]
    slowest = sum(max(sum(weights[index] for index in row) for row in step) for step in steps)
    return 1 - sum(weights) / (slowest * ranks)
