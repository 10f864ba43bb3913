"""Checks that the files and folders which a conversion writes do not overwrite each other or the vendor's photos.

The config's rules compare names. Here, links and the spellings that one file system takes for one name count too.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from bbu.config.domains import DataConfig
from bbu.errors import ConfigError
from bbu.schema import REJECTS_FILE, REPORT_FILE, photos_hash_path


def check_outputs(config: DataConfig) -> None:
    """Check the places on disk that a conversion is about to write to.

    Raises:
        ConfigError: two of the files are one on this disk, or images would be written among the vendor's photos.
    """
    root = Path(config.data_root)
    places = {_place(root / name): f"the conversion's own {name}" for name in (REPORT_FILE, REJECTS_FILE)}
    for key in ("train_file", "val_file", "teacher_file"):
        records = root / getattr(config, key)
        for path in (records, photos_hash_path(records)):
            other = places.setdefault(_place(path), key)
            if other != key:
                raise ConfigError(f"{key} and {other} are one file on this disk ({path}); name different ones")
    images, vendor = (Path(os.path.realpath(path)) for path in (root / config.image_folder, config.vendor_dir))
    if images.is_relative_to(vendor) or vendor.is_relative_to(images):
        raise ConfigError(
            f"image_folder {root / config.image_folder} and vendor_dir {config.vendor_dir} lie in each other on this "
            "disk: images would overwrite the vendor's; keep them apart"
        )


def _place(path: Path) -> str:
    """A text that is equal for two paths that may be one file: links followed, capitals and accents in one form.

    The last part is not followed: a file that is written replaces a link of its name.
    """
    return unicodedata.normalize("NFC", os.path.join(os.path.realpath(path.parent), path.name)).casefold()
