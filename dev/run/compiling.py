"""
Compiled kernels: Numba's threads, its cache on disk, and having all kernels compiled before a run.
"""
import contextlib
import functools
import glob
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import threading

import numba
from numba.core import event
from numba.core.codegen import get_host_cpu_features
from numba.core.cpu_options import ParallelOptions

from dev.run.console import say
from dev.run.machine import every_cpu
from dev.run.processes import ALONE


@functools.cache  # once: who sets another number later means it
def start_threads(number):
    """Have kernels use so many threads, or all that Numba has where that is fewer."""
    # Waiting threads sleep: 30 µs more for each kernel, but a busy neighbour makes threads that spin 500 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    numba.set_num_threads(min(number, numba.config.NUMBA_NUM_THREADS))


# ---------------------------------------------------------------------------------------------------------------------
# the processor

# What kernels are compiled for, as LLVM writes it: "+avx2,+avx512f,...". NUMBA_CPU_FEATURES says it instead.
# Of AVX-512's registers LLVM would use halves on Intel's servers, where long ones once slowed the clock down.
if numba.config.CPU_FEATURES is None:
    numba.config.CPU_FEATURES = get_host_cpu_features()
    if "+avx512f" in numba.config.CPU_FEATURES:
        numba.config.CPU_FEATURES += ",-prefer-256-bit"
CPU_FEATURES = numba.config.CPU_FEATURES

# ---------------------------------------------------------------------------------------------------------------------
# the cache

KERNELS = []  # what cached() has made
# For `parallel`: threads share what `prange` says and nothing else. True would wake them for np.zeros and y[:] = 0 too.
PRANGE = ParallelOptions({name: name == "prange" for name in ParallelOptions.__slots__ if name != "enabled"})


def cached(**options):
    """The decorator numba.njit(cache=True, **options), also where neither the folder of the sources nor the user's own
    can be written: then the cache is in the folder for temporary files, or there is none."""
    def decorate(function):
        try:
            KERNELS.append(numba.njit(cache=True, **options)(function))
            return KERNELS[-1]
        except RuntimeError:  # Numba finds no folder
            return decorate(function) if use_temporary_cache() else numba.njit(**options)(function)
    return decorate


def use_temporary_cache():
    """Have Numba's cache in the folder for temporary files from now on. False where it is there, or cannot be."""
    folder = temporary_folder()
    if folder in (None, numba.config.CACHE_DIR):
        warn_once("there is no folder for compiled kernels: they are compiled every time; NUMBA_CACHE_DIR can name one")
        return False
    warn_once(f"compiled kernels are kept in {folder}: the sources' folder cannot be written; NUMBA_CACHE_DIR can "
              "name another")
    numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = folder  # of this process, and of those that compile for it
    return True


def temporary_folder():
    """A folder for temporary files that nobody else can write to, or None: what is in a cache is run."""
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = os.path.join(tempfile.gettempdir(), f"llm.numba-{user}")
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return None
    ours = user is None or found.st_uid == user and not found.st_mode & 0o022
    return folder if ours and stat.S_ISDIR(found.st_mode) else None


@functools.cache
def warn_once(line):
    say(line, file=sys.stderr)


def remove_damaged(kernels):
    """Remove those files from the cache of kernels that cannot be read: emptied by a power failure, or cut where a disk
    was full. Returns how many there were."""
    places = {(kernel.stats.cache_path, os.path.basename(kernel.py_func.__code__.co_filename)) for kernel in kernels}
    damaged = 0
    for folder, source in places:
        name = f"{os.path.splitext(source)[0]}.*.nb[ci]"
        for path in glob.glob(os.path.join(glob.escape(folder), name)):
            try:
                with open(path, "rb") as file:
                    pickle.load(file)
                    if path.endswith(".nbi"):  # a version, then the index
                        pickle.load(file)
            except Exception:  # there is hardly one that pickle cannot raise
                os.unlink(path)
                damaged += 1
    return damaged


# ---------------------------------------------------------------------------------------------------------------------
# compiling

class Compiling(Exception):
    """Numba began to compile where it was not to."""


class Refusal(event.Listener):
    """Installed, it raises Compiling where Numba begins to compile."""

    def on_start(self, event):
        raise Compiling

    def on_end(self, event):
        pass


@functools.cache
def load_kernels(run, precision="fp32", processes=ALONE):
    """Have every kernel that run(precision) calls in the cache, and load it from there: no step's time has it in it.

    Where a kernel has just been compiled, Numba runs a version that its optimiser has been over once less than the
    cached one: the last bit of a sum may differ. So two other processes compile, and this one has the same bits in
    the first run as in all later ones.
    """
    if numba.config.DISABLE_JIT:
        return None
    run = held(run)
    with processes.first():
        try:
            with event.install_listener("numba:compile", Refusal()):
                return run(precision)
        except Compiling:
            pass
        except Exception:
            damaged = remove_damaged(KERNELS)
            if not damaged:
                raise
            processes.print(f"compiled kernels that were damaged are made anew: {damaged} files; NUMBA_CACHE_DIR can "
                            "name another folder for them")
        processes.print("compiling kernels: up to half a minute, in the first run only")
        compile_apart(run, precision)
        try:
            return run(precision)
        except OSError as error:
            processes.print(f"compiled kernels cannot be kept: {error}; NUMBA_CACHE_DIR can name another folder")
            for kernel in KERNELS:
                kernel._cache.disable()
            return run(precision)


def held(run):
    """A function that does what run() does. Ctrl-C that comes meanwhile comes at its end, since an exception is lost in
    a callback of the compiler; twice it ends the program at once."""
    @functools.wraps(run)
    def call(*args):
        if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
            return run(*args)

        def hold(number, frame):
            if came:
                os._exit(130)
            came.append(number)
        came, before = [], signal.signal(signal.SIGINT, hold)
        try:
            return run(*args)
        finally:
            signal.signal(signal.SIGINT, before)
            if came:
                signal.raise_signal(signal.SIGINT)
    return call


# A process that compiles ends with the one that it does that for, which holds the other end of its standard input, and
# at once with Ctrl-C.
LISTEN = ("import os, signal, sys, threading; signal.signal(signal.SIGINT, signal.SIG_DFL); "
          "threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start(); ")


def compile_apart(run, precision):
    """Have run(precision, first) compile in two processes, which begin with different kernels, on any two processors,
    where OpenMP may have tied this thread, and would tie both of theirs, to the first."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    module = "train_gpt2" if run.__module__ == "__main__" else run.__module__
    command = f"{LISTEN}sys.path.insert(0, {root!r}); from {module} import {run.__name__} as run"
    with contextlib.ExitStack() as stack:  # at its end what still compiles loses its standard input
        with every_cpu():
            compilers = [stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", f"{command}; run({precision!r}, {first})"], stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=os.environ | {"OMP_PROC_BIND": "false"})) for first in (False, True)]
        for compiler in compilers:
            compiler.wait()
