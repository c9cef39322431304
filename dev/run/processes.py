"""
Who else trains with us. Processes is a process that is alone, and so says what all others override: every call returns
at once. The loop and the engines therefore need not ask how many there are.
"""
import contextlib
import sys

from dev.run.console import say


class Processes:
    """All processes of a run, seen from one of them. local_rank counts those of the same machine."""

    rank, size, local_rank, local_size = 0, 1, 0, 1
    zero_stage = 0  # 1: each process has AdamW's moments for its pieces of the tensors only

    # gradients and parameters: an engine's calls

    def reduce(self, arrays):
        """Begin to sum float32 arrays over all processes, in place, and return at once. All call it in the same order.
        """

    def wait(self):
        """Return when all that reduce() has begun is done."""

    def pieces(self, tensor):
        """The views of a parameter tensor, (L, ...) or (rows, ...), that this process updates: all of it"""
        return [tensor]

    def gather(self, tensor):
        """Give every process's pieces of an updated tensor to all others."""

    # numbers, words: the loop's calls

    def sum(self, value):
        """The sum of a number over all processes"""
        return value

    def any(self, flag):
        """Is the flag true in one of the processes? In all of them the same answer"""
        return bool(flag)

    @contextlib.contextmanager
    def first(self):
        """A context that one process of each machine enters before the others, which then find what it has made."""
        yield

    def print(self, *values, **options):
        """print() in the first process, see say()"""
        if self.rank == 0:
            say(*values, **options)

    def abort(self, status):
        """End all processes now."""
        sys.exit(status)


ALONE = Processes()
