"""Settings of torch that hold for a whole process: the same for training, evaluation and inference."""

from __future__ import annotations

import os

import torch
from transformers.utils.import_utils import enable_tf32

from bbu.config.domains import InfrastructureConfig, ModelConfig


def prepare_torch(model: ModelConfig, infra: InfrastructureConfig) -> None:
    """Set the threads on the CPU and the precision of float32 products on a GPU. Call it before a model is loaded.

    Args:
        model: `tf32`.
        infra: `cpu_threads`; 0 leaves torch's choice.
    """
    if infra.cpu_threads:
        torch.set_num_threads(infra.cpu_threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(infra.cpu_threads))  # else accelerate chooses a number, and warns
    if torch.cuda.is_available():
        enable_tf32(model.tf32)
