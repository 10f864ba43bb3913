"""TrainingCoordinator: builds a run from its config and trains it to its end, or to a saved stop."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bbu.config.domains import DataConfig, DetectionConfig, InfrastructureConfig
from bbu.config.flat import DirectConfig
from bbu.data.collators import PackedDataCollator, StandardDataCollator
from bbu.data.dataset import BBUDataset, load_dataset
from bbu.errors import PREEMPTED_EXIT_CODE, BBUError, CheckpointError, ConfigError, error_lines
from bbu.logs import rank_of
from bbu.models.adapters import AdapterSpec
from bbu.models.attention import check_packing_is_safe
from bbu.models.model_files import make_readable, save_image_processor, save_tokenizer
from bbu.models.qwen import BBUModel, check_folder, load_image_processor, load_model, load_tokenizer, pad_token_id
from bbu.models.torch_settings import prepare_torch
from bbu.reports.model_card import CardFacts, gather_card_facts, write_model_card
from bbu.run import provenance
from bbu.run.checkpoints import Checkpoint, clean_leftovers, newest
from bbu.run.files import write_atomic
from bbu.run.folder import RUN_CONFIG, RunFolder, checkpoint_step
from bbu.run.lease import Owner, held_lease
from bbu.training.arguments import training_arguments
from bbu.training.memory import announce_memory
from bbu.training.metrics import ProgressCallback, StatusCallback, TensorBoardCallback
from bbu.training.objective import PlannedCollator
from bbu.training.position import read_position
from bbu.training.preemption import StopFlag, stop_agreed
from bbu.training.resume import Change, review_changes, summarise_changes
from bbu.training.saving import Publication, signal_notice
from bbu.training.trainer import BBUTrainer

logger = logging.getLogger(__name__)
T = TypeVar("T")
_HEARTBEATS = 5
"""Heartbeats of the lease within its timeout, so that a few may be late before the lease is lost."""


class TrainingCoordinator:
    """Builds everything that one run needs, and trains it on this rank.

    Args:
        config: the run config.
        stop: the flag of the stop signals.
        environ: the environment variables; they name the rank, the job and the container image.
    """

    def __init__(self, config: DirectConfig, stop: StopFlag, environ: Mapping[str, str]) -> None:
        self._config, self._stop, self._environ = config, stop, environ
        self._rank = rank_of(environ)
        self.run_folder = RunFolder.of(config.infrastructure.output_root, config.infrastructure.run_name)

    def run(self) -> int:
        """Train the run, from its newest checkpoint if it has one.

        Returns:
            The exit code: 0 when done, PREEMPTED_EXIT_CODE when stopped by a signal with the state saved.

        Raises:
            BBUError: the run cannot start, resume or continue.
        """
        config, run = self._config, self.run_folder.create()
        status = StatusCallback(run, config.infrastructure, provenance.slurm_facts(self._environ))
        with self._lease(run) as check_lease, self._failure_in_status(status):
            check_folder(config.model.model_path)
            prepare_torch(config.model, config.infrastructure)
            _select_deepspeed_accelerator()
            arguments = training_arguments(config, run)
            checkpoint, changes = _broadcast_from_rank_0(self._open_run)
            if checkpoint:
                _check_world_size(checkpoint, config.infrastructure, arguments.world_size)
            folder = checkpoint.path if checkpoint else Path(config.model.model_path)
            announce_memory(config, folder, arguments.world_size, _card_bytes(arguments.device))
            trainer = self._build(folder, arguments, check_lease, status)
            return self._train(trainer, status, checkpoint, changes)

    @contextlib.contextmanager
    def _lease(self, run: RunFolder) -> Iterator[Callable[[], None]]:
        """Hold the lease of the run folder on rank 0; yields the function that checks it."""
        if self._rank != 0:
            yield lambda: None
            return
        timeout = self._config.infrastructure.lease_timeout_s
        with held_lease(run, Owner.of_this_process(self._environ), timeout, timeout / _HEARTBEATS) as lease:
            yield lease.check

    @contextlib.contextmanager
    def _failure_in_status(self, status: StatusCallback) -> Iterator[None]:
        """Write to status.json that the start, or the training, has failed, if the block ends in an error."""
        try:
            yield
        except BaseException as error:
            if self._rank == 0:
                status.write_failure((error_lines(error) or [f"{type(error).__name__}: {error}"])[0])
            raise

    def _open_run(self) -> tuple[Checkpoint | None, list[Change]]:
        """Tidy the folder, record this start, and find the checkpoint to resume from. Rank 0 only.

        Returns:
            The checkpoint, None where the run begins, and what has changed in the config since.
        """
        run, config = self.run_folder, self._config
        clean_leftovers(run)
        _record_start(run, config, self._environ)
        if config.training.resume == "never" and (steps := run.steps()):
            raise CheckpointError(
                f"{run.root}: resume is never, but the folder has checkpoints up to step {steps[-1]}; set resume to "
                "auto to continue from there, or begin under another run_name"
            )
        checkpoint = newest(run)
        return checkpoint, review_changes(checkpoint, config) if checkpoint else []

    def _build(
        self, folder: Path, arguments: TrainingArguments, check_lease: Callable[[], None], status: StatusCallback
    ) -> BBUTrainer:
        """Build the trainer on the model in `folder`: the checkpoint's when resuming, else the config's."""
        config = self._config
        tokenizer, processor = load_tokenizer(folder), load_image_processor(folder)
        train, validation = self._load_datasets(tokenizer, processor)
        set_seed(config.training.seed)  # it decides the initial weights of a new detection head
        model = load_model(folder, config.model, config.detection, AdapterSpec.from_config(config.training))
        _check_attention(model, config)
        trainer = BBUTrainer(
            publication=Publication(
                run=self.run_folder,
                config=config,
                image_digest=provenance.image_digest(self._environ),
                add_model_files=self._model_files_writer(tokenizer, processor, arguments.world_size),
                check_lease=check_lease,
                report_published=status.write_checkpoint,
                notice_seconds=signal_notice(self._environ),
            ),
            stop=self._stop,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=PlannedCollator(
                _make_collator(config.data, pad_token_id(tokenizer, folder)), model.config.vision_config
            ),
            callbacks=self._callbacks(status),
        )
        _log_size(train, model)
        return trainer

    def _model_files_writer(
        self, tokenizer: PreTrainedTokenizerBase, processor: Qwen2VLImageProcessorPil, world_size: int
    ) -> Callable[[Path], None]:
        """Make the function that completes a checkpoint's model folder; rank 0 alone calls it."""
        if self._rank != 0:
            return lambda staged: None
        facts = gather_card_facts(self.run_folder, self._config, world_size)
        return partial(_add_model_files, run=self.run_folder, facts=facts, tokenizer=tokenizer, processor=processor)

    def _load_datasets(
        self, tokenizer: PreTrainedTokenizerBase, processor: Qwen2VLImageProcessorPil
    ) -> tuple[BBUDataset, BBUDataset | None]:
        """Load the training set and, unless eval_strategy is `no`, the validation set."""
        config = self._config
        load = partial(
            load_dataset, config.data, tokenizer, processor,
            seed=config.training.data_seed, max_length=config.model.model_max_length, on_rank_0=_broadcast_from_rank_0,
        )  # fmt: skip
        train = load(split="train")
        validation = load(split="eval") if config.training.eval_strategy != "no" else None
        for dataset in filter(None, (train, validation)):
            _check_head_fits(dataset, config.detection)
        return train, validation

    def _callbacks(self, status: StatusCallback) -> list[Any]:
        infra = self._config.infrastructure
        tensorboard = [TensorBoardCallback(self.run_folder)] if infra.tensorboard else []
        return [*tensorboard, ProgressCallback(infra.progress), status]

    def _train(
        self, trainer: BBUTrainer, status: StatusCallback, checkpoint: Checkpoint | None, changes: list[Change]
    ) -> int:
        """Train the steps that are left and return the exit code."""
        step = checkpoint.manifest.step if checkpoint else 0
        continued = self._continue_epoch(trainer, checkpoint, changes) if checkpoint else None
        planned = trainer.planned_steps()
        if step >= planned:
            self._report_nothing_left(step, planned)
            return 0
        if stop_agreed(self._stop):
            logger.warning("stop signal received before the first step: nothing to save")
            status.write_stop_before_training(step, planned)
            return PREEMPTED_EXIT_CODE
        if self._rank == 0:
            write_atomic(self.run_folder.config, _config_text(self._config))
            _report_start(self._config, checkpoint, changes)
            if continued:
                logger.warning("%s", continued)
        try:
            if checkpoint:
                trainer.resume_from(checkpoint.path, step)
            else:
                trainer.train()
            return self._finish(trainer, status)
        except BaseException:
            trainer.saver.await_publication_after_failure()
            raise

    def _continue_epoch(self, trainer: BBUTrainer, checkpoint: Checkpoint, changes: list[Change]) -> str | None:
        """Continue the epoch of a checkpoint; returns what a person needs to know about its samples, if anything."""
        position, manifest = read_position(checkpoint.path), checkpoint.manifest
        text = trainer.take_position(position, manifest.step)
        is_cut_anew = manifest.world_size != trainer.args.world_size or any(change.moves_samples for change in changes)
        if position is None and is_cut_anew:
            return (
                "an older version saved this checkpoint, without saying which samples it had seen: some samples of "
                "this epoch come twice or not at all"
            )
        return text

    def _report_nothing_left(self, step: int, planned: int) -> None:
        if self._rank != 0:
            return
        if not self.run_folder.config.exists():
            write_atomic(self.run_folder.config, _config_text(self._config))
        logger.info("step %d of %d is published already: nothing left to train", step, planned)
        if step > planned:
            logger.warning(
                "max_steps or num_train_epochs now end the run at step %d, before its newest checkpoint, which is left "
                "as it is; raise them to train on", planned,
            )  # fmt: skip

    def _finish(self, trainer: BBUTrainer, status: StatusCallback) -> int:
        """Record how the training ended and return the exit code."""
        state = trainer.state
        is_stopped = state.global_step < state.max_steps  # _StopCallback has ended it, and saved this step
        if not is_stopped and self._config.training.save_final:
            trainer.save_step()
        trainer.saver.await_publication()
        status.write(state, "stopped" if is_stopped else "completed")
        return PREEMPTED_EXIT_CODE if is_stopped else 0


