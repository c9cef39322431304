"""The recipes in dev/scripts: what they would run is something that the trainer accepts, and as large as they say. And
what the Makefile would run."""
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy_gpu
import pytest

import train_gpt2
from dev.run.flags import parse_flags

SCRIPTS = sorted(Path(__file__).parents[1].glob("scripts/*.sh"))
# (tokens of a step, steps, peak learning rate, its final fraction, warm-up) in llm.c's scripts of the same names
LLMC = {
    "run_gpt2_124M": (524288, 18865, 6e-4, 0, 700), "run_gpt2_350M": (524288, 60000, 3e-4, 0, 700),
    "run_gpt2_774M": (524288, 286102, 2.5e-4, 0, 700), "run_gpt2_1558M": (1048576, 32000, 6e-4, 0.1, 700),
    "run_gpt3_125M": (524288, 572204, 6e-4, 0.1, 700),
}
LLMC_BATCHES = dict(zip(LLMC, (64, 64, 32, 16, 32)))


@pytest.fixture
def commands(tmp_path):
    """commands(script, *arguments): the commands that it gives to Python, each a list of words; none is run."""
    def commands(script, *arguments, environment=".venv", **more):
        (tmp_path / environment / "bin").mkdir(parents=True)
        (tmp_path / "dev/scripts").mkdir(parents=True)
        shutil.copy(script, tmp_path / "dev/scripts")
        python, log = tmp_path / environment / "bin/python", tmp_path / "commands"
        quoted = shlex.quote(str(log))
        python.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {quoted}\necho >> {quoted}\n')
        python.chmod(0o755)
        subprocess.run(["bash", f"scripts/{script.name}", *arguments], cwd=tmp_path / "dev", check=True, timeout=60,
                       env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return [shlex.split(line) for line in log.read_text().splitlines()]
    return commands


def test_there_are_scripts():
    ours = {"finetune_124M_shakespeare", "pretrain_d6_tinystories", "sweep_lr"}
    assert {script.stem for script in SCRIPTS} >= {*LLMC, *ours}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_sweep_without_data_stops_and_ranks_no_old_logs(tmp_path):
    for place in ".venv/bin", "dev/scripts", "data/runs/sweep_lr/lr_1e-4":
        (tmp_path / place).mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "scripts/sweep_lr.sh", tmp_path / "dev/scripts")
    old = tmp_path / "data/runs/sweep_lr/lr_1e-4/main.log"
    old.write_text("s:0 tel:1.2345\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/bash\necho run >> runs\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(["bash", "dev/scripts/sweep_lr.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "1.2345" not in done.stdout and old.read_text() == "s:0 tel:1.2345\n"
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script, commands):
    assert os.access(script, os.X_OK)
    runs = [parse_flags(words[1:]) for words in commands(script, "-s", "7") if words[0] == "train_gpt2.py"]
    assert len(runs) == (5 if script.stem == "sweep_lr" else 1)
    flops = 0
    for flags in runs:
        assert flags.sample_every == 7 and not flags.ignored and flags.output_dir.startswith("data/runs/")
        assert flags.warmup_iters < flags.num_iterations and flags.grad_clip == 1
        if script.stem != "sweep_lr":
            assert flags.resume and flags.checkpoints_keep and 0 < flags.checkpoint_every < flags.num_iterations
        config = train_gpt2.model_config("d12" if flags.model == "data/gpt2_124M.bin" else flags.model)
        size, T = train_gpt2.size_of(train_gpt2.parameter_table(config)), flags.sequence_length
        tokens = flags.total_batch_size * flags.num_iterations
        flops += (6 * size + 6 * config.num_layers * config.channels * T) * tokens
    if script.stem in LLMC:
        assert LLMC[script.stem] == (flags.total_batch_size, flags.num_iterations, flags.learning_rate,
                                     flags.learning_rate_decay_frac, flags.warmup_iters)
        assert (flags.weight_decay, flags.beta1, flags.beta2) == (0.1, 0.9, 0.95)
    heading = script.read_text().replace("\n# ", " ")
    assert 0.7 < flops / float(re.search(r"Costs (\S+) FLOPs", heading)[1]) < 1.1  # validation comes on top
    plan = train_gpt2.memory_plan(config, flags.batch_size, T, flags.recompute)
    memory = 0.16 + sum(plan.values()) / 2**30  # 0.16: Python's
    assert memory == pytest.approx(float(re.search(r"(\S+) GiB of memory", heading)[1]), rel=0.12)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", LLMC)
def test_script_for_a_gpu(name, commands):
    """Its environment, llm.c's batch size, and the time and memory that the heading says"""
    script = next(script for script in SCRIPTS if script.stem == name)
    words, = commands(script, "-s", "7", environment=".venv-gpu", DEVICE="cuda")
    flags = parse_flags(words[1:])
    assert (flags.device, flags.batch_size, flags.sample_every) == ("cuda", LLMC_BATCHES[name], 7) and not flags.ignored
    heading = script.read_text().replace("\n# ", " ")
    number, unit, rate = re.search(r"environment\): (\S+) (hours|days) at (\S+) tokens/s", heading).groups()
    seconds = flags.total_batch_size * flags.num_iterations / int(rate.replace(",", ""))
    assert seconds / {"hours": 3600, "days": 86400}[unit] == pytest.approx(float(number), rel=0.02)
    config = train_gpt2.model_config(flags.model)
    engine = numpy_gpu.engine(config, train_gpt2.parameter_table(config), None, precision="bf16")  # or skips
    plan = engine.memory_plan(flags.batch_size, flags.sequence_length, flags.recompute, True)
    said = float(re.search(r"; (\S+) GiB of its memory", heading)[1])  # with cuDNN's attention, up to 2 GiB more
    assert -0.2 < said - sum(plan.values()) / 2**30 < 2.3


# ---------------------------------------------------------------------------------------------------------------------
# the Makefile, with an environment whose Python only writes down what it is given

@pytest.fixture
def make(tmp_path):
    """make(target, failing): (exit status, what Python was given, a line each) where Python fails for `failing`"""
    def make(target, failing="nothing"):
        (tmp_path / ".venv/bin").mkdir(parents=True)
        for name in "Makefile", "requirements.txt":
            shutil.copy(Path(__file__).parents[2] / name, tmp_path)
        python, log = tmp_path / ".venv/bin/python", tmp_path / "commands"
        python.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(log))}\ncase "$*" in {failing}*) exit 1;; esac\n')
        python.chmod(0o755)
        for name in "ready", "test":
            (tmp_path / ".venv" / name).touch()
        done = subprocess.run(["make", *target.split()], cwd=tmp_path, capture_output=True, timeout=60, check=False)
        return done.returncode, log.read_text().splitlines()
    return make if shutil.which("make") else pytest.skip("needs make")


@pytest.mark.parametrize("failing, status", [("nothing", 0), ("test_gpt2.py", 2), ("-m", 2)])
def test_make_test_runs_both(make, failing, status):
    """pytest also where test_gpt2.py fails, with the names of what fails, errors or is skipped, and why (-rfEs)"""
    assert make("test", failing) == (status, ["test_gpt2.py", "-m pytest -rfEs"])


def test_make_lint_looks_at_tracked_files(make, tmp_path):
    for name in "tracked.py", "scratch.py":
        (tmp_path / name).touch()
    for command in "init -q", "add tracked.py":
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, timeout=60)
    assert make("lint") == (0, ["-m ruff check tracked.py"])
