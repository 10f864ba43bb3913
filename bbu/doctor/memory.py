"""Does a run config fit the GPUs that a profile requests?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bbu.config.deepspeed import check_deepspeed
from bbu.config.flat import DirectConfig
from bbu.doctor.findings import Finding, failure, ok, warning
from bbu.doctor.report import TaskReport, reduced_of
from bbu.errors import ConfigError, ModelError
from bbu.models.dimensions import read_dimensions
from bbu.training.memory import GB, check_card, describe_memory, estimate_memory


def least_card_bytes(reports: Mapping[int, TaskReport]) -> int | None:
    """Return the memory of the smallest card that the tasks saw; None where they saw none."""
    sizes = [facts.gpu_bytes for facts in reduced_of(list(reports.values())) if facts.gpu_bytes is not None]
    return min(sizes, default=None)


def memory_findings(config: DirectConfig, ranks: int, card_bytes: int | None) -> Iterator[Finding]:
    """Estimate what a training needs, and compare it with the cards.

    Args:
        config: the run config.
        ranks: number of ranks, one a card.
        card_bytes: memory of the smallest card; None where it is not known.
    """
    try:
        if config.infrastructure.deepspeed_enabled:
            check_deepspeed(config)
        dimensions = read_dimensions(config.model.model_path)
        if dimensions is None:
            where = f"there is no config.json in {config.model.model_path}"
            yield warning(f"the memory of a training is not estimated: {where}", "copy the model there")
            return
        estimate = estimate_memory(config, dimensions, ranks)
        yield ok(describe_memory(estimate))
        if card_bytes is None:
            return
        if problem := check_card(estimate, card_bytes, config):
            yield warning(*_split_remedy(problem))
        else:
            yield ok(f"that fits the cards of {card_bytes / GB:.1f} GB")
    except (ConfigError, ModelError) as error:
        yield failure(*_split_remedy(str(error)))


def _split_remedy(text: str) -> tuple[str, str]:
    """The errors of this project end with what to do, after a semicolon."""
    what, _, remedy = text.rpartition("; ")
    return (what, remedy) if what else (text, "correct the config")
