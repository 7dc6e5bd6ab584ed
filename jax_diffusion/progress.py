"""One progress line on stderr for work that takes longer than two seconds."""

import sys
import time

QUIET_S = 2.0


class Progress:
    """Counts to `total`; silent for the first two seconds, then rate and time left."""

    def __init__(self, what: str, total: int):
        self.what = what
        self.total = total
        self.done = 0
        self.started = time.monotonic()
        self.shown: float | None = None  # time of the last line
        # A terminal rewrites one line; a log file gets a line only now and then.
        self.tty = sys.stderr.isatty()
        self.period = 0.5 if self.tty else 10.0

    def add(self, count: int) -> None:
        """Counts `count` more items as done, and may write the line."""
        self.done += count
        now = time.monotonic()
        elapsed = now - self.started
        last = self.done >= self.total
        if elapsed < QUIET_S or (last and self.shown is None):
            return
        if not last and self.shown is not None and now - self.shown < self.period:
            return
        self.shown = now
        rate = self.done / elapsed
        left = (self.total - self.done) / rate
        line = f"{self.what}: {self.done:,}/{self.total:,}, {rate:,.{0 if rate >= 10 else 2}f}/s, {left:.0f} s left"
        end = "\n" if last or not self.tty else ""
        sys.stderr.write(("\r\x1b[K" if self.tty else "") + line + end)
        sys.stderr.flush()
