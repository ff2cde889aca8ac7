"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from turbodiffusion.errors import UserError


@contextmanager
def appearing(path: Path, size: int = 0) -> Iterator[Path]:
    """A temporary file beside `path` that becomes it when the block ends well and vanishes when it does not.

    Raises UserError if the disk lacks `size` bytes, or whatever else keeps the file from being written.
    """
    part = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(f"{path} needs {size / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free")
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}); no partial file was left") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder.  An old one is replaced if it holds only files that the new one has too."""
    part = _beside(path)
    try:
        part.mkdir(parents=True)
        yield part
        old = _beside(path).with_suffix(".old")
        if path.exists():
            if foreign := sorted({p.name for p in path.iterdir()} - {p.name for p in part.iterdir()}):
                names = ", ".join(foreign[:5])
                raise UserError(f"{path} also holds {names}; choose another folder or empty it yourself")
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}); no partial folder was left") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")
