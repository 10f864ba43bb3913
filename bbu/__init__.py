"""Fine-tunes Qwen2.5-VL-3B to find and describe the parts in photos of BBU equipment, as jobs of a Slurm cluster."""

__version__ = "0.2.0"
