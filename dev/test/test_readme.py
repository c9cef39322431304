"""
Every command of README.md in its order, in an empty clone with an empty home and no network: what it promises is so.

COMMANDS says how each is shortened: flags that are appended, of which the last one counts. A command that README has
and COMMANDS has not, or the other way round, is a failure. From README's `python train_gpt2.py` on the tests' tiny
model stands in for GPT-2's weights; what needs more than that is left out, with the reason.

    python dev/test/test_readme.py --write

renews README's transcripts: the commands that it shows with their output run as they stand there, unshortened, on what
data/ holds here: Tiny Shakespeare in GPT-2's tokens, and data/runs/first, which `make train` leaves where there are no
weights of GPT-2. It takes some minutes. What cannot run stays as it was, and why is said.
"""
if __name__ == "__main__":  # modules come from the project and from this folder
    import os
    import sys
    sys.path.insert(0, os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0])

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import pytest
from conftest import ROOT

SMALL = "-b 2 -t 16 -x 2 -v 2 -m 1 -s 0"
SHAKESPEARE = "data/tinyshakespeare/tiny_shakespeare"
PREPARE = f"""
mkdir -p my_folder data/tinyshakespeare && cp README.md LICENSE my_folder
cp dev/test/gpt2_tiny.bin data/gpt2_124M.bin
python dev/data/text.py my_folder --tokenizer tiny --name text
cp data/text/text_train_000000.bin {SHAKESPEARE}_train.bin && cp data/text/text_val_000000.bin {SHAKESPEARE}_val.bin
rm -r data/text
"""
NO_NETWORK, ELSEWHERE = "it needs a network: ", "it takes minutes: "


class Run:
    """How a command is run: with more after it, `first` before it; what it prints (patterns), files that it makes.
    interrupt: the beginning of the line at which Ctrl-C comes, after so many seconds"""

    def __init__(self, more="", prints=(), files=(), first="", stdin="", interrupt=None, seconds=0, needs=None):
        self.more, self.prints, self.files, self.first, self.stdin = more, prints, files, first, stdin
        self.interrupt, self.seconds, self.needs = interrupt, seconds, needs


RECIPE = ("python train_gpt2.py -e d6 -o data/runs/shakespeare -n 50 -nk 2 -y 1 -b 8 -t 64 -x 240 -l 1e-3 -u 20 "
          "-q 0.1 -v 20 -m 20 -s 0")
