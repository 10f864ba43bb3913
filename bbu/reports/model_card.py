"""The model card of a checkpoint: a README.md with what is known of it when it is saved.

It depends on the config, the data, the code and the scores so far, and on no clock, host or path, so that the same
training writes the same card. A published checkpoint never changes: scores that come later are in the run's `eval/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bbu.config.flat import DirectConfig
from bbu.data.prompts import get_prompt
from bbu.errors import BBUError
from bbu.evaluation.scores import best_scores
from bbu.reports.base_model import BaseModel, describe_base_model
from bbu.run.folder import RunFolder
from bbu.run.provenance import RunStart, latest_start
from bbu.schema import read_photos_hash

_CARD = "README.md"
_ADAPTERS = (
    "This folder holds low-rank adapters, for peft; `python -m bbu.export --checkpoint DIR --merge OUT` writes a whole "
    "model."
)
_MERGED = "Its low-rank adapters are merged into the weights."
_LIBRARIES = ("library_name: peft\n", "library_name: transformers\n")
_ESSENTIALS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "vision_lr",
    "merger_lr", "llm_lr", "detection_lr", "adapter_lr", "lora_rank", "lora_alpha", "lora_dropout", "weight_decay",
    "optim", "lr_scheduler_type", "torch_dtype",
    "bf16", "fp16", "seed", "data_seed", "collator_type", "teacher_ratio", "num_teacher_samples", "language",
    "train_prompt", "eval_prompt", "response_types", "min_pixels", "max_pixels", "detection_enabled",
)  # fmt: skip
"""The config keys that a reader of the card looks for; run_config.yaml has all."""


@dataclass(frozen=True)
class _DataFile:
    """A records file that the run read."""

    name: str
    """its name in data_root"""
    records: int
    """lines, blank ones aside"""
    objects: int
    """objects in all records"""
    sha256: str | None
    """hash of its bytes; None where an older version did not take it"""
    photos_sha256: str | None
    """hash over the bytes of its photos; None for data of an older conversion"""


@dataclass(frozen=True)
class CardFacts:
    """What the cards of all checkpoints of a run share."""

    config: DirectConfig
    """the run config"""
    world_size: int
    """number of ranks"""
    base: BaseModel
    """the model that the training started from"""
    start: RunStart
    """this start of the run: code, image, packages, hashes of the data"""
    data: Sequence[_DataFile]
    """the records files"""


def gather_card_facts(run: RunFolder, config: DirectConfig, world_size: int) -> CardFacts:
    """Gather what the cards of this start share, after it was recorded in provenance.json.

    Args:
        run: the run folder.
        config: the run config; its model folder and records files are read.
        world_size: number of ranks.
    """
    start, data = latest_start(run), config.data
    paths = [Path(data.data_root) / name for name in (data.train_file, data.val_file, data.teacher_file)]
    files = [_describe_file(path, start.data_sha256.get(path.name)) for path in paths if path.is_file()]
    return CardFacts(config, world_size, describe_base_model(Path(config.model.model_path)), start, files)


def write_model_card(folder: Path, step: int, facts: CardFacts, run: RunFolder) -> None:
    """Write README.md into a checkpoint that is being saved, and the base model's licence beside it.

    Args:
        folder: the checkpoint's folder; its trainer_state.json is read.
        step: the checkpoint's step.
        facts: what all cards of the run share.
        run: the run folder, for the scores of earlier checkpoints.
    """
    sections = (
        _introduction(step, facts),
        _usage(step, facts.config),
        _scores(step, _validation_losses(folder, step), _earlier_scores(run)),
        _training(facts),
        _data(facts.data),
        _provenance(facts.start),
        f"## Licence\n\n{facts.base.licence_text}",
    )
    text = f"---\n{_front_matter(facts)}---\n\n" + "\n\n".join(sections) + "\n"
    (folder / _CARD).write_text(text, encoding="utf-8")
    for name, content in facts.base.licence_files.items():
        (folder / name).write_bytes(content)


def state_merged_adapters(folder: Path) -> None:
    """Correct the card of a checkpoint of adapters, copied into the folder of the merged model."""
    path = folder / _CARD
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(_ADAPTERS, _MERGED).replace(*_LIBRARIES, 1), encoding="utf-8")


def _describe_file(path: Path, sha256: str | None) -> _DataFile:
    records = objects = 0
    with path.open("rb") as lines:
        for line in lines:
            records += bool(line.strip())
            # Quotes inside a description are escaped, so this counts the key and nothing else.
            objects += line.count(b'"bbox_2d"')
    return _DataFile(path.name, records, objects, sha256, read_photos_hash(path))


def _earlier_scores(run: RunFolder) -> list[str]:
    """The best score of each source so far, a line each."""
    try:
        return [str(score) for score in best_scores(run).values()]
    except (
        BBUError,
        OSError,
        ValueError,
        KeyError,
    ):  # all ranks wait for this save, which a damaged score must not stop
        return ["its scores cannot be read"]


def _front_matter(facts: CardFacts) -> str:
    """The card's metadata in the words of the hub."""
    values: dict[str, Any] = {
        "language": [facts.config.data.language],
        "library_name": "peft" if facts.config.training.lora_rank else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bbu", "qwen2_5_vl", "object-detection"],
        **facts.base.licence,
    }
    if facts.base.hub_id:
        values["base_model"] = facts.base.hub_id
    return yaml.safe_dump(values, allow_unicode=True)


