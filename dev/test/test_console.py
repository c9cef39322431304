"""Output that nobody reads, that has no room, or that cannot show a character: the run goes on."""
import io
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from runs import complete

from dev.run import console

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Unix only")


@pytest.fixture
def given(flags, out):
    """given("-x 3 ..."): the trainer's command line for a tiny run with the folder `out`"""
    return lambda text: [str(ROOT / "train_gpt2.py"), *flags(text), "-o", str(out)]


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr and process.stderr.read()
        time.sleep(0.02)


def steps_in(folder):
    path = folder / "main.log"
    return path.read_text().count("trl") if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------
# output that is lost

def test_a_reader_that_dies_before_the_run(python, given, out):
    """`... | tee log` and Ctrl-C: tee dies first. `... | head` ends while the run goes on."""
    run = python(*given("-x 1000000"), OMP_NUM_THREADS="1")
    while "step 3/" not in run.stdout.readline():
        pass
    run.stdout.close()
    before = steps_in(out)
    wait_for(lambda: steps_in(out) > before + 20, run)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 0 and run.stderr.read() == "\nstopping after this batch (once more: at once)\n"
    assert complete(out) == [steps_in(out)]


def test_both_streams_are_one_pipe_that_breaks(given, out):
    """`... 2>&1 | tee log`: the words at the signal have no reader either."""
    run = subprocess.Popen([sys.executable, *given("-x 1000000")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: steps_in(out) > 3, run)
    run.stdout.close()
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 0
    assert complete(out) == [steps_in(out)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("redirection", [">/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_output_without_room_and_without_a_place(given, out, redirection):
    """A closed stream's number must not become that of a checkpoint's file: what is written there would be in it."""
    script = f'"$@" {redirection} & sleep 0; wait $!'
    command = ["bash", "-c", script, "bash", sys.executable, *given("-x 6 -n 3 -v 1 -s 2 -g 3")]
    whole = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                           timeout=100, check=False)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, "", "")
    assert complete(out) == [3, 6] and steps_in(out) == 6
    assert (out / "model_00000006.bin").stat().st_size == 160256


def test_a_terminal_that_is_closed(given, out):
    """Writing there is an error from then on, and the system says so by SIGHUP: the run ends with a checkpoint."""
    pty = pytest.importorskip("pty")
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *given("-x 1000000")])
    shown = b""
    while b"step 3/" not in shown:
        shown += os.read(terminal, 10000)
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert complete(out) == [steps_in(out)]


def test_say_waits_for_a_slow_reader():
    """Others may have set a pipe not to wait for its reader. Nothing is raised, and then it waits again."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with open(write, "w") as stream:
        while not os.get_blocking(write):
            console.say("x" * 2000, file=stream)
        os.read(read, 1 << 20)  # more than a pipe holds: there is room for the rest
    os.close(read)


# ---------------------------------------------------------------------------------------------------------------------
# characters that cannot be shown

def write_words(folder, words):
    header = np.zeros(256, "<u4")
    header[:4] = 20240328, 2, len(words), 299
    (folder / "data").mkdir()
    content = b"".join(bytes([len(word)]) + word for word in words)
    (folder / "data/gpt2_tokenizer.bin").write_bytes(header.tobytes() + content)


@pytest.fixture
def stdout(monkeypatch, tmp_path):
    """stdout(encoding): a standard output of this encoding, where every token is an Omega; returns its bytes' file"""
    write_words(tmp_path, ["<Ω>".encode()] * 300)
    monkeypatch.chdir(tmp_path)

    def stdout(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        return raw
    return stdout


@pytest.mark.parametrize("encoding, shown", [("ascii", b"<?><?>"), ("cp1252", b"<?><?>"), ("cp932", b"<\x83\xb6>" * 2),
                                             ("utf-8", "<Ω><Ω>".encode())])
def test_samples(train, stdout, out, encoding, shown):
    raw = stdout(encoding)
    train("-x 3 -s 1 -g 3 -n 3")
    assert complete(out) == [3] and raw.getvalue().count(shown) == 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_texts_prompts_and_errors_of_generate(python, tiny, tmp_path, encoding):
    write_words(tmp_path, ["<Ω>".encode()] * 300)
    vocabulary = {"cwd": tmp_path, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    run = python(ROOT / "dev/generate.py", "-e", tiny, "-n", "3", "--past_end", **vocabulary)
    out, err = run.communicate()
    assert run.returncode == 0 and out.startswith("<?><?><?>"), err
    code = ("import sys; from dev import generate; from dev.run import text; text.encode = lambda text: [1]; "
            "sys.exit(generate.main(sys.argv[1:]))")
    run = python("-c", code, "-e", tiny, "-n", "2", "--past_end", "-p", "Ωmega \udcff", PYTHONPATH=str(ROOT),
                 **vocabulary)
    out, err = run.communicate()
    assert run.returncode == 0 and out.startswith("?mega ?<?><?>"), err
    run = python(ROOT / "dev/generate.py", "-e", "Ωmega.bin", **{**vocabulary, "PYTHONIOENCODING": "ascii"})
    out, err = run.communicate()
    assert run.returncode == 1 and err.startswith(r"error: no such checkpoint: \u03a9mega.bin"), err


@pytest.mark.parametrize("script", ["dev/data/inspect_bin.py", "dev/vislog.py", "dev/eval/hellaswag.py",
                                    "train_gpt2.py"])
def test_errors_and_names_of_other_programs(python, tiny, make_shard, tmp_path, script):
    name = make_shard(tmp_path / "Ωmega.bin", range(100))
    flags = {"dev/vislog.py": [tmp_path / "Ωmega"], "train_gpt2.py": ["-e", name]}.get(script, ["-e", tiny, "-i", name])
    run = python(ROOT / script, *([name] if "inspect" in script else flags), PYTHONIOENCODING="ascii")
    out, err = run.communicate()
    assert "Traceback" not in err and ("?mega" in out or r"\u03a9mega" in err), out + err


def test_a_full_disk_under_generate(python, tiny):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "dev.generate", "-e", tiny, "-n", "3"], cwd=ROOT, stdout=full,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == 1 and "error: [Errno 28]" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert "Exception ignored" not in run.stderr
