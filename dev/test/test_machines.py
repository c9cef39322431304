"""Odd machines: no place for a cache, a damaged one, no compiler, numbers of threads and flags that make no sense."""
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from runs import complete

import test_gpt2
import train_gpt2
from dev.run import compiling, machine, random_weights
from dev.run.flags import parse_flags
from dev.run.processes import ALONE
from dev.run.text import Sampler

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


# ---------------------------------------------------------------------------------------------------------------------
# the cache of compiled kernels

@pytest.fixture
def checkout(tmp_path):
    """A copy of the program that cannot be written where Numba would: also not by the superuser"""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "dev/run", folder / "dev/run", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "train_gpt2.py", "dev/__init__.py", "dev/generate.py":
        shutil.copy2(ROOT / name, folder / name)
    for place in folder, folder / "dev/run":
        (place / "__pycache__").touch()  # no folder can be made there
    (tmp_path / "tmp").mkdir()
    return folder


def without_home(tmp_path, **more):
    return {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "TMPDIR": str(tmp_path / "tmp"), "NUMBA_CACHE_DIR": "",
            "OMP_NUM_THREADS": "1", **more}


PLACES = """
import train_gpt2, dev.run.random_weights as random_weights
print(train_gpt2.encoder_forward.stats.cache_path, random_weights.box_muller.stats.cache_path, sep="\\n")
"""


def fill_cache(places):
    """Put compiled kernels where PLACES says that others look for them."""
    train_gpt2.load_kernels(train_gpt2.run_kernels)
    for kernel, place in zip((train_gpt2.encoder_forward, random_weights.box_muller), places):
        place.mkdir(parents=True, exist_ok=True)
        stem = Path(kernel.py_func.__code__.co_filename).stem
        for path in Path(kernel.stats.cache_path).glob(f"{stem}.*.nb?"):
            shutil.copy2(path, place)


@pytest.mark.parametrize("script", ["train_gpt2.py", "dev/generate.py"])
def test_help_of_a_checkout_that_cannot_be_written(python, checkout, tmp_path, script):
    run = python(checkout / script, "--help", cwd=tmp_path, **without_home(tmp_path))
    out, err = run.communicate()
    assert run.returncode == 0 and "usage:" in out
    assert re.fullmatch(rf"compiled kernels are kept in {tmp_path}/tmp/\S+: .*NUMBA_CACHE_DIR.*\n", err), err


def test_a_run_of_a_checkout_that_cannot_be_written(python, checkout, tmp_path, flags, out):
    """The second of two processes finds what the first has left in the folder for temporary files."""
    environment = without_home(tmp_path)
    out_of_it = python("-c", PLACES, cwd=checkout, **environment).communicate()[0]
    places = [Path(line) for line in out_of_it.splitlines()]
    assert all(str(place).startswith(f"{tmp_path}/tmp/llm.numba-") for place in places) and len(places) == 2
    fill_cache(places)
    run = python(checkout / "train_gpt2.py", *flags("-x 2 -n 2"), "-o", out, **environment)
    printed, err = run.communicate(timeout=500)
    assert run.returncode == 0 and complete(out) == [2] and "compiling" not in printed, err
    assert err.count("\n") == 1


@pytest.mark.parametrize("spoil", ["a file", "open to others", "a link"])
def test_a_temporary_folder_of_others_is_not_used(python, checkout, tmp_path, spoil):
    """What is in a cache is run: nobody else may have put it there."""
    folder = tmp_path / "tmp" / f"llm.numba-{os.getuid()}"
    if spoil == "a file":
        folder.touch()
    elif spoil == "a link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    run = python(checkout / "train_gpt2.py", "--help", cwd=tmp_path, **without_home(tmp_path))
    out, err = run.communicate()
    assert run.returncode == 0 and "usage:" in out
    assert re.fullmatch(r"there is no folder for compiled kernels: .*NUMBA_CACHE_DIR.*\n", err), err
    assert spoil == "a file" or list(folder.iterdir()) == []


@pytest.fixture
def cache(python, tmp_path):
    """The two folders of a cache that has all kernels"""
    found = python("-c", PLACES, NUMBA_CACHE_DIR=str(tmp_path / "cache")).communicate()[0]
    places = [Path(line) for line in found.splitlines()]
    fill_cache(places)
    return places


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:len(content) // 2], "zeros": bytes(len(content)),
                      "one byte": content[:1], "all but one": content[:-1]}[how])


@pytest.mark.parametrize("pattern, how", [
    ("train_gpt2.gelu_forward-*.nbi", "empty"), ("train_gpt2.gelu_forward-*.nbc", "cut"),
    ("train_gpt2.sum_of_squares-*.nbi", "all but one"), ("*.nb?", "zeros"), ("random_weights.*.nbi", "one byte")])
