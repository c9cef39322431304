"""
The output folder of a run: main.log, and checkpoints from which it goes on as if it had never stopped.

A checkpoint is model_*.bin, state_*.bin (AdamW's moments, where the data loader is) and DONE_*, in llm.c's formats, and
run_*.json, which is ours. DONE_* is written last and removed first: where it is, all are complete.
"""
import glob
import json
import os
import re
import time
from dataclasses import dataclass

import numpy as np

from dev.run.engine import Engine
from dev.run.files import HEADER_BYTES, MODEL_MAGIC, STATE_MAGIC, read_header, sync_folder, write_file
from dev.run.schedule import Outliers
from dev.run.text import Sampler


@dataclass
class Run:
    """All that a checkpoint saves, and restores"""
    engine: Engine
    loader: object  # train_gpt2.DataLoader
    sampler: Sampler
    outliers: Outliers
    step: int = 0


def checkpoint_files(folder, step):
    """The paths of a checkpoint's files, DONE first"""
    names = f"DONE_{step:08d}", f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"run_{step:08d}.json"
    return [os.path.join(folder, name) for name in names]


def complete_checkpoints(folder):
    """The steps for which the folder holds a complete checkpoint, in order"""
    names = [os.path.basename(path)[5:] for path in glob.glob(os.path.join(glob.escape(folder), "DONE_????????"))]
    return sorted(int(name) for name in names if name.isdigit())


def newest_checkpoint(folder):
    """(step, path of the weights) of the newest complete checkpoint, (None, None) where there is none"""
    steps = complete_checkpoints(folder)
    return (steps[-1], checkpoint_files(folder, steps[-1])[1]) if steps else (None, None)


def write_model(path, engine):
    """Write an engine's parameters as a version 3 checkpoint. What was at `path` stays until the new one is there."""
    c, header = engine.config, np.zeros(256, np.int32)
    header[:2] = MODEL_MAGIC, 3
    header[2:8] = c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, c.padded_vocab_size
    write_file(path, header, engine.host("params").memory)


def write_run_checkpoint(folder, run):
    """Write all that a run needs to go on."""
    done, model_path, state_path, run_path = checkpoint_files(folder, run.step)
    engine, state, header = run.engine, run.loader.state(), np.zeros(256, np.int32)
    write_model(model_path, engine)
    header[:6] = STATE_MAGIC, 1, 1, 0, 0, "generator" in state  # one process, rank 0, no copy of the weights
    header[10] = run.step
    header[20:24].view(np.uint64)[:] = run.sampler.state
    header[30:34].view(np.uint64)[:] = state["shard_index"], state["sample_index"]
    write_file(state_path, header, engine.host("m").memory, engine.host("v").memory, *pack_order(state))
    more = {"tokens_per_batch": run.loader.B * run.loader.T, "shard_tokens": run.loader.shard_tokens,
            "windows": [list(window) for window in run.outliers.windows]}
    write_file(run_path, np.frombuffer(json.dumps(more).encode(), np.uint8))
    write_file(done)


def pack_order(state):
    """The orders and the generator of a loader's state as arrays of llm.c's state file; none if nothing is shuffled"""
    if "generator" not in state:
        return []
    key, position = state["generator"]
    left = 1 if position == 624 else 625 - position  # draws until the generator's next round
    return [np.array([len(state["shard_order"])], np.uint64), np.array(state["shard_order"], np.int32),
            np.array([len(state["sample_order"])], np.uint64), np.array(state["sample_order"], np.int32),
            np.array([0, 0, left, position], np.uint32), key.astype(np.uint32),
            np.array([0, 0x9908B0DF], np.uint32)]


