"""`python stock_program.py FOLDER…`: a stock transformers of any version loads model folders and answers about a photo.

Writes `stock-{version}.json` into each folder, with what it computed. It imports nothing of this project, because it
also runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

IS_5 = transformers.__version__.startswith("5.")
if IS_5:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor
else:
    from transformers import Qwen2VLImageProcessor as ImageProcessor

MESSAGES = [
    {"role": "system", "content": "只输出JSON"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "请检测 <|im_end|> 123, é"}]},
]
RECORDED = ("temperature", "repetition_penalty", "eos_token_id", "pad_token_id", "do_sample")


def draw_photo() -> Image.Image:
    photo = Image.new("RGB", (260, 190), "grey")
    ImageDraw.Draw(photo).rectangle((20, 30, 120, 90), fill="red")
    return photo


def compute(folder: Path) -> dict[str, Any]:
    """Everything that two versions must agree on."""
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    image = ImageProcessor.from_pretrained(folder)(images=[draw_photo()], return_tensors="pt")
    count = int(image["image_grid_thw"].prod()) // 4
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
    if IS_5:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, max_new_tokens=12)
    return {
        "loading": {key: sorted(map(str, value)) for key, value in report.items() if value},
        "text": text,
        "ids": ids.tolist(),
        "grid": image["image_grid_thw"].tolist(),
        "pixels": image["pixel_values"].double().sum(1).tolist(),
        "logits": logits[0].double().tolist(),
        "answer": tokenizer.decode(answer[0, ids.shape[1] :]),
        "sampled": sampled[0, ids.shape[1] :].tolist(),
        "generation": {name: getattr(model.generation_config, name) or None for name in RECORDED},
        "special_tokens": sorted(map(str, tokenizer.all_special_tokens)),
        "ends": [tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)],
        "tied": model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
        "dtype": str(model.dtype),
        "use_cache": config.get_text_config().use_cache,
    }


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        path = folder / f"stock-{transformers.__version__[:4]}.json"
        path.write_text(json.dumps(compute(folder), ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
