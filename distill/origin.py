"""What a result was made with: code, libraries and device."""

import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def origin(device: torch.device) -> dict[str, str]:
    """Commit (unknown outside a git checkout), versions and the device's name."""
    is_cpu = device.type in ("cpu", "mps")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type if is_cpu else torch.get_device_module(device).get_device_name(device),
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