BYTES_DATA = ' -i "data/my_folder/*_train_??????.bin" -j "data/my_folder/*_val_??????.bin"'
PICTURE = "dev/doc/run.png"
FIRST = 'ARGS="-x 4 -v 2 -m 2 -s 4 -g 20"'
COMMANDS = {  # as README has them, in its order
    "make train": Run(FIRST, ["the weights cannot be had: ", "the text cannot be had: ", "verdict: ", "go on: ",
                              "write text: ", "plot: "],
                      ["data/runs/first/model_00000004.bin", "data/runs/first/main.log"]),
    "make test": Run("PYTEST_ADDOPTS='dev/test/test_schedule.py'", ["TENSOR OK", "overall okay: 1", r"\d+ passed"]),
    "python dev/generate.py -e data/runs/first/model_00004000.bin --temperature 0.8": Run(
        "-e data/runs/first/model_00000004.bin -n 20", [r"20 tokens in .*tok/s"]),
    "source .venv/bin/activate": Run("&& which python", [r"/\.venv/bin/python"]),
    "python dev/start.py": Run("-x 4 -v 0 -s 0", [r"step 4 of 4"]),
    "python -m venv .venv": Run("--without-pip", files=[".venv/bin/python"]),
    ".venv/bin/python -m pip install -r requirements.txt": Run("", ["already satisfied: numba"]),
    ".venv/bin/python dev/start.py": Run("-x 4 -v 0 -s 0", [r"step 4 of 4"]),
    "python train_gpt2.py --help": Run("", ["--input_bin", "--learning_rate"]),
    "python train_gpt2.py": Run(SMALL, ["step 1/2", "final val loss: "], first=PREPARE),
    "python dev/data/text.py my_folder": Run("--tokenizer tiny", [r"-i '?data/my_folder/\S+_train_\?{6}\.bin'? -j "],
                                             ["data/my_folder/my_folder_val_000000.bin"]),
    "python train_gpt2.py -e d6 -b 8 -t 256 -x 2000 -l 1e-3 -u 100 -q 0.1": Run("-x 1 -u 0 -d 256 -b 1 -v 1 -m 1 -s 0",
                                                                                ["step 0/1", "final val loss: "]),
    "python dev/data/text.py my_folder --tokenizer bytes": Run("", ["train with: "]),
    "python train_gpt2.py -e gpt2:l4c128h4t128 -b 8 -t 128 -x 4000 -l 2e-3 -u 100": Run(
        f"{BYTES_DATA} -x 3 -u 1 -v 3 -s 0", ["it knows|has not learnt"]),
    "python train_gpt2.py -d 4096": Run("-x 1 -v 0 -s 0", ["step 0/1"]),
    "python train_gpt2.py -o data/runs/one -n 100 -nk 2 -y 1": Run(SMALL, files=["data/runs/one/DONE_00000002"]),
    "python train_gpt2.py --profile 1": Run(SMALL, ["matmul_forward"]),
    "python train_gpt2.py --log_every 100": Run(SMALL, ["final train loss"]),
    RECIPE: Run("-e gpt2:l2c128h2v300", interrupt="step 110/240"),
    "python train_gpt2.py …the same flags…": Run("-e gpt2:l2c128h2v300"),
    "python dev/vislog.py data/runs/shakespeare -o dev/doc/run.png": Run("", [f"wrote {PICTURE}"], [PICTURE],
                                                                         needs="matplotlib"),
    'python -m dev.generate -e data/runs/shakespeare/model_00000240.bin --prompt "ROMEO:" --tokens 80 --top_k 40':
        Run("--prompt ''"),  # a prompt needs GPT-2's vocabulary
    "python -m pip install -r dev/run/requirements-mpi.txt": NO_NETWORK + "only a mirror of packages",
    "mpirun -np 4 --bind-to none python train_gpt2.py …the same flags…": "it needs MPI: test_mpi.py",
    "make bench": ELSEWHERE + "test_bench.py measures a tiny model",
    "make bench ARGS=--torch": ELSEWHERE + "test_bench.py",
    "make train-gpu": "it needs a GPU", "make bench-gpu ARGS=--torch": "it needs a GPU",
    "make test-gpu": "it needs a GPU",
    "DEVICE=cuda dev/scripts/run_gpt2_124M.sh": "it needs a GPU: test_scripts.py",
    "python dev/data/text.py README.md --tokenizer tiny --data_dir data": Run(
        "", files=["data/README/README_train_000000.bin"]),
    "NUMBA_DISABLE_JIT=1 python -m pdb train_gpt2.py -e dev/test/gpt2_tiny.bin "
    '-i "data/README/README_train_??????.bin" -b 1 -t 8 -x 1 -v 0 -s 0': Run(),
    "python -m dev.eval.import_hf -i openai-community/gpt2 -o data/gpt2_124M.bin": NO_NETWORK + "test_export.py",
    "python -m dev.eval.import_hf -i owner/name@revision -o data/name.bin": NO_NETWORK + "test_export.py",
    "python -m dev.eval.export_hf -i data/gpt2_124M.bin -o my_model": "it needs GPT-2's vocabulary: test_export.py",
    "python -m dev.eval.export_gguf -i data/gpt2_124M.bin -o my_model.gguf -d q8_0": "the same",
    "python -m dev.eval.hellaswag -e data/gpt2_124M.bin --limit 500": NO_NETWORK + "test_eval.py",
    'python -m dev.generate -e data/gpt2_124M.bin --prompt "The sea"': Run("-n 5 --prompt ''", ["5 tokens in"]),
    "python dev/test/fuzz.py --cases 100000": Run("--cases 20"),
    "make test-full": "it needs PyTorch and 1 GB", "make lint": Run("", ["All checks passed"], needs="ruff"),
    "make help": Run("", ["make train", "make distclean"]),
    "make distclean": Run("&& ls data", ["remove all of this", r"\] README.md\n$"], stdin="y\n"),
}
COMMAND = re.compile(r"((\w+=\S+ )*(make|python|source|mpirun|\.venv/bin/python|dev/scripts/\S+\.sh)( .*)?|make)$")
OUTPUT = re.compile(  # lines to compare
    r"(step|stopping|checkpoint|resuming|final|verdict|kernels|data/\S+:|\d+ tokens|-> |\(8)")


