"""Runs a training to its first optimizer step, prints what that took as JSON, and leaves.

    python -m tests.bench._first_step START ours SETTING…
    python -m tests.bench._first_step START plain SETTING…

START is the time of day in seconds at which the process was started. `plain` is a script as one would write it without
this project: transformers.Trainer, records read with json, samples built as they are needed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(start: str, which: str, *settings: str) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def leave(*_: object) -> None:
        print(json.dumps({"wall": time.time() - float(start), "cpu": time.process_time()}), flush=True)
        os._exit(0)

    register_optimizer_step_post_hook(leave)
    if which == "ours":
        from bbu.train import main as train

        train(["--config", "smoke", *(part for setting in settings for part in ("--set", setting))])
    else:
        train_plainly(settings)


def train_plainly(settings: tuple[str, ...]) -> None:
    import torch
    from torch.utils.data import Dataset
    from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

    from bbu.config.read import load_config
    from bbu.data.collators import StandardDataCollator
    from bbu.data.dataset import SampleBuilder
    from bbu.data.prompts import get_prompt
    from bbu.models.qwen import load_image_processor, load_tokenizer
    from bbu.schema import parse_record
    from tests.bench._stock_sft import MODEL_INPUTS

    config = load_config("smoke", overrides=settings)
    data, source = config.data, config.model.model_path
    tokenizer = load_tokenizer(source)
    builder = SampleBuilder(data, tokenizer, load_image_processor(source), get_prompt(data.language, data.train_prompt))
    records = [json.loads(line) for line in (Path(data.data_root) / data.train_file).open(encoding="utf-8")]

    class Records(Dataset):
        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int) -> object:
            return builder.build(str(index), parse_record(json.dumps(records[index]), str(index)).student)

    torch.set_num_threads(config.infrastructure.cpu_threads)
    pad = StandardDataCollator(tokenizer.pad_token_id)
    arguments = TrainingArguments(
        output_dir=str(Path(config.infrastructure.output_root) / "plain"), num_train_epochs=10, save_strategy="no",
        per_device_train_batch_size=config.training.per_device_train_batch_size, report_to="none", use_cpu=True,
        remove_unused_columns=False, optim="adamw_torch",
    )  # fmt: skip
    Trainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(source),
        args=arguments,
        train_dataset=Records(),
        data_collator=lambda samples: {k: v for k, v in pad(samples).items() if k in MODEL_INPUTS},
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
