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
    with _beside(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise UserError(f"{path} needs {size / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free")
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder.  An old one is replaced if it holds only files that the new one has too."""
    with _beside(path) as part:
        part.mkdir(parents=True)
        yield part
        old = part.with_suffix(".old")
        if path.exists():
            if foreign := sorted({p.name for p in path.iterdir()} - {p.name for p in part.iterdir()}):
                names = ", ".join(foreign[:5])
                raise UserError(f"{path} also holds {names}; choose another folder or empty it yourself")
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}); nothing partial was left") from error
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