def commands(text):
    """[(command, what README shows after it)]: of blocks, of `code` that begins like a command, of the table's flags"""
    found = {}
    blocks = re.split(r"^```(.*)\n", text, flags=re.M)  # prose, language, block, "", prose, …
    for i, block in enumerate(blocks):
        if i % 4 == 0:
            for line in re.sub(r"(?<=[^|\n])\n(?=[^\s|])", " ", block).splitlines():  # a wrapped paragraph is one line
                codes = [line.strip()] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
                if line.startswith("| ") and codes and not line.startswith("| | "):
                    codes = [re.sub("^(-[edo] |--[lp])", r"python train_gpt2.py \1", code) for code in codes]
                found |= dict.fromkeys(filter(COMMAND.match, codes), "")
        elif i % 4 == 2 and not blocks[i - 1]:
            name = None
            for line in block.splitlines():
                command = line.removeprefix("$ ").partition("   ")[0].strip()
                if COMMAND.match(command) and ("$ " in line[:2] or "\n$ " not in f"\n{block}"):
                    name = command
                    found.setdefault(name, "")
                elif name:
                    found[name] += line + "\n"
    return found


def plain(text):
    """Without what a step's line has only where there is room"""
    return re.sub(r" \(epoch \S+\)|\S+ tok/s \| ", "", text)


def like(line):
    """A pattern for a line of README: any numbers, a verdict in any words, a model of any shape"""
    line = re.sub(r"(verdict: .*:).*|(resuming )\S+.*", r"\1\2", plain(line))
    return r"\d[\d.,:]*".join(map(re.escape, re.split(r"\d[\d.,:]*", line)))