def _make_collator(data: DataConfig, pad_id: int) -> StandardDataCollator | PackedDataCollator:
    """Make the collator that collator_type names."""
    if data.collator_type == "packed":
        return PackedDataCollator(
            pad_id, max_total_length=data.max_total_length, pad_to_multiple_of=data.pad_to_multiple_of
        )
    return StandardDataCollator(pad_id, pad_to_multiple_of=data.pad_to_multiple_of)


def _check_head_fits(dataset: BBUDataset, detection: DetectionConfig) -> None:
    """Refuse photos with more objects than queries, and descriptions longer than the caption decoder can write."""
    if not detection.detection_enabled:
        return
    most, name = max(((len(view.objects), name) for name, view in dataset.students()), default=(0, ""))
    if most > detection.detection_num_queries:
        raise ConfigError(
            f"{name}: {most} objects but detection_num_queries is {detection.detection_num_queries}; raise it"
        )
    descriptions = sorted({item.desc for _, view in dataset.students() for item in view.objects})
    lengths = dataset.caption_lengths(descriptions)
    longest, text = max(zip(lengths, descriptions, strict=True), default=(0, ""))
    if longest > detection.detection_caption_max_length:
        raise ConfigError(
            f"the description {text!r} has {longest} tokens but detection_caption_max_length is "
            f"{detection.detection_caption_max_length}; raise it"
        )


