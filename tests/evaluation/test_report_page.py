"""report.html: what is in it, and that a browser shows it."""

import base64
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.records import Record, Score
from evaluation.report_page import Run, page, strip
from evaluation.vbench import T2V

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Sources(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def runs(folder: Path) -> list[Run]:
    """Two complete runs, of which the second does worse, on videos that exist but for one."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / "a dog-1.mp4").unlink()
    made = []
    for worse, run in enumerate(("teacher", "student <4 steps>")):
        records = [
            Record(f"{name}{i}", name, video, video[:-6], Score(0.8 - 0.05 * (i + 1) * worse - 0.01 * i))
            for name in T2V.dimensions
            for i, video in enumerate(names)
        ]
        generation = {"seconds": 30.0 / (1 + 9 * worse), "options": {"steps": 50 - 46 * worse, "crf": 18}}
        failure = {"video": "empty-0.mp4", "dimension": "color", "reason": "can not be <read>"}
        results = {"generation": generation, "failures": [failure], "notes": ["too few prompts"] * worse}
        made.append(Run(run, records, folder, results))
    return made


def test_a_page_holds_everything_and_fetches_nothing(runs: list[Run]) -> None:
    html = page("Comparison", runs)
    read = Sources(html)
    assert read.found
    assert all(source.startswith("data:image/") for source in read.found)
    # five plots: radar, bars, totals and latency, of which VBench's dimensions are all
    assert sum(source.startswith("data:image/svg") for source in read.found) == 4
    for said in (
        "student <4 steps>: lost most",
        "empty-0.mp4 can not be <read>",
        "student <4 steps>: too few",
        "steps",
    ):
        assert said in read.text
    # the last video by name lost most: 0.8 - 0.05 - 0.3 where it was 0.75
    assert "a dog-1.mp4 0.7500 to 0.4500; teacher above student <4 steps>" in read.text
    assert "a dog-1.mp4 can not be read as a video" in read.text


def test_the_worst_videos_of_a_run_are_of_different_prompts(runs: list[Run]) -> None:
    html = page("run", runs[1:])
    (part,) = re.findall("<h3>color</h3>(.*?)<h3>", html, re.DOTALL)
    assert re.findall("<figcaption>(.*?) <small>", part) == [
        "a dog-1.mp4",
        "a cat-1.mp4",
        "3-2 on the board-1.mp4",
    ]


def test_a_run_without_scores_has_a_page() -> None:
    failed = Record("a", "color", "a.mp4", "a", None, "can not be read")
    assert "can not be read" not in page("run", [Run("run", [failed])])


def test_frames_stand_side_by_side(tmp_path: Path, write_lossless: Callable[[Path, Tensor], None]) -> None:
    grey = torch.arange(0, 256, 32).byte()  # a frame of every shade
    write_lossless(tmp_path / "a.mp4", grey[:, None, None, None].expand(8, 16, 32, 3).contiguous())
    (encoded,) = re.findall('base64,(.*?)"', strip(tmp_path / "a.mp4"))
    with Image.open(BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.size == (8 * 32 * 7, 16 * 7)
        middles = [picture.convert("L").getpixel((112 + 224 * i, 56)) for i in range(8)]
    # JPEG of even patches: a rounding of each of its conversions
    assert middles == pytest.approx(grey.tolist(), abs=2)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page("Comparison", runs), encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    shot = tmp_path / "report.png"
    subprocess.run(
        [
            BROWSER,
            *flags,
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1250,5200",
            f"--screenshot={shot}",
            f"file://{tmp_path}/report.html",
        ],
        check=True,
        capture_output=True,
        timeout=100,
    )
    with Image.open(shot) as picture:
        assert picture.size == (1250, 5200)
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    # matplotlib's first two colours: the plots of both runs are drawn
    assert {(31, 119, 180), (255, 127, 14)} <= colors
