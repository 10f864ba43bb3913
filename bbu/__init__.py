"""Fine-tunes Qwen2.5-VL-3B to find and describe the parts in photos of BBU equipment, as jobs of a Slurm cluster."""

import sys

__version__ = "0.2.0"

if sys.argv[:1] == ["-m"]:  # `python -m bbu.…`: Python's own word while it looks for the entry
    from bbu.errors import prepare_entry

    prepare_entry()