def _check_world_size(checkpoint: Checkpoint, infra: InfrastructureConfig, world_size: int) -> None:
    """Refuse what ZeRO cannot resume: its optimizer state is partitioned for a number of ranks."""
    saved = checkpoint.manifest.world_size
    if infra.deepspeed_enabled and saved != world_size:
        raise CheckpointError(
            f"{checkpoint.path}: saved by {saved} ranks under DeepSpeed, cannot resume with {world_size}; use {saved} "
            "again, or begin a new run (another run_name) with model_path set to the checkpoint"
        )


def _report_start(config: DirectConfig, checkpoint: Checkpoint | None, changes: list[Change]) -> None:
    """Say how the run begins or resumes, and what a changed or doubtful setting means."""
    if checkpoint:
        logger.info("resuming from %s", checkpoint.path)
    for is_warning, text in summarise_changes(changes):
        logger.log(logging.WARNING if is_warning else logging.INFO, "%s", text)
    train, evaluation = config.data.train_prompt, config.data.eval_prompt
    if train != evaluation:
        logger.warning(
            "train_prompt is %s but eval_prompt is %s: evals and the validation loss ask another question than the "
            "model learns to answer", train, evaluation,
        )  # fmt: skip


def _check_attention(model: BBUModel, config: DirectConfig) -> None:
    """Refuse what would mix packed samples, and an attention that cannot run here, before the first step."""
    check_packing_is_safe(
        model,
        config.model.attn_implementation,
        config.model.vision_attn_implementation,
        config.data.collator_type,
        autocast_dtype=torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else None,
    )