def test_a_cache_is_made_anew(python, cache, tmp_path, flags, pattern, how):
    """where it cannot be read; the second run finds it whole"""
    paths = [path for place in cache for path in place.glob(pattern)]
    for path in paths:
        damage(path, how)
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for again in False, True:
        run = python("train_gpt2.py", *flags("-x 1"), **environment)
        printed, err = run.communicate(timeout=500)
        assert run.returncode == 0 and err == "" and "step 0/" in printed, err
        lines = [line for line in printed.splitlines() if "that were damaged" in line]
        assert len(lines) == (bool(paths) and not again) and all("NUMBA_CACHE_DIR" in line for line in lines), printed


def test_every_damaged_file_is_found(cache):
    """and no other"""
    kernels = [SimpleNamespace(stats=SimpleNamespace(cache_path=str(place)), py_func=kernel.py_func)
               for place, kernel in zip(cache, (train_gpt2.encoder_forward, random_weights.box_muller))]
    assert compiling.remove_damaged(kernels) == 0
    paths = {path for place in cache for path in place.glob("*.nb?")}
    bad = sorted(paths)[::7]
    for path, how in zip(bad, ["empty", "cut", "zeros", "one byte", "all but one"] * len(bad)):
        damage(path, how)
    assert compiling.remove_damaged(kernels) == len(bad)
    assert {path for place in cache for path in place.glob("*.nb?")} == paths - set(bad)


def test_a_mistake_of_ours_is_not_taken_for_damage(monkeypatch):
    def run(precision):
        raise KeyError("ours")
    monkeypatch.setattr(compiling, "remove_damaged", lambda kernels: 0)
    with pytest.raises(KeyError, match="ours"):
        compiling.load_kernels(run)


def test_test_gpt2_compiles_in_two_processes_and_says_so(capfd, monkeypatch):
    """As the trainer does: where a kernel is not in the cache, before anything is computed."""
    asked = []

    def run_kernels(precision):
        if not asked:
            raise compiling.Compiling
        raise RuntimeError("enough is known")
    monkeypatch.setattr(train_gpt2, "run_kernels", run_kernels)
    start = lambda words, **more: asked.append(words[2]) or nullcontext(SimpleNamespace(wait=int))
    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match="enough"):
        test_gpt2.check(*(str(ROOT / path) for path in test_gpt2.TINY))
    assert [words.split("; ")[-1] for words in asked] == ["run('fp32', False)", "run('fp32', True)"]
    assert "compiling kernels: up to half a minute, in the first run only" in capfd.readouterr().out