def _introduction(step: int, facts: CardFacts) -> str:
    head = (
        "Its detection head is in `detection_head/`, which other programs do not read."
        if facts.config.detection.detection_enabled
        else "It has no detection head."
    )
    kind = f" {_ADAPTERS}" if facts.config.training.lora_rank else ""
    return (
        f"# {_cell(facts.config.infrastructure.run_name)}, step {step}\n\n"
        f"{_cell(facts.base.name)}, fine-tuned by [bbu](#provenance) to find and describe the parts in "
        f"photos of base-band units. {head}{kind}"
    )


def _usage(step: int, config: DirectConfig) -> str:
    prompt = get_prompt(config.data.language, config.data.eval_prompt)
    return f"""## Use

With bbu, in the pixels of your photo:

```python
from bbu.inference import Qwen25VLInference

boxes, captions = Qwen25VLInference("checkpoint-{step}").predict_detection(images)
```

With transformers (4.57 or 5), vLLM and other programs that know Qwen2.5-VL, in the pixels of the resized photo:

```python
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained("checkpoint-{step}")
processor = AutoProcessor.from_pretrained("checkpoint-{step}")
system = {_python_text(prompt.system)}
instruction = {_python_text(prompt.instruction)}
messages = [
    {{"role": "system", "content": [{{"type": "text", "text": system}}]}},
    {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": instruction}}]}},
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], images=[image], return_tensors="pt")
settings = {{"do_sample": False, "repetition_penalty": {config.model.generation_repetition_penalty}}}
answer = model.generate(**inputs, **settings, max_new_tokens={config.model.generation_max_new_tokens})
```"""


def _scores(step: int, losses: Mapping[str, float], scores: Sequence[str]) -> str:
    rows = [f"- validation, {_cell(name)}: {value:.4f}" for name, value in sorted(losses.items())]
    rows += [f"- earlier checkpoint, {_cell(line)}" for line in scores]
    lines = "\n".join(rows) or "- none yet"
    return (
        f"## Scores\n\nKnown when this checkpoint was saved:\n\n{lines}\n\nScores of this checkpoint are in the run's "
        f"folder, `eval/checkpoint-{step}/*/metrics.json`, and name it by the SHA-256 of its `MANIFEST.json`; "
        f"`python -m bbu.eval --checkpoint checkpoint-{step}` makes or prints them."
    )


def _validation_losses(folder: Path, step: int) -> dict[str, float]:
    """The losses that the trainer measured on the validation set at this step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [entry for entry in history if entry["step"] == step]
    return {k: v for entry in entries for k, v in entry.items() if k.startswith("eval/") and isinstance(v, float)}


def _training(facts: CardFacts) -> str:
    flat = facts.config.as_flat()
    rows = [("ranks", str(facts.world_size))] + [(key, _plain(flat[key])) for key in _ESSENTIALS]
    return "## Training\n\nAll keys are in `run_config.yaml`.\n\n" + _table(("key", "value"), rows)


def _data(files: Sequence[_DataFile]) -> str:
    rows = [
        (f.name, str(f.records), str(f.objects), f.sha256 or "not taken", f.photos_sha256 or "not taken") for f in files
    ]
    return "## Data\n\n" + _table(("file", "records", "objects", "SHA-256", "SHA-256 of the photos"), rows)


def _provenance(start: RunStart) -> str:
    rows = [
        ("code, commit", start.commit or "not known"),
        ("code, SHA-256 of the sources", start.code_sha256),
        ("container image, SHA-256", start.image_sha256 or "none"),
        *((name, version or "not installed") for name, version in start.packages.items()),
    ]
    return "## Provenance\n\n" + _table(("what", "which"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor a line."""
    return " ".join(text.split()).replace("|", "\\|")


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _python_text(text: str) -> str:
    """The text as a literal of Python; JSON's is one."""
    return json.dumps(text, ensure_ascii=False)
