"""Ctrl-C, and what else ends a program, before its first step: while modules are imported, while kernels compile."""
import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT

from dev.run import compiling

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")

# a Python that begins with this sends itself Ctrl-C when it comes to import a module
SITE = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("command", ["train_gpt2.py", "-m dev.generate", "dev/generate.py"])
@pytest.mark.parametrize("module", ["numba", "llvmlite.binding", "numpy.linalg", "numba.core.codegen", "dev.run.files",
                                    "dev.run.text"])
def test_interrupted_imports(python, tiny, tmp_path, command, module):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    process = python(*command.split(), "-e", tiny, PYTHONPATH=str(tmp_path), AT=module)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped\n")


@pytest.mark.parametrize("code, status", [
    ("import train_gpt2", -signal.SIGINT), ("try:\n    import train_gpt2\nexcept KeyboardInterrupt:\n    pass", 0)])
def test_others_programs_have_python_s_own_answer(python, tmp_path, code, status):
    """Who imports the trainer in a program of his own, or a notebook, has KeyboardInterrupt as ever."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "own.py").write_text(code)
    process = python(tmp_path / "own.py", PYTHONPATH=f"{tmp_path}:{ROOT}", AT="numba.core.codegen")
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and ("KeyboardInterrupt" in err) == bool(status)


# ---------------------------------------------------------------------------------------------------------------------
# while kernels are loaded, or compiled

def test_an_interrupt_in_a_callback_is_not_lost(monkeypatch):
    """An exception in a callback of C goes nowhere. Here it comes when the callback, and what called it, is over."""
    done = []

    def run(precision):
        ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGINT))()
        done.append(precision)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        compiling.load_kernels(run, "fp32")
    assert done == ["fp32"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def children(pid):
    """The processes that this one has started"""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid):
    """Is there such a process, and is it no zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number, status, said", [
    (signal.SIGINT, 130, "stopped\n"), (signal.SIGTERM, -signal.SIGTERM, ""), (signal.SIGKILL, -signal.SIGKILL, "")])
@pytest.mark.parametrize("pause", [0.3, 4])  # while they import, while they compile
def test_no_compiler_is_left_behind(python, flags, out, tmp_path, number, status, said, pause):
    process = python("train_gpt2.py", *flags("-x 1"), "-o", out, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(pause)
    compilers = children(process.pid)
    assert len(compilers) == 2 and all(map(runs, compilers))
    process.send_signal(number)  # to it alone, as a job's manager would
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (status, said) and out.exists() == (number != signal.SIGINT)
    deadline = time.monotonic() + 5
    while any(map(runs, compilers)):
        assert time.monotonic() < deadline, "compilers go on"
        time.sleep(0.05)


@pytest.mark.parametrize("number", ["0", "-3"])
def test_no_threads(python, number):
    process = python("train_gpt2.py", "--help", NUMBA_NUM_THREADS=number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.startswith(f"error: NUMBA_NUM_THREADS={number}, ") and out == ""
