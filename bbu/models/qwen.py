"""Qwen2.5-VL with a detection head, and what is read from a model folder: weights, tokenizer, image processor.

Nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
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

from bbu.config.domains import DetectionConfig, ModelConfig
from bbu.errors import ModelError
from bbu.models.adapters import AdapterSpec, add_adapters, find_base, has_adapters, load_adapters, save_adapters
from bbu.models.attention import (
    VARLEN,
    check_attention_is_available,
    register_text_attention,
    register_varlen,
    text_options,
    use_windowed_attention,
)
from bbu.models.denoising import Denoising
from bbu.models.detection_head import DetectionHead, DetectionOutput, HeadSpec, Memory
from bbu.models.head_files import has_own_weights, load_head, load_spec, save_head, split_weights, weight_names
from bbu.models.layout import HeadLayout, Layout, TextLayout, plan_layout
from bbu.models.model_files import load_chat_template, write_config
from bbu.run.folder import ADAPTER_CONFIG, HEAD_KEY, is_adapter_folder
from bbu.strict_json import read_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_REQUIRED_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
_OPTIONAL_FILES = ("generation_config.json",)
"""Files that transformers replaces by defaults, without a word, where they are damaged."""
_ARCHITECTURE = Qwen2_5_VLForConditionalGeneration.__name__

MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw",
)  # fmt: skip
"""The keys of a batch, padded or packed, that the model takes; the rest is for the head, losses and logs."""

_StatesReader = Callable[[torch.Tensor, torch.nn.Module], Any]
"""Takes the last states [B, S, H] and the language head [*, H] -> [*, V].

B rows, S tokens in a row, H width of the language model, V tokens in the vocabulary; * stands for any dimensions.
"""
_DetectionReader = Callable[[DetectionOutput, "BBUModel"], Any]


@dataclass(frozen=True)
class DetectionQuery:
    """The part of a batch that the detection head sees. N samples, T prompt tokens."""

    student_images: torch.Tensor
    """[N] int64: row of image_grid_thw of each sample's student image."""
    prompt_ids: torch.Tensor
    """[N, T] int64: tokens of the instruction, padded on the right."""
    prompt_mask: torch.Tensor
    """[N, T] bool: True at real tokens."""
    denoising: Denoising | None = None
    """Denoising queries, in training alone."""