def clone_into(folder):
    """An empty clone of what is committed; its .venv has this interpreter's packages, so that nothing is fetched."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True, timeout=60)
    environment = folder / ".venv"
    venv.create(environment, symlinks=os.name != "nt")
    site, = environment.glob("lib/python*/site-packages")
    site.joinpath("these.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    for name in "ready", "test", "dev":
        environment.joinpath(name).touch()


def run(command, how, clone, **env):
    """The output of README's command. AssertionError unless it ends as it should"""
    command = command.replace("python train_gpt2.py …the same flags…", RECIPE)
    inherited = {name: value for name, value in os.environ.items()
                 if not name.endswith("_NUM_THREADS") and not name.startswith(("MAKE", "MFLAGS"))}  # of `make test`
    env = {**inherited, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "COLUMNS": "100", "PYTHONUNBUFFERED": "1",
           "LANG": "C.UTF-8", **env}
    if how.first:
        subprocess.run(["bash", "-ec", how.first], cwd=clone, env=env, check=True, timeout=60, capture_output=True)
    process = subprocess.Popen(["bash", "-c", f"exec {command} {how.more}" if how.interrupt else
                                f"{command} {how.more}"], cwd=clone, env=env, stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdin.write(how.stdin)
    process.stdin.close()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if how.interrupt and line.startswith(how.interrupt):
            time.sleep(how.seconds)
            process.send_signal(signal.SIGINT)
    output = "".join(lines)
    assert process.wait(timeout=60) == 0, f"{command} {how.more}\n{output[-2000:]}"
    assert "Traceback" not in output, f"{command}\n{output[-2000:]}"
    for pattern in how.prints:
        assert re.search(pattern, output), f"{command}\nhas not printed {pattern}:\n{output[-2000:]}"
    for name in how.files:
        assert (clone / name).is_file(), f"{command}\nhas not made {name}:\n{output[-2000:]}"
    return output


def typed(shown, otherwise=""):
    """What is typed into the program while it runs, where README shows that"""
    return "".join(re.findall(r"^\(Pdb\) (.*\n)", shown, re.M)) or otherwise


@pytest.fixture
def clone(tmp_path):
    if any(shutil.which(name) is None for name in ("bash", "git", "make")) or not (ROOT / ".git").exists():
        pytest.skip("needs bash, git, make and a repository")
    clone_into(tmp_path / "llm.numba")
    return tmp_path / "llm.numba"


def test_every_command_is_known():
    assert list(commands((ROOT / "README.md").read_text())) == list(COMMANDS)


def test_readme(clone, tmp_path):
    """What README shows after a command has, line by line, the shape of what is really printed."""
    (tmp_path / "home").mkdir()
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    for command, shown in commands((clone / "README.md").read_text()).items():
        how = COMMANDS[command]
        if isinstance(how, str) or how.needs and importlib.util.find_spec(how.needs) is None:
            continue
        how.stdin = typed(shown, how.stdin)
        output = run(command, how, clone, **nowhere, HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
        for line in filter(OUTPUT.match, shown.splitlines()):
            assert re.search(like(line), plain(output)), f"{command}\nprints no line like {line}:\n{output[-2000:]}"


def test_notebook(make_shard, tiny, tmp_path, monkeypatch, capsys):
    """README's block of Python, with the tiny model and two of its steps"""
    block, = re.findall("^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (tmp_path / SHAKESPEARE).parent.mkdir(parents=True)
    make_shard(tmp_path / f"{SHAKESPEARE}_train.bin", [1, 2, 3] * 200)
    monkeypatch.chdir(tmp_path)
    assert block.count('"d6"') == block.count("range(20)") == 1
    exec(block.replace('"d6"', repr(tiny)).replace("range(20)", "range(2)"), {})
    (first, second) = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (first[0], second[0]) == ("0", "1") and float(first[1]) > float(second[1])


# ---------------------------------------------------------------------------------------------------------------------
# --write

def renewed(shown, output):
    """What README shows after a command, said by another output of it: a line that OUTPUT knows becomes the next one of
    its shape, that of a step the step's own. A text that a model has written becomes what follows there, up to the
    next such line or, where none comes, as many lines. `…`, empty lines, and what is typed stay."""
    left = [line.removeprefix("(Pdb) ").rstrip() for line in output.splitlines()]
    new, text = [], 0

    def take(line):
        """The lines left before the one that this line becomes, and that"""
        step = re.match(r"step \d+/\d+:|", line)[0]
        at = next((i for i, one in enumerate(left) if one.startswith(step) and re.search(like(line), plain(one))), None)
        assert at is not None, f"no line like {line}"
        before, found = left[:at], left[at]
        del left[:at + 1]
        return before, found
    for line in shown.splitlines():
        if OUTPUT.match(line):
            before, found = take(line)
            new += "\n".join(before).strip("\n").split("\n") + [""] if text else []
            new, text = [*new, found], 0
        elif not text and (not line or re.match(r"…|\^C|\(Pdb\) ", line)):
            new.append(line)
        else:
            text += 1
    return "\n".join([*new, *left[:text]]) + "\n"


def test_renewed():
    output = "model: 1\nstep 1/9: loss 3.5\nstep 2/9: loss 2.25\n\nsaved\nstep 3/9: loss 1\n(Pdb) (8, 3)\n"
    assert renewed("…\nstep 2/9: loss 7.0\n^C\nstep 4/9: loss 5\n", output.replace("3/9", "4/9")) == (
        "…\nstep 2/9: loss 2.25\n^C\nstep 4/9: loss 1\n")
    assert renewed("(Pdb) p x.shape\n(8, 128)\n\n", output) == "(Pdb) p x.shape\n(8, 3)\n\n"
    drawn = "kernels: 1 s\nA b\n\nc\nd\n\n9 tokens in 2 s\n"
    assert renewed("kernels: 7 s\nX\n\n80 tokens in 3 s\n", drawn) == drawn
    assert renewed("kernels: 7 s\nX\ny\n", drawn) == "kernels: 1 s\nA b\n\n"
    with pytest.raises(AssertionError, match="no line like final"):
        renewed("final loss: 7\n", output)


def write():
    """Renew the transcripts in README.md, and the picture of the run in them, as far as their commands can run here."""
    readme = (ROOT / "README.md").read_text()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "llm.numba"
        clone_into(clone)
        (clone / "data/runs").mkdir()
        for name in "tinyshakespeare", "gpt2_tokenizer.bin", ".tiktoken", "runs/first":
            (clone / "data" / name).symlink_to(ROOT / "data" / name)
        for command, shown in commands(readme).items():
            if f"\n$ {command}\n" not in readme:
                continue
            how = COMMANDS[command]
            try:
                output = run(command, Run(stdin=typed(shown), interrupt=how.interrupt, seconds=0.2), clone)
                readme = readme.replace(shown, renewed(shown, output)) if shown.strip() else readme
            except AssertionError as error:
                print(f"stays as it was: {command}: {error}\n")
            else:
                for name in how.files if how.files == [PICTURE] else ():
                    shutil.copy(clone / name, ROOT / name)
    (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python dev/test/test_readme.py --write renews README's transcripts; pytest runs the tests")
    write()
