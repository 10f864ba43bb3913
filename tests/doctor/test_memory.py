"""Whether a run config fits the cards that the doctor's tasks saw."""

from __future__ import annotations

import json
from pathlib import Path

from bbu.config.read import load_config
from bbu.doctor.findings import FAILURE, OK, WARNING
from bbu.doctor.memory import least_card_bytes, memory_findings
from tests.doctor.reports import task_report
from tests.models.qwen_3b import QWEN_3B

FAKE_CARD_40 = int(39.5 * 2**30)
"""Bytes of an A100 of 40 GB; no GPU is needed to compare with it."""


def statuses(folder: Path, ranks: int, card_bytes: int | None, *overrides: str) -> list[str]:
    config = load_config("base_flat", overrides=[f"model_path={folder}", *overrides])
    return [finding.status for finding in memory_findings(config, ranks, card_bytes)]


def test_a_config_is_compared_with_the_smallest_card(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B), encoding="utf-8")
    sizes = (80 * 2**30, FAKE_CARD_40)
    reports = {rank: task_report(rank, "n1", {"reduced": {"gpu_bytes": size}}) for rank, size in enumerate(sizes)}
    assert least_card_bytes(reports) == FAKE_CARD_40 and least_card_bytes({}) is None
    assert statuses(tmp_path, 8, FAKE_CARD_40) == [OK, OK]
    assert statuses(tmp_path, 8, None) == [OK]
    assert statuses(tmp_path, 1, FAKE_CARD_40) == [OK, FAILURE]
    assert statuses(tmp_path, 8, FAKE_CARD_40, "gradient_checkpointing=false") == [OK, WARNING]


def test_without_a_model_or_with_a_contradiction_it_says_so(tmp_path: Path):
    assert statuses(tmp_path, 8, None) == [WARNING]
    zero3 = "deepspeed_config=configs/deepspeed/zero3.json"
    assert statuses(tmp_path, 8, None, zero3) == [FAILURE]  # logits_chunk_size with ZeRO-3
