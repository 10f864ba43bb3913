"""TrainingCoordinator: builds a run from its config and carries it to its end, or to a saved stop."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from transformers import set_seed

from bbu.config.domains import DataConfig, DetectionConfig
from bbu.config.flat import DirectConfig
from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.data.dataset import BBUDataset, load_dataset
from bbu.errors import PREEMPTED_EXIT_CODE, BBUError, CheckpointError, ConfigError
from bbu.logs import rank_of
from bbu.models.attention import check_packing_is_safe
from bbu.models.qwen import BBUModel, check_folder, load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.run import provenance
from bbu.run.checkpoints import Checkpoint, clean_leftovers, config_hash, newest
from bbu.run.files import write_atomic
from bbu.run.folder import RUN_CONFIG, RunFolder
from bbu.run.lease import Owner, held_lease
from bbu.training.arguments import training_arguments
from bbu.training.metrics import ProgressCallback, StatusCallback, TensorBoardCallback
from bbu.training.preemption import StopFlag, stop_agreed
from bbu.training.trainer import BBUTrainer, Publication

logger = logging.getLogger(__name__)
T = TypeVar("T")
HEARTBEATS = 5
"""Heartbeats of the lease within its timeout."""


class TrainingCoordinator:
    """Trains one run."""

    def __init__(self, config: DirectConfig, stop: StopFlag, environ: Mapping[str, str]) -> None:
        self._config, self._stop, self._environ = config, stop, environ
        self._rank = rank_of(environ)
        self.run_folder = RunFolder.of(config.infrastructure.output_root, config.infrastructure.run_name)

    def run(self) -> int:
        """Train until done (0) or stopped with the state saved (PREEMPTED_EXIT_CODE). Raises a BBUError otherwise."""
        check_folder(self._config.model.model_path)  # before anything is written
        run = self.run_folder.create()
        with self._lease(run) as check:
            prepare_torch(self._config.infrastructure.cpu_threads)
            arguments = training_arguments(self._config, run)
            checkpoint = from_rank_0(self._open)
            folder = checkpoint.path if checkpoint else Path(self._config.model.model_path)
            trainer, status = self._build(folder, arguments, check)
            with reporting(trainer, status):
                return self._train(trainer, status, checkpoint)

    @contextlib.contextmanager
    def _lease(self, run: RunFolder) -> Iterator[Callable[[], None]]:
        """Rank 0 keeps the folder to this run; yields the check that it still does."""
        if self._rank != 0:
            yield lambda: None
            return
        timeout = self._config.infrastructure.lease_timeout_s
        with held_lease(run, Owner.of_this_process(self._environ), timeout, timeout / HEARTBEATS) as lease:
            yield lease.check

    def _open(self) -> Checkpoint | None:
        """On rank 0: tidy the folder, record this start, and find where to go on."""
        clean_leftovers(self.run_folder)
        write_atomic(self.run_folder.config, config_text(self._config))
        record_start(self.run_folder, self._config, self._environ)
        if self._config.training.resume == "never":
            return None
        found = newest(self.run_folder)
        if found and found.manifest.config_hash != config_hash(self._config.as_flat()):
            logger.warning("%s was saved under another config; this one goes on from it", found.path)
        return found

    def _build(self, folder: Path, arguments: Any, check: Callable[[], None]) -> tuple[BBUTrainer, StatusCallback]:
        """folder: the model to start from, a checkpoint's own when resuming."""
        config = self._config
        tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)

        def dataset(split: Any) -> BBUDataset:
            return load_dataset(
                config.data, tokenizer, processor, split=split, seed=config.training.data_seed,
                max_length=config.model.model_max_length,
            )  # fmt: skip

        def complete(staged: Path) -> None:
            complete_checkpoint(staged, config, tokenizer, processor)

        collator = make_collator(config.data, pad_token_id(tokenizer, folder))
        train = dataset("train")
        validation = dataset("eval") if config.training.eval_strategy != "no" else None
        for data in filter(None, (train, validation)):
            check_head_fits(data, config.detection)
        status = StatusCallback(self.run_folder, config.infrastructure, provenance.slurm_facts(self._environ))
        set_seed(config.training.seed)  # a fresh detection head is drawn from it
        model = load_model(folder, config.model, config.detection)
        check_attention(model, config)
        trainer = BBUTrainer(
            publication=Publication(
                run=self.run_folder,
                config=config,
                image_digest=provenance.image_digest(self._environ),
                complete=complete,
                check=check,
            ),
            stop=self._stop,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=collator,
            callbacks=self._callbacks(status),
        )
        describe(train, model)
        return trainer, status

    def _callbacks(self, status: StatusCallback) -> list[Any]:
        infra = self._config.infrastructure
        shown = [TensorBoardCallback(self.run_folder, infra.tensorboard_flush_secs)] if infra.tensorboard else []
        return [*shown, ProgressCallback(infra.progress), status]

    def _train(self, trainer: BBUTrainer, status: StatusCallback, checkpoint: Checkpoint | None) -> int:
        step = checkpoint.manifest.step if checkpoint else 0
        if step >= trainer.planned_steps():
            logger.info("step %d of %d is published already: nothing left to train", step, trainer.planned_steps())
            return 0
        if stop_agreed(self._stop):
            logger.warning("asked to stop before the first step: nothing is lost")
            return PREEMPTED_EXIT_CODE
        if checkpoint:
            check_ranks(checkpoint, trainer)
            logger.info("going on from %s", checkpoint.path)
            trainer.resume_from(checkpoint.path, step)
        else:
            trainer.train()
        return self._finish(trainer, status)

    def _finish(self, trainer: BBUTrainer, status: StatusCallback) -> int:
        state = trainer.state
        if state.global_step < state.max_steps:
            status.write(state, "preempted")
            return PREEMPTED_EXIT_CODE
        if self._config.training.save_final:
            trainer.publish()
        status.write(state, "completed")
        return 0


