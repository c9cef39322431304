"""
Standard input, output and error: whatever becomes of them, a program goes on. Every program's main() begins with
open_console(); what is printed by say() raises nothing.
"""
import contextlib
import io
import os
import sys


def open_console():
    """Have characters that cannot be shown, or read, replaced instead of an error, and no file take the place of a
    standard stream that is closed."""
    if os.name == "posix":
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for stream in sys.stdin, sys.stdout:  # standard error replaces by itself
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(io.UnsupportedOperation):  # a debugger has read from it
                stream.reconfigure(errors="replace")


def say(*values, file=None, **options):
    """print(), flushed. Where nobody reads that any more (a closed pipe or
    terminal), or it has no room (a full disk), all that follows is lost without a word."""
    file = file or sys.stdout
    try:
        print(*values, **{"flush": True, "file": file, **options})
    except BlockingIOError:  # a terminal or a pipe that others have set not to wait for its reader
        os.set_blocking(file.fileno(), True)
    except (OSError, ValueError):  # ValueError: closed
        lose(file)


def lose(stream):
    """From now on what is written there goes nowhere, also what Python still holds and would write at its end."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (AttributeError, OSError, ValueError):  # no file of the system, or closed
        pass
