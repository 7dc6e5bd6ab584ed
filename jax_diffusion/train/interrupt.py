"""Ctrl-C and SIGTERM as a question the loop asks between two dispatches."""

import signal


class Interrupt:
    """A context manager. The first SIGINT or SIGTERM sets `requested`; a second SIGINT breaks off at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested: str = ""

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __enter__(self):
        self._old = {}
        try:
            for number in self.SIGNALS:
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread, in a notebook's worker say: leave signals alone
            pass
        return self

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)
