"""
Who else trains with us. Processes is a process that is alone, and so says what all others override: every call returns
at once. The loop and the engines therefore need not ask how many there are.
"""
import contextlib
import os
import sys

from dev.run.console import say


class Processes:
    """All processes of a run, seen from one of them. local_rank counts those of the same machine."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    sharers = 1     # processes that may use this one's processors, itself among them
    zero_stage = 0  # 1: each process has AdamW's moments for its pieces of the tensors only
    times = {}      # seconds that sums have taken, for --profile

    def describe(self):
        """Lines for the start of a run"""
        return []

    # gradients and parameters: an engine's calls

    def reduce(self, arrays):
        """Begin to sum float32 arrays over all processes, in place, and return at once. All call it in the same order.
        """

    def wait(self):
        """Return when all that reduce() has begun is done."""

    def together(self, array):
        """The arrays of all processes, one below the other, when all that reduce() has begun is done"""
        return array

    def moments(self, table):
        """The (name, shape) of the moments that this process has, for a table of parameter tensors: all of them. Where
        they are shared out, (layers, n). ValueError where so many processes cannot share them."""
        return table

    def pieces(self, tensor):
        """The views of a tensor (layers, ...) that this process updates: all of it. Where the moments are shared out,
        n numbers of each layer."""
        return [tensor]

    def gather(self, tensor):
        """Begin to give every process's pieces of an updated tensor to all others. wait() ends it."""

    # numbers, words: the loop's calls

    def sum(self, value):
        """The sum of a number, or of an array's, over all processes"""
        return value

    def any(self, flag):
        """Is the flag true in one of the processes? In all of them the same answer"""
        return bool(flag)

    def agree(self, **numbers):
        """ValueError where one of the numbers, by their names, is another one in another process."""
        for name, number in numbers.items():
            if self.any(self.sum(number) != number * self.size):
                name = name.replace("_", " ")
                raise ValueError(f"the processes do not see the same files: {name} is {number} in process {self.rank}\n"
                                 "---> HINT: all machines need the same folder -o, and the same data")

    @contextlib.contextmanager
    def first(self):
        """A context that one process of each machine enters before the others, which then find what it has made."""
        yield

    def print(self, *values, **options):
        """print() in the first process, see say()"""
        if self.rank == 0:
            say(*values, **options)

    def close(self):
        """The run is over: wait for the others."""

    def abort(self, status):
        """End all processes now."""
        sys.exit(status)

    def fail(self, message, status):
        """Say what went wrong, on standard error, and end all processes; one that is alone returns its exit status."""
        say(message, file=sys.stderr)
        return status


ALONE = Processes()


def launched():
    """How many processes an MPI launcher says that it has started; 1 without a launcher"""
    names = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"  # Open MPI, MPICH, srun
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)


def processes_of(flags):
    """The Processes of a run. MPI is imported where there are several. ValueError where not all of them are there"""
    if flags.num_processes == 1 == launched():
        return ALONE
    from dev.run.mpi import Mpi
    return Mpi(flags.num_processes, flags.zero_stage)