def test_a_cache_that_takes_nothing(capfd, monkeypatch):
    """A full disk: the kernels are compiled and used, not kept."""
    calls = []

    def run(precision):
        calls.append(1)
        if len(calls) == 1:
            raise compiling.Compiling
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    kernel = type("Kernel", (), {"_cache": type("Cache", (), {"disable": lambda self: calls.append("off")})()})()
    monkeypatch.setattr(compiling, "compile_apart", lambda run, precision: None)
    monkeypatch.setattr(compiling, "KERNELS", [kernel])
    compiling.load_kernels(run)
    assert calls == [1, 1, "off", 1]
    assert re.search("cannot be kept: .*No space left.*NUMBA_CACHE_DIR", capfd.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------------
# without the compiler

@pytest.fixture
def plain(python, flags, out):
    """plain(flags): run the trainer as ordinary Python; returns what it printed"""
    def plain(given):
        run = python("train_gpt2.py", *flags(given), "-o", out, NUMBA_DISABLE_JIT="1")
        printed, err = run.communicate(timeout=200)
        assert run.returncode == 0 and err == "", err
        return printed
    return plain


def test_the_trainer_in_plain_python(plain, python, flags, out):
    """A step, a validation, a text, a checkpoint, and going on from it: the numbers of the compiled kernels"""
    given = "-b 1 -t 4 -v 1 -m 1 -s 2 -g 3"
    printed = plain(f"{given} -x 2 -n 1") + plain(f"{given} -x 3 -n 1 -y 1")
    compiled = python("train_gpt2.py", *flags(f"{given} -x 3")).communicate(timeout=500)[0]
    pattern = r"^(?:val loss|step \d/\d+.*: train loss) (\S+)|norm (\S+)"
    ours, theirs = (np.array([float(a or b) for a, b in re.findall(pattern, text, re.MULTILINE)])
                    for text in (printed, compiled))
    assert complete(out) == [1, 2, 3] and len(ours) == 10
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("more", ["--matmul blas", "-r 0", "-r 2", "--profile 1"])
def test_flags_in_plain_python(plain, more):
    assert "step 0/" in plain(f"-b 1 -t 4 -x 1 {more}")


def test_generate_in_plain_python(python, tiny):
    run = python("-m", "dev.generate", "-e", tiny, "-n", "4", "--temperature", "0", "--past_end", NUMBA_DISABLE_JIT="1")
    plain, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    run = python("-m", "dev.generate", "-e", tiny, "-n", "4", "--temperature", "0", "--past_end")
    assert run.communicate(timeout=500)[0] == plain != ""


def test_the_commands_of_the_readme(tmp_path):
    """The debugging session works as it is written: a shell gets its lines, the debugger those after (Pdb)."""
    block, = re.findall(r"```\n([^`]*NUMBA_DISABLE_JIT=1 [^`]*)```", (ROOT / "README.md").read_text())
    lines = block.splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ ")]
    typed = "".join(f"{line[6:]}\n" for line in lines if line.startswith("(Pdb) "))
    shown = [line for line in lines if not line.startswith(("$ ", "(Pdb) "))]
    assert len(commands) == 2 and "gelu_backward" in typed and len(shown) == 2
    shutil.copytree(ROOT / "dev", tmp_path / "dev", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "train_gpt2.py", "README.md":
        shutil.copy2(ROOT / name, tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-ec", "\n".join(commands)], cwd=tmp_path, env=environment, input=typed, text=True,
                         check=False, capture_output=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stdout + run.stderr, run.stdout + run.stderr
    assert "gelu_backward()\n" in run.stdout and all(line in run.stdout for line in shown), run.stdout


# ---------------------------------------------------------------------------------------------------------------------
# threads

@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("value", ["0", "-1", "abc", "2.5", ",2", "1e1", "٣x"])
def test_numbers_of_threads_that_make_no_sense(monkeypatch, name, value):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} is not a number of threads\n---> HINT: "):
        machine.threads_of(ALONE)


@pytest.mark.parametrize("value", ["0", "-1", "abc"])
@pytest.mark.parametrize("program", [["train_gpt2.py"], ["-m", "dev.generate"]])
def test_the_error_for_threads(python, tiny, flags, program, value):
    given = flags() if program[0] == "train_gpt2.py" else ["-e", tiny]
    run = python(*program, *given, OMP_NUM_THREADS=value)
    out, err = run.communicate()
    lines = [line for line in err.splitlines() if line and not line.startswith("libgomp")]
    assert run.returncode == 1 and lines[0] == f"error: OMP_NUM_THREADS={value} is not a number of threads", err
    assert len(lines) == 2


@pytest.mark.parametrize("value, cpus, threads, said", [
    ("64", 2, 2, True), ("3", 2, 2, True), ("2", 2, 2, False), ("1", 2, 1, False), ("4,2", 8, 4, False),
    ("", 6, 6, False), (" 2 ", 6, 2, False)])
def test_more_threads_than_processors(monkeypatch, capfd, value, cpus, threads, said):
    monkeypatch.setattr(machine, "available_cpus", lambda: cpus)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.threads_of(ALONE) == threads
    out, err = capfd.readouterr()
    line = f"OMP_NUM_THREADS={value}, but this process may use {cpus} processors: {threads} threads are started\n"
    assert out == "" and err == (line if said else "")


# ---------------------------------------------------------------------------------------------------------------------
# flags

FLOATS = [name for name, value in vars(parse_flags([])).items() if isinstance(value, float)]


def test_there_are_flags_that_are_floats():
    assert len(FLOATS) == 11 and {"temperature", "learning_rate", "top_p", "eps", "skip_update_lossz"} < set(FLOATS)


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"--{name} must lie in .* not be -?(nan|inf)"):
        parse_flags([f"--{name}={value}"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_samplers_that_make_no_sense(python, tiny, name, value):
    with pytest.raises(ValueError, match=f"cannot sample with .*{name} {value}"):
        Sampler(**{name: float(value)})
    run = python("-m", "dev.generate", "-e", tiny, f"--{name}={value}")
    out, err = run.communicate()
    assert run.returncode == 1 and out == "" and err.startswith("error: cannot sample") and err.count("\n") == 2


@pytest.mark.parametrize("given", ["-h", "-h -v 3", "-x 2 -h", "--hellaswag_eval"])
def test_a_bare_h_points_to_help(capsys, given):
    with pytest.raises(SystemExit, match="^2$"):
        train_gpt2.main(given.split())
    assert capsys.readouterr().err == ("train_gpt2.py: error: -h is HellaSwag, as in llm.c, and needs a 1 or a 0 "
                                       "(--help lists the flags)\n")
