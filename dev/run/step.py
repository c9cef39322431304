"""
The middle of a step. A stop drops it, a damaged batch is passed over or ends the run, any other error ends it: until
the update begins, the weights are those of the step's beginning, and a checkpoint of that can be written.
"""
import contextlib

from dev.run.console import BAD_INPUT, say
from dev.run.reading import reason
from dev.run.shard import DamagedBatch
from dev.run.stop import CutShort

IN_A_ROW = 10  # so many damaged batches one after another are no damage here and there: they end the run


class Elsewhere(ValueError):
    """Another process could not read its batch."""
    known = True  # to all processes: they are at the same place


def micro_batches(flags, loader, stop):
    """This process's batches (inputs, targets) of a step, one after another

    Before each, a checkpoint is written where one has been asked for, and CutShort raised where a stop has. Of several
    processes, all pass over the batches of which one is damaged (--skip_bad 1), or end where one cannot be read.
    """
    processes, left, in_a_row = stop.processes, flags.micro_batches, 0
    while left:
        batch = problem = None
        for rank in range(processes.size):  # every process passes over the others', also where its own is damaged
            try:
                batch = loader.next_batch(rank == processes.rank) or batch
            except BAD_INPUT as error:
                problem = error
        bad = isinstance(problem, DamagedBatch)
        stopping, saving, damaged, lost = stop.asked(bad, problem is not None and not bad)
        if (stopping or saving) and stop.write(stopping, saving):
            raise CutShort
        if lost or damaged and (not flags.skip_bad or in_a_row == IN_A_ROW):
            raise known(problem)
        in_a_row = in_a_row + 1 if damaged else 0
        left -= not damaged
        if bad:
            say(f"passed over: {reason(problem)}")
        elif not damaged:
            yield batch


def known(problem):
    """The error for a batch that could not be read here, or elsewhere (None), of which all processes know"""
    if isinstance(problem, DamagedBatch):
        problem = DamagedBatch(f"{problem}\n---> HINT: --skip_bad 1 passes over damaged batches, up to {IN_A_ROW} in a "
                               "row")
    problem = problem or Elsewhere("another process could not read its batch")
    problem.known = True
    return problem


@contextlib.contextmanager
def rescued(run, output, report):
    """A context of a run's steps, which ends where one is cut short, or with an error. Then what has been trained until
    then is saved: a checkpoint of the last step's beginning, unless it is there or an update has begun. Of several
    processes none is written where only one has met the error: the others are somewhere else."""
    processes = run.engine.processes
    try:
        yield
    except CutShort:
        pass
    except Exception as error:
        together = processes.size == 1 or hasattr(error, "known")
        if together and output.folder and output.begun and output.unsaved() and run.place is not None:
            try:
                report.checkpoint(run.step, output.save())
            except Exception as second:  # a device that has failed, a full disk, weights that are no numbers
                processes.print(f"step {run.step} is not saved: {reason(second)}")
        if isinstance(error, Elsewhere):
            processes.any(False)  # who met it says so, and ends all
        raise