class BBUModel(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, with a detection head where its config describes one.

    A loss reads the model's states inside `forward`, through the two readers. DDP, ZeRO and autocast act on `forward`
    alone, and so act on such a loss too; and a loss that needs the logits at a tenth of the positions computes only
    those.
    """

    base_fingerprint: str | None = None
    """Identifies the base model's weights where the model has adapters."""
    detach_memory = False
    """Stop the head's gradient before the model; `load_model` sets it from detection_detach_memory."""

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__(config)
        visual: Any = self.model.visual
        use_windowed_attention(visual)
        self.detection_head = _build_head(config)

    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)  # generate() looks for arguments by name
    def forward(
        self,
        *args: Any,
        read_states: _StatesReader | None = None,
        detection: DetectionQuery | None = None,
        read_detection: _DetectionReader | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run Qwen2.5-VL as usual or, with a reader, return the pair of what the two readers return.

        Args:
            args, kwargs: arguments of Qwen2.5-VL's own forward pass.
            read_states: reads the language model's last states; without it the language model does not run.
            detection: what the head sees; needed with `read_detection`.
            read_detection: reads the head's output; without it the head does not run.
            layout: where things lie in the batch, if it is known already; else the host waits for the device.

        Returns:
            Qwen2.5-VL's output or, with a reader, (result of read_states, result of read_detection), where None
            stands for the reader that is not given.
        """
        if read_states is None and read_detection is None:
            return super().forward(*args, **kwargs)
        if layout is None:
            layout = self._plan_layout(kwargs, detection)
        visual: Any = self.model.visual
        pixels = kwargs["pixel_values"].type(visual.dtype)
        vision = visual(pixels, grid_thw=kwargs["image_grid_thw"], **layout["vision"])
        from_language = from_detection = None
        if read_states is not None:
            assert layout["text"] is not None
            from_language = read_states(self._text_states(kwargs, vision.pooler_output, layout["text"]), self.lm_head)
        if read_detection is not None:
            assert self.detection_head is not None and detection is not None and layout["head"] is not None
            memory = self._head_memory(vision.last_hidden_state, layout["head"], detection)
            from_detection = read_detection(self.detection_head(memory, detection.denoising), self)
        return from_language, from_detection

    def _plan_layout(self, batch: dict[str, Any], detection: DetectionQuery | None) -> Layout:
        images = None if detection is None else detection.student_images
        layout = plan_layout({**batch, "student_images": images}, self.config.vision_config)
        moved: Any = send_to_device(layout, batch["image_grid_thw"].device, non_blocking=True)
        return moved

    def _text_states(self, batch: dict[str, Any], features: torch.Tensor, text: TextLayout) -> torch.Tensor:
        """The language model's last states [B, S, H] of rows that are packed, or padded on the right.

        What the stock model does, but placeholders are replaced by index: by a mask, the backward pass would wait.

        Shapes: features [M, H]; B rows, S tokens in a row, M placeholders, H width of the language model.
        """
        words = self.get_input_embeddings()(batch["input_ids"])
        inputs = words.flatten(0, 1).index_copy(0, text["placeholders"], features.to(words.dtype)).view_as(words)
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if positions is None:
            positions = self.model.get_rope_index(
                batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"], attention_mask=mask
            )[0]
        options = text_options(self.config.get_text_config(), text, mask)
        language: Any = self.model.language_model
        return language(inputs_embeds=inputs, position_ids=positions, use_cache=False, **options)[0]

    def _head_memory(self, patches: torch.Tensor, head: HeadLayout, query: DetectionQuery) -> Memory:
        """Collect what the head sees of each sample.

        Shapes: patches [P, C], last states of the vision tower for all images (P patches, C width of the tower).
        """
        # Take the students' images alone; the mask clears the padding.
        states = patches[head["patches"]] * head["mask"][..., None]
        words = self.get_input_embeddings()(query.prompt_ids)
        return Memory(
            patches=states.detach() if self.detach_memory else states,
            patch_mask=head["mask"],
            rows=head["places"][..., 0],
            columns=head["places"][..., 1],
            grid=head["grid"],
            extent=head["extent"],
            words=words.detach() if self.detach_memory else words,
            word_mask=query.prompt_mask,
        )

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a folder of the stock architecture that other tools load, with the head in a folder of its own.

        With adapters it is a folder of peft, which names its base model.

        Args:
            save_directory: the model folder.
            is_main_process: whether this process writes the files.
            state_dict: all weights by name, where ZeRO-3 had to gather them; None takes this model's.
            kwargs: further arguments of transformers' `save_pretrained`, such as `max_shard_size`.
        """
        weights, head = split_weights(self.state_dict() if state_dict is None else state_dict)
        if has_adapters(self):
            if is_main_process:
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                save_adapters(self, Path(save_directory), weights)
                save_head(Path(save_directory), getattr(self.config, HEAD_KEY, None), head)
            return
        if self.config.tie_word_embeddings:
            # DeepSpeed hands over copies, in which transformers recognises no tied weight and would save it twice.
            weights = {name: tensor for name, tensor in weights.items() if name not in (self._tied_weights_keys or ())}
        super().save_pretrained(save_directory, is_main_process, weights, **kwargs)
        if is_main_process:
            write_config(Path(save_directory), self.config, _ARCHITECTURE)
            save_head(Path(save_directory), getattr(self.config, HEAD_KEY, None), head)


def _build_head(config: Any) -> DetectionHead | None:
    """The head that a Qwen2.5-VL config describes under HEAD_KEY, None where it describes none."""
    spec = getattr(config, HEAD_KEY, None)
    if not spec:
        return None
    widths = {"vision_width": config.vision_config.hidden_size, "language_width": config.text_config.hidden_size}
    return DetectionHead(HeadSpec(**spec), **widths)


def load_model(
    folder: str | Path,
    config: ModelConfig,
    detection: DetectionConfig | None = None,
    adapters: AdapterSpec | None = None,
    *,
    for_training: bool = True,
) -> BBUModel:
    """Load a model folder with the configured dtype and attention of both towers.

    Adapters in training are float32, and so is the detection head beside them.

    Args:
        folder: a Qwen2.5-VL, or a checkpoint of this program; one of adapters is loaded on its base model.
        config: dtype, attention and gradient checkpointing.
        detection: describes the head to build; it takes the folder's weights where the folder has a head. None takes
            the folder's head as it is, if there is one.
        adapters: the adapters to train, new ones or those of the folder.
        for_training: switch the cache off and gradient checkpointing on, if configured.

    Raises:
        ModelError: the folder is missing or incomplete, or holds another architecture, a head of another shape or
            other adapters; or their base model is gone or has changed.
        ConfigError: this machine lacks the configured attention.
    """
    path = check_folder(folder)
    base = path
    if is_adapter_folder(path):
        _check_rank_is_set(path, adapters, for_training)
        base = check_folder(find_base(path, config.model_path))
    model, missing = _load_weights(base, path, config, detection)
    if adapters is not None and model.detection_head is not None:
        model.detection_head.float()
    _check_complete(_fill_head(model, missing, path), base)
    if is_adapter_folder(path):
        load_adapters(model, path, adapters)
    elif adapters is not None:
        add_adapters(model, adapters, base)
    if detection is not None:
        model.detach_memory = detection.detection_detach_memory
    return _prepare_for_training(model, config) if for_training else model


def _check_rank_is_set(path: Path, adapters: AdapterSpec | None, for_training: bool) -> None:
    """Refuse to train a folder of adapters as if it were a whole model."""
    if for_training and adapters is None:
        raise ModelError(
            f"{path}: holds adapters, but lora_rank is 0; merge them (python -m bbu.export --checkpoint {path} --merge "
            "OUT) and set model_path to OUT"
        )


def _load_weights(
    base: Path, path: Path, config: ModelConfig, detection: DetectionConfig | None
) -> tuple[BBUModel, set[str]]:
    """Load the weights in `base`, with room for the head that `path` or `detection` describes.

    Returns:
        The model, and the names of the parameters that the files do not hold.
    """
    implementations = _prepare_attention(config)
    _register_weight_names()
    try:
        qwen_config = _with_head(Qwen2_5_VLConfig.from_pretrained(base, local_files_only=True), detection, path)
        with without_transformers_warnings():
            loaded: Any = BBUModel.from_pretrained(
                base,
                config=qwen_config,
                dtype=_DTYPES[config.torch_dtype],
                attn_implementation=implementations,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base}: cannot load the model ({_first_line(error)}); check the folder") from error
    model, report = loaded  # a pair because of output_loading_info
    # With these, ZeRO-3 saves under old names (model.model.layers…), which other versions of transformers cannot load.
    model._weight_conversions = None
    return model, set(report["missing_keys"])


def _prepare_attention(config: ModelConfig) -> dict[str, str]:
    """Register the configured attentions and return transformers' names of them for both towers.

    Raises ConfigError where this machine lacks flash attention, which transformers would report as a defect of the
    folder. varlen is checked by those who use it.
    """
    names = {key: getattr(config, key) for key in ("attn_implementation", "vision_attn_implementation")}
    check_attention_is_available({key: name for key, name in names.items() if name != VARLEN})
    if VARLEN in names.values():
        register_varlen()
    return {
        "text_config": register_text_attention(config.attn_implementation),
        "vision_config": config.vision_attn_implementation,
    }


def _with_head(config: Qwen2_5_VLConfig, detection: DetectionConfig | None, path: Path) -> Qwen2_5_VLConfig:
    """Write the requested head into the config in memory; ModelError where the folder has one of another shape."""
    setattr(config, HEAD_KEY, None)
    if detection is not None and not detection.detection_enabled:
        return config
    spec = load_spec(path)
    saved = spec.as_dict() if spec else None
    requested = HeadSpec.from_config(detection).as_dict() if detection else saved
    if saved and requested and (differences := sorted(k for k in requested if saved[k] != requested[k])):
        raise ModelError(
            f"{path}: its detection head has another {', '.join(differences)}; use its own run_config.yaml"
        )
    setattr(config, HEAD_KEY, requested)
    return config


def _fill_head(model: BBUModel, missing: set[str], path: Path) -> set[str]:
    """Load the head from its own file, or initialise one where the folder has none.

    Args:
        model: the model with all weights that its main files hold.
        missing: names of the parameters that they do not hold.
        path: the model folder.

    Returns:
        The names that are still missing.
    """
    head = model.detection_head
    names = weight_names(head) if head else set()
    if head is None or (not has_own_weights(path) and not names <= missing):
        return missing  # no head, or one of an older checkpoint, which is loaded by now
    if not has_own_weights(path) and load_spec(path):
        raise ModelError(f"{path}: its config.json describes a detection head whose weights are gone; copy it again")
    with gathered_parameters(list(head.parameters()), write=True):
        if has_own_weights(path):
            load_head(head, path)
        else:
            _draw_head(head, model.config)
    return missing - names


def _draw_head(head: DetectionHead, config: Any) -> None:
    """Give a new head the weights that the seed of this process stands for, whatever else has been drawn since.

    They are drawn on the CPU in float32: ranks under DDP and ZeRO-3 have read the model in different ways by now, on
    different devices and in different dtypes, and train the same head all the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        drawn = _build_head(config)
    assert drawn is not None
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), drawn.parameters(), strict=True):
            parameter.copy_(value)


def _check_complete(missing: set[str], path: Path) -> None:
    """Raise ModelError where parameters are missing."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise ModelError(f"{path}: weights are incomplete, for example {names}; copy the model again")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, with a chat template in any case; raises ModelError where it cannot be read."""
    path = check_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the tokenizer ({_first_line(error)}); check the folder") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = load_chat_template(path)
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> int:
    """The token that batches are padded with; raises ModelError where the tokenizer has none."""
    if not isinstance(tokenizer.pad_token_id, int):
        raise ModelError(f"{folder}: the tokenizer has no pad token; copy the tokenizer files of Qwen2.5-VL again")
    return tokenizer.pad_token_id


def load_image_processor(folder: str | Path) -> Qwen2VLImageProcessorPil:
    """Load the folder's image processor in its Pillow version; raises ModelError where it cannot be read.

    The default version needs torchvision, which this environment lacks.
    """
    path = check_folder(folder)
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot load the image processor ({_first_line(error)})") from error


def check_folder(folder: str | Path) -> Path:
    """Return the folder as a path if it holds a Qwen2.5-VL, or adapters of one; else raises ModelError, in one line."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder; correct model_path or copy the model there")
    required = (ADAPTER_CONFIG, *_REQUIRED_FILES[1:]) if is_adapter_folder(path) else _REQUIRED_FILES
    absent = [name for name in required if not (path / name).is_file()]
    if absent:
        raise ModelError(f"{path}: no {', '.join(absent)}; model_path must be a complete Qwen2.5-VL folder")
    for name in (*required, *(name for name in _OPTIONAL_FILES if (path / name).is_file())):
        read_json(path / name, ModelError, "copy the model again")
    if not is_adapter_folder(path):
        _check_architecture(path)
    return path


def _check_architecture(path: Path) -> None:
    """Raise ModelError where config.json does not describe a Qwen2.5-VL."""
    try:
        Qwen2_5_VLConfig.from_pretrained(path, local_files_only=True)
        kind = Qwen2_5_VLConfig.get_config_dict(path, local_files_only=True)[0].get("model_type")
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: config.json does not describe a Qwen2.5-VL ({reason}); copy it again") from error
    if kind != "qwen2_5_vl":
        raise ModelError(f"{path}: model_type is {kind!r}; model_path must be a Qwen2.5-VL (qwen2_5_vl)")


def gathered_parameters(parameters: list[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
    """Gather parameters that ZeRO-3 has partitioned, for the duration of a `with` block.

    Without ZeRO-3 this does nothing.

    Args:
        parameters: the parameters to gather.
        write: keep rank 0's changes and send them to all ranks at the end of the block.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


@contextmanager
def without_transformers_warnings() -> Iterator[None]:
    """Hide transformers' table of missing weights, which `_check_complete` reports in one line, and its bar."""
    verbosity, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()


def _register_weight_names() -> None:
    """Give BBUModel the stock model's names of weights on disk, which transformers looks up by class name."""
    stock: Any = get_checkpoint_conversion_mapping(_ARCHITECTURE)
    register_checkpoint_conversion_mapping(BBUModel.__name__, stock, overwrite=True)


def _prepare_for_training(model: BBUModel, config: ModelConfig) -> BBUModel:
    # Both configs: Trainer sets the outer one only, but the text model reads its own. With a cache, packed samples
    # would see each other under sdpa.
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
