"""
Signals: what they ask a run for, and how what takes long is cut short.
"""
import contextlib
import os
import signal
import sys

import numpy as np

from dev.run.processes import ALONE


class CutShort(Exception):
    """A stop was requested while something was under way that can be done again."""


class Stop:
    """What signals have asked for since it was made

    requested: to stop, by Ctrl-C, SIGTERM or SIGHUP (the terminal is closed). Ctrl-C or SIGTERM once more ends the
    program at once. checkpoint: for a checkpoint, by these or by SIGUSR1 (Slurm's warning), after which a run goes on.
    write(stop, checkpoint): writes a checkpoint if asked() says that it should, and returns whether to stop. folder:
    where a file STOP stops the run, too. processes: all of them do the same at the same place.
    """

    def __init__(self, write, folder=None, processes=ALONE):
        self.requested, self.checkpoint, self.write = False, False, write
        self.path, self.processes = folder and os.path.join(folder, "STOP"), processes
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
                os.write(2, b"\nstopping after this batch (once more: at once)\n")
        self.requested = self.checkpoint = True

    def warn(self, number, frame):
        self.checkpoint = True

    def found(self):
        """Has this process been asked to stop? The first one also by the file STOP, which it removes"""
        if self.path and self.processes.rank == 0 and os.path.exists(self.path):
            self.processes.print(f"found {self.path}: stopping")
            os.unlink(self.path)
            self.requested = True
        return self.requested

    def asked(self, *more):
        """(stop, checkpoint): what any of the processes has been asked for. Who asks has to see to the checkpoint.
        more: what else may be so in this process; what follows is whether it is in any of them."""
        stopping = self.found()
        saving, self.checkpoint = self.checkpoint, False
        return self.processes.sum(np.array([stopping, saving, *more], np.int64)) > 0

    def during(self, items):
        """The items, one after another, with a checkpoint in between where one has been asked for. Raises CutShort
        instead of the next one, or of the end, where a stop has been requested. Several processes, which divide the
        items, look for that when each has had one."""
        for number, item in enumerate(items):
            if number % self.processes.size == 0:
                self.look()
            yield item
        self.look()

    def alone(self, items):
        """The same for items that only this process has. What others have been asked for waits until they are over."""
        for item in items:
            self.look(alone=True)
            yield item
        self.look(alone=True)

    def look(self, alone=False):
        stopping, saving = (self.found(), False) if alone and self.processes.size > 1 else self.asked()
        if stopping or saving and self.write(stopping, saving):
            raise CutShort