def _select_deepspeed_accelerator() -> None:
    """Name the CPU to DeepSpeed where there is no GPU; it reads the variable when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _card_bytes(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _broadcast_from_rank_0(compute: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank; its BBUError is raised on every rank too."""
    if not dist.is_initialized():
        return compute()
    result: list[Any] = [None, None]  # (value, error)
    if dist.get_rank() == 0:
        try:
            result[0] = compute()
        except BBUError as error:
            result[1] = error
        except (OSError, ValueError) as error:  # the other ranks wait for an answer: they need this error as well
            result[1] = CheckpointError(f"the run folder cannot be used ({error}); check its permissions and space")
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _config_text(config: DirectConfig) -> str:
    """The resolved config as a file that loads; its overrides stand as comments on top."""
    overrides = "".join(f"# --set {override}\n" for override in config.overrides)
    return f"# from {config.source}\n{overrides}" + yaml.safe_dump(
        config.as_flat(), sort_keys=False, allow_unicode=True
    )


def _record_start(run: RunFolder, config: DirectConfig, environ: Mapping[str, str]) -> None:
    """Record this start in provenance.json, with the hashes of its data files."""
    root, data = Path(config.data.data_root), config.data
    paths = [root / data.train_file, root / data.val_file, root / data.teacher_file]
    provenance.record_start(run, environ, [path for path in paths if path.is_file()])


def _add_model_files(
    staged: Path,
    run: RunFolder,
    facts: CardFacts,
    tokenizer: PreTrainedTokenizerBase,
    processor: Qwen2VLImageProcessorPil,
) -> None:
    """Make a checkpoint a complete model folder: tokenizer, image processor with our pixel limits, config, card."""
    config, step = facts.config, checkpoint_step(staged.name)
    assert step is not None, staged
    save_tokenizer(tokenizer, staged)
    save_image_processor(processor, staged, config.data.min_pixels, config.data.max_pixels)
    (staged / RUN_CONFIG).write_text(_config_text(config), encoding="utf-8")
    write_model_card(staged, step, facts, run)
    make_readable(staged)


def _log_size(train: BBUDataset, model: torch.nn.Module) -> None:
    """Log how many samples train how many parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d training samples, %.1f M parameters", len(train), trained / 1e6)
