"""Ctrl-C and SIGTERM as a request to finish the step and save."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """While entered, the first Ctrl-C (or SIGTERM) sets `requested`; the second ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        # only the main thread may set handlers; elsewhere a signal cannot arrive either
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
