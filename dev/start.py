"""
The first run, on any system, without make: an environment, data, training.

    python dev/start.py [FLAGS of train_gpt2.py, of which the last one counts]

GPT-2's weights on Tiny Shakespeare where both can be fetched. Without the weights a small model that reads bytes, in
about three minutes on two cores: on Tiny Shakespeare or, without a network, on the texts that every Python carries.
What is there already is not made again; a run that was interrupted goes on.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
RUN = "data/runs/first"
BYTES = "-e gpt2:l4c128h4t128 -b 8 -t 128 -x 4000 -l 2e-3 -u 100 -q 0.1 -c 0.1 --beta2 0.99 --grad_clip 1".split()
LOOK = "--log_every 20 -v 500 -m 20 -s 1000 -g 400 --temperature 0.8 -n 1000 -nk 1".split()


def run(*command):
    return subprocess.run(list(map(str, command)), cwd=TOP, check=False).returncode


def environment():
    """The path of a Python that has the packages: this one, or that of .venv, which is made where it is missing"""
    with contextlib.suppress(SystemExit):  # what dev.run ends with where one is missing
        import dev.run  # noqa: F401
        return sys.executable
    python = TOP / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if sys.version_info < (3, 10):
        sys.exit(f"error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    if not python.exists() and run(sys.executable, "-m", "venv", ".venv"):
        sys.exit("error: no environment could be made\n---> HINT: on Debian and Ubuntu: apt install python3-venv")
    if run(python, "-m", "pip", "install", "-q", "-r", "requirements.txt"):
        sys.exit("error: the packages in requirements.txt could not be installed\n---> HINT: is there a network?")
    return python


def fetch(script, *flags):
    """Run a script that needs a network. Whether it has succeeded; that it cannot reach anything is no error here"""
    command = [sys.executable, TOP / "dev" / script, *flags]
    with subprocess.Popen(command, cwd=TOP, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if not line.startswith(("error: cannot reach", "---> HINT: is there a network")):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode == 0


def main(flags):
    """Fetch or make the data and train, with more of the trainer's flags. Returns the exit status"""
    data, weights = TOP / "data", TOP / "data/gpt2_124M.bin"
    if not weights.exists():
        print("looking for GPT-2's weights (498 MB) and Tiny Shakespeare in the network", flush=True)
    if weights.exists() or fetch("download_starter_pack.py"):
        return run(sys.executable, "train_gpt2.py", "-o", "data/runs/gpt2", "-y", "1", "-nk", "1", *flags)
    print("the weights cannot be had: a small model is trained from scratch, on bytes", flush=True)
    place, script = "tinyshakespeare_bytes/tiny_shakespeare", "data/tinyshakespeare.py"
    if not (data / f"{place}_train.bin").exists() and not fetch(script, "--tokenizer", "bytes"):
        print("the text cannot be had: what every Python carries takes its place", flush=True)
        place = "pydoc_bytes/pydoc"
        if not (data / f"{place}_train.bin").exists():
            run(sys.executable, "dev/data/pydoc.py", "--tokenizer", "bytes")
    files = ["-i", f"data/{place}_train.bin", "-j", f"data/{place}_val.bin"]
    return run(sys.executable, "train_gpt2.py", "-o", RUN, "-y", "1", *files, *BYTES, *LOOK, *flags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    _, more = parser.parse_known_args()
    chosen = environment()
    try:
        sys.exit(main(more) if Path(chosen) == Path(sys.executable) else run(chosen, TOP / "dev/start.py", *more))
    except KeyboardInterrupt:
        sys.exit(130)