def unpack_order(data, shards):
    """What pack_order() made, from its bytes, as entries of a loader's state. ValueError where they make no sense"""
    words = np.frombuffer(data[:len(data) // 4 * 4], np.uint32)
    left, position = words[-628:-626].tolist() if len(words) > 630 else (0, 0)
    if left != 1 and not (0 < position < 625 and left + position == 625):
        raise ValueError("its generator's state is damaged")
    return {"shard_order": words[2:2 + shards].tolist(), "sample_order": words[4 + shards:-630].tolist(),
            "generator": (words[-626:-2], 624 if left == 1 else position)}


def read_run_checkpoint(folder, step, run):
    """Restore all that write_run_checkpoint saved but the weights. ValueError where it is damaged or does not fit."""
    _, _, state_path, run_path = checkpoint_files(folder, step)
    engine, loader = run.engine, run.loader
    fit = "---> HINT: resume with the model, the data (-i), -b and -t that the run began with, or start anew with -y 0"
    with open(state_path, "rb") as file:
        header = read_header(file, state_path, STATE_MAGIC, (1,))
        rest = os.path.getsize(state_path) - HEADER_BYTES - 4 * engine.num_parameters * (3 if header[4] else 2)
        if header[10] != step or header[2] != 1 or rest < 0:
            raise ValueError(f"{state_path}: its header says step {header[10]}, {header[2]} processes; it has "
                             f"{max(0, -rest)} bytes too few for {engine.num_parameters:,} parameters\n{fit}")
        engine.load("m", file)
        engine.load("v", file)
        if header[4]:  # llm.c's float32 weights, where the model's file may hold bfloat16
            engine.load("params", file)
        order = file.read()
    data = loader.B * loader.T, loader.shard_tokens
    found, windows = read_run_json(run_path, data)
    if found != data:
        raise ValueError(f"{run_path}: the run had {found[0]} tokens in a batch and shards of {found[1]} tokens; "
                         f"now there are {data[0]} and {data[1]}\n{fit}")
    state = dict(zip(("shard_index", "sample_index"), map(int, header[30:34].view(np.uint64))))
    try:
        if bool(header[5]) != bool(order):
            raise ValueError("its header and its size disagree about whether batches are shuffled")
        loader.restore(state | (unpack_order(order, len(loader.files)) if order else {}))
    except ValueError as error:
        raise ValueError(f"{state_path}: {error}\n{fit}") from error
    run.sampler.state = int(header[20:22].view(np.uint64)[0])
    for window, old in zip(run.outliers.windows, windows):
        window.extend(old)
    run.step = step


def read_run_json(path, data):
    """(tokens in a batch, tokens of the shards), windows from a run_*.json; `data` and no windows without the file"""
    if not os.path.exists(path):  # a checkpoint of llm.c has none
        return data, []
    try:
        with open(path) as file:
            run = json.load(file)
        windows = [[float(value) for value in window] for window in run["windows"]]
        return (run["tokens_per_batch"], run["shard_tokens"]), windows
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged: {error!r}\n---> HINT: remove it to go on without what it holds: "
                         "the last 128 losses and gradient norms") from error


def save(flags, run):
    """Write a checkpoint; when it is complete, remove those that are too old. Returns the seconds that it took."""
    start = time.perf_counter()
    with open(os.path.join(flags.output_dir, "main.log"), "a") as log:
        os.fsync(log.fileno())  # the checkpoint's lines, before it
    write_run_checkpoint(flags.output_dir, run)
    remove_old_checkpoints(flags.output_dir, flags.checkpoints_keep, flags.major_checkpoint_every)
    return time.perf_counter() - start


def remove_old_checkpoints(folder, keep, major_every):
    """Remove what is older than the newest `keep` complete checkpoints (0 = nothing), but for multiples of major_every.
    Incomplete ones too: they are what a run left that was killed while it removed them."""
    complete = complete_checkpoints(folder)
    if not keep or not complete:
        return
    matches = (re.match(r"(?:DONE|model|state|run)_(\d{8})", name) for name in os.listdir(folder))
    steps = {int(match[1]) for match in matches if match}
    minor = [step for step in complete if not major_every or step % major_every]
    for step in steps - set(minor[-keep:]) - (set(complete) - set(minor)):
        for path in checkpoint_files(folder, step) if step < complete[-1] else []:
            if os.path.exists(path):
                os.unlink(path)
                sync_folder(folder)


def open_output(flags, resume_step):
    """Make the output folder fit for a run: without leftovers of one that was killed, or ended and is not resumed.
    Returns lines that say what happened."""
    folder, lines = flags.output_dir, []
    os.makedirs(folder, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):
        os.unlink(path)
    steps = complete_checkpoints(folder)
    if flags.resume and not steps:
        lines = [f"no complete checkpoint in {folder}: starting from {flags.model}"]
    elif resume_step is None and steps:
        lines = [f"starting anew in {folder}: checkpoints of steps {steps[0]} to {steps[-1]} are overwritten"]
        for step in steps:
            os.unlink(checkpoint_files(folder, step)[0])  # without DONE it is none
    else:
        remove_old_checkpoints(folder, flags.checkpoints_keep, flags.major_checkpoint_every)
    begin_log(folder, resume_step)
    return lines


def begin_log(folder, resume_step):
    """Begin main.log, in llm.c's format. Of a run that is resumed, those lines stay that its checkpoint knows."""
    path, lines = os.path.join(folder, "main.log"), []

    def known(line):  # at the checkpoint's step, validation came before it, training after
        match = re.match(r"s:(\d+) (\w+):.*\n", line)
        return match and (int(match[1]), match[2] == "trl") < (resume_step, True)
    if resume_step is not None and os.path.exists(path):
        with open(path) as file:
            lines = filter(known, file.readlines())
    write_file(path, np.frombuffer("".join(lines).encode(), np.uint8))
