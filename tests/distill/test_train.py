import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_refused_inputs_leave_no_folder_behind(tmp_path: Path):
    command = [sys.executable, "train.py", "experiment=rcm_wan1_3b", "device=cpu", f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("teacher= is missing")
    assert not list(tmp_path.iterdir())
