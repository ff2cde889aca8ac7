"""The JSON beside a video: everything needed to make it again."""

import hashlib
import platform
import shlex
import subprocess
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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
    """The line to type in the repository for these options."""
    words = [f"{name}={_plain(value)}" for name, value in asdict(options).items() if value is not None]
    return shlex.join(["python", "infer.py", *words])


def absolute(options: Options) -> Options:
    """The options with files named from the root, so that the command works anywhere."""
    paths = {name: getattr(options, name) for name in PATHS}
    return replace(
        options, **{n: str(Path(p).expanduser().absolute()) for n, p in paths.items() if p is not None}
    )


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


def environment() -> dict[str, object]:
    """Versions, and the commit where this is a checkout."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = None
    return {
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "torch_build": torch.__version__,
    }


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
