"""
The output folder of a run: who may write there, main.log, and what earlier runs have left.

Nothing that was there before changes until the first step has succeeded: until then a run may have been a mistake.
"""
import contextlib
import os
import re

import numpy as np

from dev.run.checkpoints import (
    checkpoint_files,
    complete_checkpoints,
    loosen,
    remove_checkpoint,
    remove_old_checkpoints,
    save,
)
from dev.run.console import say, shown
from dev.run.files import remove_temporary, write_file
from dev.run.found import model_file
from dev.run.vocabulary import beside, keep_tokenizer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILES = r"main\.log|DONE_\d{8}|model_\d{8}\.bin|state_\d{8}_\d{5}\.bin|run_\d{8}\.json"  # what a run writes


@contextlib.contextmanager
def own_folder(flags, processes):
    """A context in which no other run has the folder -o. It is made if need be, and removed if nothing came into it.
    The first of several processes sees to that. ValueError where another run has it, or where it holds a run and
    nothing says what is to become of that."""
    if processes.rank > 0:
        yield
        return
    folder = flags.output_dir
    made = bool(folder) and not os.path.isdir(folder)
    if folder:
        os.makedirs(folder, exist_ok=True)
    try:
        with locked(folder):
            refuse_old_run(flags)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)


@contextlib.contextmanager
def locked(folder):
    """A context that has a lock on a folder: without a file of its own, and ended with the process, however that ends.
    Where the system or the file system (NFS) has no such locks there is none, which is said."""
    with contextlib.ExitStack() as stack:
        try:
            if folder and fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif folder:
                raise OSError("no flock")
        except BlockingIOError:
            raise ValueError(f"another run is writing to {folder}\n---> HINT: wait for it, stop it, or name another "
                             "folder with -o") from None
        except OSError:
            say(f"{folder} cannot be locked: nothing keeps another run from writing there too")
        yield


def refuse_old_run(flags):
    """ValueError where a new run would overwrite an old one and neither -y 1 nor --overwrite 1 says so"""
    folder = flags.output_dir
    if not folder or flags.resume or flags.overwrite:
        return
    steps, log = complete_checkpoints(folder), os.path.join(folder, "main.log")
    if steps:
        raise ValueError(f"{folder} holds a run's checkpoints, the newest of step {steps[-1]}\n---> HINT: -y 1 goes on "
                         "from it, --overwrite 1 begins anew in its place, -o names another folder")
    if os.path.isfile(log) and os.path.getsize(log):
        raise ValueError(f"{log} is a run's log\n---> HINT: --overwrite 1 begins anew in its place, -o names another "
                         "folder")


class Output:
    """What a run leaves in its folder, if it has one. Of several processes the first writes the log."""

    def __init__(self, flags, run):
        self.flags, self.run, self.folder = flags, run, flags.output_dir
        self.logs = self.folder and run.engine.processes.rank == 0
        self.path = os.path.join(self.folder or "", "main.log")
        self.begun, self.waiting, self.full = False, b"", False  # what of the log is to be written; full: it could not
        self.saved = run.resumed  # the step whose checkpoint is there, or was tried, and whether looks were over there

    def describe(self, steps):
        """Lines that say what will become of the run in the folder; steps: the run's, in all"""
        flags, run, lines = self.flags, self.run, []
        if not self.folder:
            lines += ["nothing of this run is kept: -o FOLDER saves its log and weights"]
        elif run.resumed:
            began, changed = run.settings["-e"], [name for name in run.changed if name != "-e"]
            other = flags.model_given and os.path.realpath(began) != os.path.realpath(flags.model)
            notes = [f"-e {flags.model} ignored"] * other + [f"changed: {', '.join(changed)}"] * bool(changed)
            notes += [f"data: {', '.join(run.data)}"] * bool(run.data)
            lines += [f"resuming {shown(began)} from {self.folder}, step {run.step} of {steps}"
                      + (f" ({'; '.join(notes)})" if notes else "")]
            if run.step >= steps:
                lines += ["the run has finished: no step is left\n---> HINT: a greater -x goes on from it"]
        elif self.folder and flags.resume:
            lines += [f"no checkpoint in {self.folder} yet: starting from {flags.model}"]
        elif self.folder and complete_checkpoints(self.folder):
            lines += [f"starting anew in {self.folder}: the old run there goes when the first step has succeeded"]
        return lines

    def log(self, line):
        self.waiting += f"{line}\n".encode() if self.logs else b""
        if self.begun:
            self.write_log()

    def write_log(self):
        """Write what waits. Where there is no room, or no folder, it goes on waiting: no run ends for its log."""
        try:
            while self.waiting:
                with open(self.path, "ab", 0) as file:
                    self.waiting = self.waiting[file.write(self.waiting):]  # the last room takes a part of a line
                self.full = False
        except OSError as error:
            if not self.full:
                self.run.engine.processes.print(f"cannot write {self.path}: {error.strerror}: its lines wait until "
                                                "that is over")
            self.full = True

    def wanted(self):
        """Is there something that a checkpoint would save? Not where one was just resumed, nor before the first step in
        the place of an old run."""
        new = self.begun or self.run.resumed or not complete_checkpoints(self.folder)
        return bool(new) and self.unsaved()

    def unsaved(self):
        return self.saved != (self.run.step, self.run.coins is None)

    def save(self):
        """Write a checkpoint; returns the seconds that it took."""
        self.saved = self.run.step, self.run.coins is None
        self.begin()
        if self.logs:
            loosen(self.folder, self.run.step)
        self.run.engine.processes.any(False)  # no process writes before the first one has removed what is old
        return save(self.flags, self.run)

    def begin(self):
        """Remove what a run that was killed, or that is not resumed, has left; keep the tokenizer that the model brings
        along; begin the log."""
        if self.logs and not self.begun:
            remove_temporary(self.folder, FILES)
            if self.run.resumed:
                flags = self.flags
                remove_old_checkpoints(self.folder, flags.checkpoints_keep, flags.major_checkpoint_every)
            else:
                keep_tokenizer(beside(model_file(self.flags.model)), checkpoint_files(self.folder, 0)[1])
                for step in complete_checkpoints(self.folder):
                    remove_checkpoint(self.folder, step)
            begin_log(self.path, self.run.resumed)
            self.write_log()
        self.begun = True


def begin_log(path, resumed):
    """Begin main.log. Of a run that goes on, those lines stay that its checkpoint knows: before `resumed`, a step and
    whether validation at that step is over."""
    lines = []

    def known(line):  # at the checkpoint's step, validation came before it, training after
        match = re.match(rb"s:(\d+) (\w+):.*\n", line)
        return match and (int(match[1]), match[2] == b"trl") < resumed
    if resumed and os.path.isfile(path):
        with open(path, "rb") as file:  # as it is: not every byte may be text
            lines = filter(known, file.readlines())
    write_file(path, np.frombuffer(b"".join(lines), np.uint8))
