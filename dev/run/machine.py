"""
What the operating system says: processors, memory.
"""
import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
import time


@functools.cache  # OMP_PROC_BIND will tie this thread to one of them
def allowed_cpus():
    """The set of processors that this process may run on"""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@contextlib.contextmanager
def every_cpu():
    """Processes that are started meanwhile may run on all of allowed_cpus(), though OpenMP may have tied this thread to
    one of them."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if own:
            os.sched_setaffinity(0, allowed_cpus())
        yield
    finally:
        if own:
            os.sched_setaffinity(0, own)


def available_cpus():
    """The number of processors that this process may use: its affinity, cut to the quota of its cgroup."""
    cpus = len(allowed_cpus())
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, min(cpus, round(int(quota) / int(period))))
    except (OSError, ValueError):  # not Linux, or no quota ("max")
        return cpus


def threads_of(processes):
    """The threads that this process should use: OMP_NUM_THREADS, as far as there are processors, or its part of the
    processors of its machine. ValueError where that is not a number of threads"""
    name = next((name for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if os.environ.get(name)), None)
    cpus = available_cpus()
    if not name:
        return max(1, cpus // processes.sharers)
    wish = os.environ[name].split(",")[0].strip()  # OpenMP's lists: of nested loops
    if not (wish.isdecimal() and int(wish) > 0):
        raise ValueError(f"{name}={os.environ[name]} is not a number of threads\n---> HINT: 1 or more; unset, every "
                         "processor is used")
    if int(wish) > cpus and name == "OMP_NUM_THREADS":
        processes.print(f"{name}={wish}, but this process may use {cpus} processors: {cpus} threads are started",
                        file=sys.stderr)
        return cpus
    return int(wish)


def allow_amx():
    """Ask Linux for the use of the processor's AMX registers; False where there is no such thing to ask for. Threads
    that are started later may use them too."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def available_memory():
    """Bytes of memory that this process can still get, or infinity where the system doesn't say"""
    free = math.inf
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # not Linux, no cgroup, or no limit in it ("max")
        pass
    return free


def require_memory(needed):
    """ValueError if a run of so many bytes does not fit into memory"""
    free = available_memory()
    if needed > free:
        raise ValueError(f"this run needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free\n"
                         "---> HINT: use a smaller batch (-b), a shorter sequence (-t) or a smaller model (-e)")


def shortest(call, *args, seconds=0.3):
    """The shortest of the times, in seconds, that a call took, repeated for so many seconds after a first one"""
    call(*args)
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call(*args)
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory():
    """The most memory that this process has held, in bytes; NaN where the system doesn't say"""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
