"""A tool called as its users call it."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A tool and its words -> exit code and what it printed."""

    def call(tool: ModuleType, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        code = 0
        try:
            tool.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call
