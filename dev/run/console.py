"""
Standard input, output and error: whatever becomes of them, a program goes on. Every program's main() runs in program()
or begins with open_console(); what is printed by say() raises nothing, and cannot steer a terminal.
"""
import concurrent.futures
import contextlib
import io
import os
import re
import sys

# what moves the cursor, colours, or turns the direction of text; and halves of surrogate pairs
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BAD_INPUT = ValueError, OSError, MemoryError, RecursionError, EOFError  # what a program ends with in one line


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
        print(*map(plain, values), **{"flush": True, "file": file, **options})
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


def plain(text):
    """A text of which a terminal shows every character: what would steer it is spelt out, as \\x1b. Lines stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shown(name, longest=400):
    """A name or a text that others chose, such as a tensor's, on one line of bounded length: it cannot pass for a line
    of ours."""
    text = str(name)
    text = text if len(text) <= longest else f"{text[:longest // 2]} … {text[-longest // 4:]}"
    return plain(text).replace("\n", "\\n")


def complaint(error):
    """The line `error: …` for an exception, and its hints in lines of their own"""
    kind = "not enough memory" if isinstance(error, MemoryError) else \
           "something is nested too deeply" if isinstance(error, RecursionError) else ""
    first, *hints = str(error).split("\n---> HINT: ")
    first = ": ".join(filter(None, [kind, shown(first.strip(), 4000)])) or type(error).__name__
    return "\n---> HINT: ".join([f"error: {first}", *(shown(hint, 4000) for hint in hints)])


def program(main, *arguments):
    """Run a program's main() and return its exit status. Bad input, a full disk, a dead network: one line on standard
    error, and 1."""
    open_console()
    try:
        return main(*arguments) or 0
    except KeyboardInterrupt:
        problem = "\nerror: interrupted; run the same command again"
    except BrokenPipeError:  # as in `| head`: nobody wants the rest
        lose(sys.stdout)
        return 1
    except concurrent.futures.BrokenExecutor:
        problem = "error: a worker process died\n---> HINT: out of memory? --workers 1 needs the least"
    except BAD_INPUT as error:  # the exceptions of requests are OSErrors
        problem = complaint(error)
    say(problem, file=sys.stderr)
    say(end="")  # what a full disk did not take is lost now, not by an error of Python's at the end
    return 1