def make_collator(data: DataConfig, pad_id: int) -> StandardDataCollator | PackedDataCollator:
    """Batches as collator_type wants them."""
    if data.collator_type == "packed":
        return PackedDataCollator(
            pad_id, max_total_length=data.max_total_length, pad_to_multiple_of=data.pad_to_multiple_of
        )
    return StandardDataCollator(pad_id, pad_to_multiple_of=data.pad_to_multiple_of)


def check_head_fits(dataset: BBUDataset, detection: DetectionConfig) -> None:
    """Refuse photos with more objects than queries, and descriptions longer than the caption branch can write."""
    if not detection.detection_enabled:
        return
    most, name = max(((len(view.objects), name) for name, view in dataset.students()), default=(0, ""))
    if most > detection.detection_num_queries:
        raise ConfigError(
            f"{name}: {most} objects but detection_num_queries is {detection.detection_num_queries}; raise it"
        )
    descs = {item.desc for _, view in dataset.students() for item in view.objects}
    longest, desc = max(((dataset.caption_length(desc), desc) for desc in descs), default=(0, ""))
    if longest > detection.detection_caption_max_length:
        raise ConfigError(
            f"the description {desc!r} has {longest} tokens but detection_caption_max_length is "
            f"{detection.detection_caption_max_length}; raise it"
        )


def check_ranks(checkpoint: Checkpoint, trainer: BBUTrainer) -> None:
    """Refuse what ZeRO cannot resume: its optimizer state is cut up for a number of ranks."""
    saved, now = checkpoint.manifest.world_size, trainer.args.world_size
    if saved == now:
        return
    if trainer.is_deepspeed_enabled:
        raise CheckpointError(
            f"{checkpoint.path}: saved by {saved} ranks under DeepSpeed, cannot go on with {now}; use {saved} again"
        )
    logger.warning("saved by %d ranks, going on with %d: the rest of this epoch holds other samples", saved, now)


def check_attention(model: BBUModel, config: DirectConfig) -> None:
    """Refuse what would mix packed samples, or an attention that cannot run here, before the first step."""
    check_packing_is_safe(
        model,
        config.model.attn_implementation,
        config.model.vision_attn_implementation,
        config.data.collator_type,
        autocast_dtype=torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else None,
    )


def prepare_torch(threads: int) -> None:
    """Threads of a CPU run; and DeepSpeed, which must be told that there is no GPU before it is imported."""
    if threads:
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else accelerate decides, and warns
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def from_rank_0(find: Callable[[], T]) -> T:
    """What `find` returns on rank 0, on every rank; its BBUError is raised on every rank too."""
    if not dist.is_initialized():
        return find()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except BBUError as error:
            answer[1] = error
        except (OSError, ValueError) as error:  # the others are waiting: tell them too
            answer[1] = CheckpointError(f"the run folder cannot be used ({error}); check its permissions and space")
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextlib.contextmanager
def reporting(trainer: BBUTrainer, status: StatusCallback) -> Iterator[None]:
    """Leave `failed` in status.json if the block ends in an error."""
    try:
        yield
    except BaseException:
        status.write(trainer.state, "failed")
        raise


def config_text(config: DirectConfig) -> str:
    """The resolved config as a file that loads; the overrides that went into it as comments on top."""
    overrides = "".join(f"# --set {override}\n" for override in config.overrides)
    return f"# from {config.source}\n{overrides}" + yaml.safe_dump(
        config.as_flat(), sort_keys=False, allow_unicode=True
    )


def record_start(run: RunFolder, config: DirectConfig, environ: Mapping[str, str]) -> None:
    """Add this start to provenance.json, which keeps one entry for each."""
    root, data = Path(config.data.data_root), config.data
    files = [root / data.train_file, root / data.val_file, root / data.teacher_file]
    hashed = [path for path in files if path.is_file()] if config.infrastructure.hash_data else []
    starts = json.loads(run.provenance.read_text(encoding="utf-8"))["starts"] if run.provenance.exists() else []
    starts.append(provenance.describe(environ, hashed))
    write_atomic(run.provenance, json.dumps({"starts": starts}, ensure_ascii=False, indent=1) + "\n")


def complete_checkpoint(staged: Path, config: DirectConfig, tokenizer: Any, processor: Any) -> None:
    """Make a checkpoint a model folder of its own: tokenizer, image processor with our pixel limits, run config."""
    tokenizer.save_pretrained(staged)
    processor.size = {"shortest_edge": config.data.min_pixels, "longest_edge": config.data.max_pixels}
    processor.save_pretrained(staged)
    (staged / RUN_CONFIG).write_text(config_text(config), encoding="utf-8")
    for weights in staged.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors' own 0600 would hide them from the group


def describe(train: BBUDataset, model: torch.nn.Module) -> None:
    """Say what will be trained on what."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d training samples, %.1f M parameters", len(train), trained / 1e6)
