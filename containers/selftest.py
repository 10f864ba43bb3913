"""Checks that an image holds the software it was built for. Run by %test of every image, with `cpu` or `cuda`."""

import sys

import accelerate
import deepspeed
import torch
import transformers
from deepspeed.git_version_info import installed_ops
from transformers import Qwen2_5_VLForConditionalGeneration

COMPILED_OPS = {"cpu": ["deepspeed_shm_comm"], "cuda": ["fused_adam", "utils"]}
"""The parts of DeepSpeed that each image compiles."""


def main(kind: str) -> None:
    missing = [name for name in COMPILED_OPS[kind] if not installed_ops[name]]
    assert not missing, f"DeepSpeed was built without {missing}"
    assert torch.ones(3).sum().item() == 3
    assert Qwen2_5_VLForConditionalGeneration.main_input_name == "input_ids"
    if kind == "cuda":
        import flash_attn
        import flash_attn_2_cuda  # noqa: F401  the compiled part; it loads without a GPU

        assert torch.version.cuda == "13.0", torch.version.cuda
        print("flash-attn", flash_attn.__version__)
    for package in (torch, transformers, accelerate, deepspeed):
        print(package.__name__, package.__version__)


main(sys.argv[1])
