"""BBUTrainer: transformers' Trainer with this project's loss, parameter groups, log names and checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import AutocastKwargs, send_to_device
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import ProgressCallback as StockProgress

from bbu.config.flat import DirectConfig
from bbu.data.dataset import BBUDataset
from bbu.data.packing import PackingBatchSampler
from bbu.data.sampling import EpochBatchSampler, EpochDataLoader, eval_batches
from bbu.errors import CheckpointError, NonFiniteError
from bbu.models.adapters import has_adapters
from bbu.models.groups import HEAD_GROUPS
from bbu.models.qwen import gathered_parameters, without_transformers_warnings
from bbu.training.flops import measure_work, peak_flops, training_flops
from bbu.training.loss_manager import LossManager, global_counts
from bbu.training.metrics import Throughput
from bbu.training.objective import Objective
from bbu.training.parameter_manager import ParameterManager
from bbu.training.position import DataPosition, is_same_cut, measure_position, seen_indices, write_position
from bbu.training.preemption import StopFlag, obey_parent_only, stop_agreed
from bbu.training.saving import CheckpointSaver, Publication
from bbu.training.stability import GradientGuard, find_non_finite

logger = logging.getLogger(__name__)
_OPTIONS = ("lr", "initial_lr", "weight_decay", "betas", "eps", "fused", "foreach")
"""Entries of an optimizer's group that the run config decides; others may be state."""


