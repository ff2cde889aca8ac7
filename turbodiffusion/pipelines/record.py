"""The JSON beside a video: everything needed to make it again."""

import hashlib
import platform
import shlex
import subprocess
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from turbodiffusion.pipelines.options import Options

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("turbodiffusion", "torch", "transformers", "safetensors", "av")
EDGE = 2**20
# the options that name files
PATHS = (
    *("ckpt", "ckpt_low", "vae", "text_encoder", "tokenizer", "image_encoder"),
    *("image", "last_image", "out"),
)


def command(options: Options) -> str:
    """The line to type in the repository for these options; files are named from the root."""
    words = []
    for name, value in asdict(options).items():
        if isinstance(value, bool):
            words.append(f"{name}={str(value).lower()}")
        elif value is not None:
            words.append(f"{name}={Path(value).expanduser().absolute() if name in PATHS else value}")
    return shlex.join(["python", "infer.py", *words])


def fingerprint(path: Path) -> dict[str, object]:
    """Size and quick hash (of size and both ends, 1 MiB each) of a file, or of a folder's files together."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode() if path.is_dir() else str(size).encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
        total += size
    return {"path": str(path.absolute()), "bytes": total, "quick_sha256": digest.hexdigest()}


def environment() -> dict[str, str | None]:
    """Versions, and the commit where this is a checkout; None for what can not be told."""
    found = {"python": platform.python_version(), **dict.fromkeys((*PACKAGES, "commit"))}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            found[package] = version(package)
    if (ROOT / ".git").exists():
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.check_output(describe, text=True, stderr=subprocess.DEVNULL, timeout=10)
            found["commit"] = said.strip()
    return found
