"""
Signals: what they ask a run for, and how what takes long is cut short.
"""
import contextlib
import os
import signal
import sys


class CutShort(Exception):
    """A stop was requested while something was under way that can be done again."""


class Stop:
    """What signals have asked for since it was made

    requested: to stop, by Ctrl-C, SIGTERM or SIGHUP (the terminal is closed). Ctrl-C or SIGTERM once more ends the
    program at once. checkpoint: for a checkpoint, by these or by SIGUSR1 (Slurm's warning), after which a run goes on.
    write(): writes a checkpoint if it has been asked for. alone: False where other processes train along, which must do
    the same at the same step
    """

    def __init__(self, write, alone=True):
        self.requested, self.checkpoint, self.write, self.alone = False, False, write, alone
        for name, act in (("SIGINT", self.end), ("SIGTERM", self.end), ("SIGHUP", self.end), ("SIGUSR1", self.warn)):
            number = getattr(signal, name, None)  # Windows has only two of them
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                signal.signal(number, act)

    def end(self, number, frame):
        hangup = number == getattr(signal, "SIGHUP", None)  # which a shell repeats for its jobs
        if self.requested and not hangup:
            sys.exit(130)
        if not self.requested:
            with contextlib.suppress(OSError):  # nobody may be there to read it; print() may be at work on its buffer
                os.write(2, b"\nstopping after this step (once more: at once)\n")
        self.requested = self.checkpoint = True

    def warn(self, number, frame):
        self.checkpoint = True

    def during(self, items):
        """The items, one after another, with a checkpoint in between where one has been asked for. Raises CutShort
        instead of the next one, or of the end, where a stop has been requested. Not so where others train along."""
        for item in items:
            if self.requested and self.alone:
                break
            if self.checkpoint and self.alone:
                self.write()
            yield item
        if self.requested and self.alone:
            raise CutShort