@dataclass(frozen=True)
class _ContinuedEpoch:
    """Where a run resumes whose data are cut in another way than before."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    batches: int
    """Batches of each rank that count as done in the epoch after them."""


class BBUTrainer(Trainer):
    """Trains on the supervised tokens of the whole optimizer step, and seals checkpoints with a manifest.

    Args:
        publication: where and how checkpoints are published.
        stop: the flag of the stop signals.
        stock: the arguments of transformers' Trainer.
    """

    model: nn.Module
    model_wrapped: nn.Module
    train_dataset: BBUDataset
    eval_dataset: BBUDataset

    def __init__(self, *, publication: Publication, stop: StopFlag, **stock: Any) -> None:
        config = publication.config
        args: TrainingArguments = stock["args"]
        self.parameters = ParameterManager(stock["model"], config.training, world_size=args.world_size)
        self.parameters.freeze()
        super().__init__(**stock)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the counts of the whole step already
        self.objective = Objective(config.detection, config.model.logits_chunk_size)
        self.losses = LossManager(config.training, config.detection, args.device)
        self.eval_losses = LossManager(config.training, config.detection, args.device)
        flops = partial(training_flops, stock["model"].config)
        self.throughput = Throughput(flops, args.device, peak_flops(args.device))
        self.publication = publication
        self.guard = GradientGuard(
            config.training,
            reduce_on=args.device if self.is_deepspeed_enabled else None,
            step=lambda: self.state.global_step,
        )
        self.saver = CheckpointSaver(
            publication, args.process_index, args.world_size, self.accelerator.wait_for_everyone
        )
        self._continued: _ContinuedEpoch | None = None
        self._staging: Path | None = None
        for callback in (PrinterCallback, StockProgress):
            self.remove_callback(callback)
        self.add_callback(_FreezeCallback(self.losses, config.detection.detection_freeze_epochs))
        self.add_callback(_StopCallback(stop))
        self.add_callback(_SavingCallback(self.saver))

    @property
    def _config(self) -> DirectConfig:
        return self.publication.config

    # --- data ---

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._train_loader

    @cached_property
    def _train_loader(self) -> DataLoader[Any]:
        """The loader of the run, made once: planning the steps and training would each pack all epochs."""
        packed = self._config.data.collator_type == "packed"
        sampler = self._packing_sampler() if packed else self._padding_sampler()
        return EpochDataLoader(self.train_dataset, sampler, collate_fn=self.data_collator, **self._loader_options())

    def _padding_sampler(self) -> EpochBatchSampler:
        training, data = self._config.training, self._config.data
        return EpochBatchSampler(
            len(self.train_dataset),
            training.per_device_train_batch_size,
            seed=training.data_seed,
            shuffle=data.shuffle,
            drop_last=data.dataloader_drop_last,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            on_epoch=self.train_dataset.set_epoch,
        )

    def _packing_sampler(self) -> PackingBatchSampler:
        training, data, dataset = self._config.training, self._config.data, self.train_dataset
        return PackingBatchSampler(
            lambda epoch: [dataset.cost(index, epoch) for index in range(len(dataset))],
            epochs=self._epoch_count,
            max_total_length=data.max_total_length,
            buffer_size=data.packing_buffer_size,
            vision_weight=data.packing_balance_vision_weight,
            seed=training.data_seed,
            shuffle=data.shuffle,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            on_epoch=dataset.set_epoch,
        )

    def _epoch_count(self, rows: int) -> int:
        """Number of epochs that the run needs when each has `rows` batches for a rank."""
        training = self._config.training
        if training.max_steps <= 0:
            return math.ceil(training.num_train_epochs)
        steps_per_epoch = math.ceil(rows / training.gradient_accumulation_steps)
        if self._continued is None:
            return math.ceil(training.max_steps / steps_per_epoch)
        steps_left = max(0, training.max_steps - self._continued.step)
        return self._continued.epoch + 1 + math.ceil(steps_left / steps_per_epoch)

    def take_position(self, position: DataPosition | None, step: int) -> str | None:
        """Continue the epoch of a checkpoint, whatever has changed since. Call it before the steps are planned.

        Args:
            position: the checkpoint's; None where it has none, because an older version wrote it.
            step: the checkpoint's step.

        Returns:
            What a person needs to know; None where the same batches come as without the interruption.
        """
        accumulation = self._config.training.gradient_accumulation_steps
        names = self._photo_names
        if position is None or is_same_cut(position, self._sampler, names, accumulation):
            return None
        self._continued = _ContinuedEpoch(step, position.epoch, 0)
        del self._train_loader  # more epochs may have to be packed
        seen = seen_indices(position, names)
        done = self._sampler.continue_epoch(position.epoch, seen, accumulation) if seen else 0
        is_over = done == len(self._sampler)
        self._continued = _ContinuedEpoch(step, position.epoch + is_over, 0 if is_over else done)
        if not seen:
            return None
        return (
            f"epoch {position.epoch + 1} continues under another cut of the data: {len(seen)} of {len(names)} samples "
            f"have been seen in it and are left out, the other {len(names) - len(seen)} come once"
        )

    @cached_property
    def _photo_names(self) -> list[str]:
        return [view.images[0] for _, view in self.train_dataset.students()]

    @property
    def _sampler(self) -> EpochBatchSampler:
        sampler = self._train_loader.batch_sampler
        assert isinstance(sampler, EpochBatchSampler)
        return sampler

    def _position(self) -> DataPosition:
        batches = round((self.state.epoch or 0.0) * len(self._sampler))
        accumulation = self._config.training.gradient_accumulation_steps
        return measure_position(self._sampler, self._photo_names, batches, accumulation)

    def _loader_options(self) -> dict[str, Any]:
        data = self._config.data
        workers = data.dataloader_num_workers
        return {
            "num_workers": workers,
            "pin_memory": data.dataloader_pin_memory,
            "persistent_workers": data.dataloader_persistent_workers,
            "prefetch_factor": data.dataloader_prefetch_factor if workers else None,
            "worker_init_fn": obey_parent_only if workers else None,
        }

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device; pinned memory is copied without waiting.

        Without DeepSpeed's dtype: the model casts the pixels itself, and bfloat16 would shift boxes by up to 1/256.
        """
        moved: Any = send_to_device(inputs, self.args.device, non_blocking=True)
        return moved

    # --- optimisation ---

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Add what saves memory under DDP and autocast to Trainer's arguments of accelerate."""
        arguments = super()._build_accelerator_args(**kwargs)
        (ddp,) = arguments["kwargs_handlers"]
        ddp.gradient_as_bucket_view = True  # else DDP holds each gradient twice: 15 GB of the 3B model in float32
        # Autocast would keep its bfloat16 copy of each weight until the forward pass ends, 7 GB; a weight is used once
        # in a forward pass, so nothing is computed twice.
        arguments["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        return arguments

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            # The options hold transformers' default learning rate, which no group uses: each has its own.
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(self.parameters.optimizer_groups(), **options)
            self.optimizer.register_step_pre_hook(self.guard)
            self.optimizer.register_load_state_dict_pre_hook(_with_present_options)
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> Any:
        """Count what each loss of this optimizer step is divided by, over all micro-batches and ranks."""
        self.throughput.add(measure_work(batch_samples))
        return global_counts(self.objective.counts(batch_samples), device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert num_items_in_batch is not None and not return_outputs
        losses = self.objective.losses(model, inputs)
        self.losses.update(losses)
        return self.losses.objective(losses, num_items_in_batch, world_size=self.args.world_size)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the losses on the validation set, averaged over its tokens and all ranks, as `eval/<loss>`."""
        dataset: BBUDataset = self.eval_dataset if eval_dataset is None else eval_dataset
        packed = self._config.data.collator_type == "packed"  # then one sample a row, which always fits
        size = 1 if packed else self._config.training.per_device_eval_batch_size
        batches, counted = eval_batches(len(dataset), size, self.args.process_index, self.args.world_size)
        options: dict[str, Any] = self._loader_options() | {"persistent_workers": False}
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator, **options)
        self.model_wrapped.eval()
        for number, batch in enumerate(loader):
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = self.objective.losses(self.model_wrapped, self._prepare_inputs(batch))
            if number < counted:
                self.eval_losses.update(losses)
        metrics = {f"{metric_key_prefix}/{k}": v for k, v in self.eval_losses.window_means().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- logs ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means, rates and norms to Trainer's own numbers. Collective while training."""
        if "loss" in logs:
            logs.pop("learning_rate", None)  # of the first parameter group alone; lr/<group> reports every group's
            logs = logs | self._window_values(logs.get("grad_norm"))
        super().log(logs, start_time)

    def _window_values(self, grad_norm: float | None) -> dict[str, float]:
        """Losses, throughput, learning rates and norms of the logging window that ends here.

        grad_norm: the total norm of the last step before clipping, where Trainer computed it.
        """
        training = self._config.training
        values = self.losses.window_means() | self.throughput.rates()
        values |= self.guard.rates
        if training.log_weight_norms:
            values |= self.parameters.weight_norms(gathered_parameters)
        if training.log_grad_norms:
            limit = training.max_grad_norm
            values |= self.guard.norms(max(1.0, grad_norm / limit) if limit and grad_norm else 1.0)
        return values

    # --- checkpoints ---

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader[Any]) -> tuple[Any, ...]:
        """Plan epochs and steps; where an epoch is continued under another cut, from what is left of it."""
        epochs, steps_per_epoch, *middle, max_steps = super().set_initial_training_values(args, dataloader)
        if (start := self._continued) is not None:
            planned = start.epoch * steps_per_epoch + start.batches // args.gradient_accumulation_steps
            if args.max_steps > 0:
                epochs = math.ceil((planned + max(0, max_steps - start.step)) / steps_per_epoch)
            else:
                max_steps = start.step + max(0, max_steps - planned)
        return epochs, steps_per_epoch, *middle, max_steps

    def planned_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def resume_from(self, checkpoint: Path, step: int) -> None:
        """Train from a verified checkpoint of the given step to the end."""
        self.saver.saved_step = step
        self.train(resume_from_checkpoint=str(checkpoint))

    def save_step(self) -> None:
        """Save the current step unless it is saved already. Collective."""
        self._save_checkpoint(self.model_wrapped, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if step != self.saver.saved_step:  # else resumed here, or saved by step and by epoch alike
            self.saver.save_step(step, self._refuse_non_finite_weights, partial(self._write_checkpoint, model, trial))

    def _write_checkpoint(self, model: nn.Module, trial: Any, staged: Path) -> None:
        """Write this rank's files into a folder that is named `checkpoint-{step}`."""
        self._staging = staged.parent
        super()._save_checkpoint(model, trial)
        self._staging = None
        if self.args.process_index == 0:
            self.publication.add_model_files(staged)
            write_position(staged, self._position())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapters straight from the model: for them DeepSpeed would copy the whole base model first."""
        if has_adapters(self.model):
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Leave frozen weights out of DeepSpeed's states, as transformers does for a model of the class PeftModel."""
        with self._without_frozen_weights():
            super()._save_optimizer_and_scheduler(output_dir)

    @contextmanager
    def _without_frozen_weights(self) -> Iterator[None]:
        engine: Any = self.model_wrapped
        if not (self.is_deepspeed_enabled and has_adapters(self.model)):
            yield
            return
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        try:
            yield
        finally:
            del engine.save_checkpoint

    def _refuse_non_finite_weights(self) -> None:
        """Raise NonFiniteError on all ranks alike where any rank would save a weight that is not finite. Collective."""
        names = [name] if (name := find_non_finite(self.model, self.optimizer)) else []
        if dist.is_initialized():
            gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, names)
            names = [name for part in gathered for name in part]
        if names:
            raise NonFiniteError(
                f"step {self.state.global_step}: {names[0]} is NaN or infinite, so this step is not saved; the same "
                "command resumes from the newest checkpoint. Lower the learning rates if it comes again"
            )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        with without_transformers_warnings():  # it would warn of the values that are set right below
            position = super()._init_training_state(max_steps, *args, **kwargs)
        # trainer_state.json has brought back how often the earlier start logged, evaluated and saved.
        self.state.compute_steps(self.args, max_steps)
        return position if self._continued is None else (self._continued.epoch, self._continued.batches)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and schedule, but no setting: those are the present config's."""
        scheduler = self.lr_scheduler
        assert isinstance(scheduler, LambdaLR)
        rates = scheduler.base_lrs
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler.base_lrs = rates
        for group, rate, schedule in zip(scheduler.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * schedule(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        zero = getattr(self.model_wrapped, "optimizer", None) if self.is_deepspeed_enabled else None
        if zero is not None and hasattr(zero, "clip_grad"):  # ZeRO-1 and ZeRO-2 load the limit as well
            zero.clip_grad = self.args.max_grad_norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the model was built from the checkpoint.

        Trainer would compare the names on disk with those in memory without renaming them and without being strict, and
        so would leave the whole language model unchanged, without an error.
        """

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)


def _with_present_options(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Keep the present options of the optimizer's groups while a saved state is loaded.

    A `register_load_state_dict_pre_hook` hook. Raises CheckpointError where the state belongs to other groups.
    """
    saved, present = state["param_groups"], optimizer.param_groups
    if _describe_groups(saved) != _describe_groups(present):
        raise CheckpointError(
            f"the optimizer's state belongs to other parameters ({_describe_groups(saved)}; here "
            f"{_describe_groups(present)}); begin a new run (another run_name) with model_path set to the checkpoint"
        )
    options = [{name: group[name] for name in _OPTIONS if name in group} for group in present]
    return {**state, "param_groups": [{**old, **new} for old, new in zip(saved, options, strict=True)]}


def _describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{group.get('name')}: {len(group['params'])}" for group in groups)


class _FreezeCallback(TrainerCallback):
    """Freezes the detection head for the first epochs: it neither learns nor changes the rest of the model.

    By its rates and its weight in the objective rather than by `requires_grad`, which DDP and ZeRO read only once.
    """

    def __init__(self, losses: LossManager, epochs: float) -> None:
        self._losses, self._epochs = losses, epochs

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        frozen = (state.epoch or 0.0) < self._epochs
        self._losses.head_share = 0.0 if frozen else 1.0
        for group in optimizer.param_groups if frozen else ():
            if group["group"] in HEAD_GROUPS:
                group["lr"] = 0.0  # for this step; the scheduler sets it again


class _StopCallback(TrainerCallback):
    """Makes all ranks save the current step and stop once any of them has received a stop signal."""

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if stop_agreed(self._stop):
            logger.warning("stopping after step %d of %d: stop signal received", state.global_step, state.max_steps)
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # the time between the signal and the kill may be short


class _SavingCallback(TrainerCallback):
    """Lets a checkpoint that could not be published in the background end the training at the next step."""

    def __init__(self, saver: CheckpointSaver) -> None:
        self._saver = saver

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saver.review_publication()
