"""Any Qwen2.5-VL folder, read offline: weights, tokenizer, image processor."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from bbu.config.domains import DetectionConfig, ModelConfig
from bbu.errors import ModelError
from bbu.models.attention import LOOPED, VARLEN, register_varlen, use_batched_windows, use_varlen_vision
from bbu.models.denoising import Denoising
from bbu.models.detection_head import DetectionHead, DetectionOutput, HeadSpec, Memory
from bbu.run.folder import HEAD_KEY

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
_ARCHITECTURE = Qwen2_5_VLForConditionalGeneration.__name__

StatesReader = Callable[[torch.Tensor, torch.nn.Module], Any]
"""Takes the last states [B, S, H] and the language head [*, H] -> [*, V]."""
DetectionReader = Callable[[DetectionOutput, "BBUModel"], Any]


def build_head(config: Any) -> DetectionHead | None:
    """The head a Qwen2.5-VL config describes under HEAD_KEY, None where it describes none."""
    described = getattr(config, HEAD_KEY, None)
    if not described:
        return None
    widths = {"vision_width": config.vision_config.hidden_size, "language_width": config.text_config.hidden_size}
    return DetectionHead(HeadSpec(**described), **widths)


@dataclass(frozen=True)
class DetectionQuery:
    """What the head is asked about, for N samples of a batch."""

    student_images: torch.Tensor
    """[N] int64, rows of image_grid_thw"""
    prompt_ids: torch.Tensor
    """[N, T] int64"""
    prompt_mask: torch.Tensor
    """[N, T] bool"""
    denoising: Denoising | None = None


class BBUModel(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, with a detection head where its config names one.

    Its states can be read inside its own forward pass, and so under any wrapper: DDP, ZeRO and autocast act on
    `forward`, and a loss that needs logits at a tenth of the positions must be computed in it.
    """

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__(config)
        self.detection_head = build_head(config)

    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)  # generate() looks for arguments by name
    def forward(
        self,
        *args: Any,
        read_states: StatesReader | None = None,
        detection: DetectionQuery | None = None,
        read_detection: DetectionReader | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen2.5-VL's. With `read_states` or `read_detection` the result is the pair of what these return.

        Without `read_states` the language model is not run; without `read_detection` the head is not.
        """
        if read_states is None and read_detection is None:
            return super().forward(*args, **kwargs)
        grid = kwargs["image_grid_thw"]
        vision: Any = self.model.get_image_features(kwargs.pop("pixel_values"), grid)
        language = found = None
        if read_states is not None:
            states = self.model(*args, mm_encoder_outputs={"image": vision}, **kwargs)[0]
            language = read_states(states, self.lm_head)
        if read_detection is not None:
            assert self.detection_head is not None and detection is not None
            memory = self.head_memory(vision.last_hidden_state, grid, detection)
            found = read_detection(self.detection_head(memory, detection.denoising), self)
        return language, found

    def head_memory(self, patches: torch.Tensor, grid: torch.Tensor, query: DetectionQuery) -> Memory:
        """What the head may see, from the vision tower's states [P, C] of all images, in its window order."""
        visual: Any = self.model.visual
        unit = visual.spatial_merge_size**2
        order, _ = get_vision_window_index(grid, visual.spatial_merge_size, visual.window_size, visual.patch_size)
        restored = patches.unflatten(0, (-1, unit))[torch.argsort(order).to(patches.device)].flatten(0, 1)
        places = get_vision_position_ids(grid, visual.spatial_merge_size)
        sizes = grid.prod(-1).tolist()
        wanted = query.student_images.tolist()
        own_patches, own_places = ([torch.split(t, sizes)[i] for i in wanted] for t in (restored, places))
        padded = pad_sequence(own_places, batch_first=True)
        words = self.get_input_embeddings()(query.prompt_ids)
        detach = torch.Tensor.detach if self.detach_memory else lambda tensor: tensor
        return Memory(
            patches=detach(pad_sequence(own_patches, batch_first=True)),
            patch_mask=pad_sequence([torch.ones_like(p[:, 0], dtype=torch.bool) for p in own_places], batch_first=True),
            rows=padded[..., 0],
            columns=padded[..., 1],
            grid=grid[query.student_images, 1:],
            words=detach(words),
            word_mask=query.prompt_mask,
        )

    detach_memory = False
    """Stop the head's gradient before the model; set while loading."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, but the folder names the stock architecture, so that other tools can serve it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if kwargs.get("is_main_process", True):
            described = json.loads(path.read_text(encoding="utf-8")) | {"architectures": [_ARCHITECTURE]}
            path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(
    folder: str | Path, config: ModelConfig, detection: DetectionConfig | None = None, *, for_training: bool = True
) -> BBUModel:
    """Load the weights in `config.torch_dtype` with the configured attention of both towers.

    detection: build the head it describes, with the folder's weights where it has some; None takes the folder's
    own head, if it has one. Raises ModelError for a missing folder, a foreign architecture, weights that leave
    parameters unset, or a head of another shape.
    """
    path = check_folder(folder)
    _register_layout()
    if VARLEN in (config.attn_implementation, config.vision_attn_implementation):
        register_varlen()
    try:
        described = _with_head(Qwen2_5_VLConfig.from_pretrained(path, local_files_only=True), detection, path)
        with _quiet():
            loaded: Any = BBUModel.from_pretrained(
                path,
                config=described,
                dtype=_DTYPES[config.torch_dtype],
                attn_implementation={
                    "text_config": config.attn_implementation,
                    "vision_config": config.vision_attn_implementation,
                },
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot load the model ({_first_line(error)}); check the folder") from error
    model, report = loaded  # a pair because of output_loading_info
    _check_complete(model, set(report["missing_keys"]), path)
    if config.vision_attn_implementation == VARLEN:
        use_varlen_vision(model)
    elif config.vision_attn_implementation in LOOPED:
        use_batched_windows(model)
    if detection is not None:
        model.detach_memory = detection.detection_detach_memory
    return _prepare_for_training(model, config) if for_training else model


def _with_head(config: Qwen2_5_VLConfig, detection: DetectionConfig | None, path: Path) -> Qwen2_5_VLConfig:
    """The folder's config with the head that is asked for; ModelError where it has one of another shape."""
    if detection is None:
        return config
    own = getattr(config, HEAD_KEY, None)
    wanted = HeadSpec.of(detection).as_dict() if detection.detection_enabled else None
    if own and wanted and (other := sorted(k for k in wanted if own.get(k) != wanted[k])):
        raise ModelError(f"{path}: its detection head has another {', '.join(other)}; use its own run_config.yaml")
    setattr(config, HEAD_KEY, wanted)
    return config


def _check_complete(model: BBUModel, missing: set[str], path: Path) -> None:
    """A head may be wholly absent, and then begins anew; anything else must be there."""
    head = model.detection_head
    own = {f"detection_head.{name}" for name, _ in head.named_parameters()} if head else set()
    if head is not None and own <= missing:
        with whole(list(head.parameters()), change=True):
            head.reset_parameters()
        missing = missing - own
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ModelError(f"{path}: weights are incomplete, for example {names}; copy the model again")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; raises ModelError where it cannot be read."""
    path = check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the tokenizer ({_first_line(error)}); check the folder") from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """What batches are padded with; ModelError where the tokenizer names none."""
    if not isinstance(tokenizer.pad_token_id, int):
        raise ModelError(f"{folder}: the tokenizer has no pad token; copy the tokenizer files of Qwen2.5-VL again")
    return tokenizer.pad_token_id


def load_image_processor(folder: str | Path) -> Qwen2VLImageProcessorPil:
    """The folder's image processor on Pillow: the stock one needs torchvision, which has no CPU build here."""
    path = check_folder(folder)
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the image processor ({_first_line(error)})") from error


def check_folder(folder: str | Path) -> Path:
    """The folder, if it holds a Qwen2.5-VL; else ModelError in one line."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder; correct model_path or copy the model there")
    absent = [name for name in _NEEDED if not (path / name).is_file()]
    if absent:
        raise ModelError(f"{path}: no {', '.join(absent)}; model_path must be a complete Qwen2.5-VL folder")
    try:
        Qwen2_5_VLConfig.from_pretrained(path, local_files_only=True)
        kind = Qwen2_5_VLConfig.get_config_dict(path, local_files_only=True)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: config.json cannot be read ({_first_line(error)})") from error
    if kind != "qwen2_5_vl":
        raise ModelError(f"{path}: model_type is {kind!r}; model_path must be a Qwen2.5-VL (qwen2_5_vl)")
    return path


def whole(parameters: list[torch.nn.Parameter], *, change: bool = False) -> AbstractContextManager[Any]:
    """Have parameters in one piece for a block: under ZeRO-3 each rank holds a part. With `change`, rank 0's stay."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters, modifier_rank=0 if change else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of keys it missed: `_check_complete` tells what is wrong, in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _register_layout() -> None:
    """Weights on disk are named otherwise than in memory; transformers looks the names up by class name."""
    stock: Any = get_checkpoint_conversion_mapping(_ARCHITECTURE)
    register_checkpoint_conversion_mapping(BBUModel.__name__, stock, overwrite=True)


def _prepare_for_training(model: BBUModel, config: ModelConfig) -> BBUModel:
    # Both: Trainer only sets the outer one, the text model reads its own; a live cache makes packed samples
    # leak into each other under sdpa.
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": config.gradient_checkpointing_reentrant})
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
