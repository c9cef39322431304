"""
What surrounds a run and knows no kernel; a part of the program.

Where one of the packages that it needs is missing, importing it says so in one line; and so does Ctrl-C while a program
of the project is still importing.
"""
import importlib.util
import os
import signal
import sys
import threading

TOP = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]


def interrupted(number, frame):
    """KeyboardInterrupt; but one line and the end, where an import of the main program's is under way: it has begun
    nothing, and an exception would be a traceback, or lost where C calls Python."""
    inner = None
    while frame:
        is_main = frame.f_globals.get("__name__") == "__main__" and frame.f_code.co_name == "<module>"
        if is_main and inner and "importlib" in inner.f_code.co_filename:
            os.write(2, b"stopped\n")
            os._exit(130)
        inner, frame = frame, frame.f_back
    raise KeyboardInterrupt


if (os.path.realpath(getattr(sys.modules.get("__main__"), "__file__", None) or "").startswith(f"{TOP}{os.sep}")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, interrupted)

MISSING = [name for name in ("numpy", "numba", "tiktoken", "requests") if importlib.util.find_spec(name) is None]
if MISSING:
    raise SystemExit(f"error: {sys.executable} has no package {', '.join(MISSING)}\n---> HINT: `make train` or `python "
                     "dev/start.py` makes .venv, which has them: source .venv/bin/activate (Windows: "
                     ".venv\\Scripts\\activate); or: python -m pip install -r requirements.txt")

THREADS = os.environ.get("NUMBA_NUM_THREADS", "1")
if THREADS.lstrip("-").isdigit() and int(THREADS) < 1:  # what is no number Numba ignores, with a warning
    raise SystemExit(f"error: NUMBA_NUM_THREADS={THREADS}, expected at least 1\n---> HINT: unset it; OMP_NUM_THREADS "
                     "sets the number of threads")
