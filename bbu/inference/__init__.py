"""`from bbu.inference import Qwen25VLInference`, loaded at its first use: bbu.inference.parse needs no torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Qwen25VLInference":
        from bbu.inference.predictor import Qwen25VLInference

        return Qwen25VLInference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
