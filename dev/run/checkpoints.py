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

import numpy as np

from dev.run.files import HEADER_BYTES, STATE_MAGIC, read_header, sync_folder, write_file


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


def write_run_checkpoint(folder, step, model, loader, sampler, windows):
    """Write all that a run needs to go on. windows: the last losses and gradient norms, two deques"""
    done, model_path, state_path, run_path = checkpoint_files(folder, step)
    model.write_checkpoint(model_path)
    header = np.zeros(256, np.int32)
    header[:6] = STATE_MAGIC, 1, 1, 0, 0, loader.random is not None  # one process, rank 0, no copy of the weights
    header[10] = step
    header[20:24].view(np.uint64)[:] = sampler.state
    header[30:34].view(np.uint64)[:] = loader.shard_index, loader.sample_index
    write_file(state_path, header, model.m.memory, model.v.memory, *shuffle_state(loader))
    run = {"tokens_per_batch": loader.B * loader.T, "shard_tokens": loader.shard_tokens,
           "windows": [list(window) for window in windows]}
    write_file(run_path, np.frombuffer(json.dumps(run).encode(), np.uint8))
    write_file(done)


def shuffle_state(loader):
    """A data loader's orders and generator as in llm.c's state file, a list of arrays; empty if nothing is shuffled"""
    if not loader.random:
        return []
    _, key, position, *_ = loader.random.get_state()
    left = 1 if position == 624 else 625 - position  # draws until the generator's next round
    return [np.array([len(loader.shard_order)], np.uint64), np.array(loader.shard_order, np.int32),
            np.array([len(loader.sample_order)], np.uint64), np.array(loader.sample_order, np.int32),
            np.array([0, 0, left, position], np.uint32), key.astype(np.uint32),
            np.array([0, 0x9908B0DF], np.uint32)]


def read_run_checkpoint(folder, step, model, loader, sampler, windows):
    """Restore all that write_run_checkpoint saved but the weights. ValueError where it is damaged or does not fit."""
    _, _, state_path, run_path = checkpoint_files(folder, step)
    fit = "---> HINT: resume with the model, the data (-i), -b and -t that the run began with, or start anew with -y 0"
    with open(state_path, "rb") as file:
        header = read_header(file, state_path, STATE_MAGIC, (1,))
        rest = os.path.getsize(state_path) - HEADER_BYTES - 4 * model.num_parameters * (3 if header[4] else 2)
        if header[10] != step or header[2] != 1 or rest < 0:
            raise ValueError(f"{state_path}: its header says step {header[10]}, {header[2]} processes; it has "
                             f"{max(0, -rest)} bytes too few for {model.num_parameters:,} parameters\n{fit}")
        file.readinto(model.m.memory.view(np.uint8))
        file.readinto(model.v.memory.view(np.uint8))
        if header[4]:  # llm.c's float32 weights, where the model's file may hold bfloat16
            file.readinto(model.params.memory.view(np.uint8))
        shuffled = file.read()
    data = loader.B * loader.T, loader.shard_tokens
    found, values = data, []
    if os.path.exists(run_path):  # a checkpoint of llm.c has none
        try:
            with open(run_path) as file:
                run = json.load(file)
            found = run["tokens_per_batch"], run["shard_tokens"]
            values = [[float(value) for value in window] for window in run["windows"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{run_path}: damaged: {error!r}\n---> HINT: remove it to go on without what it holds: "
                             "the last 128 losses and gradient norms") from error
    if found != data:
        raise ValueError(f"{run_path}: the run had {found[0]} tokens in a batch and shards of {found[1]} tokens; "
                         f"now there are {data[0]} and {data[1]}\n{fit}")
    shard_index, sample_index = (int(n) for n in header[30:34].view(np.uint64))
    if bool(header[5]) != (loader.random is not None) or not restore(loader, shard_index, sample_index, shuffled):
        raise ValueError(f"{state_path}: the order of its batches is not one of this data\n{fit}")
    sampler.state = int(header[20:22].view(np.uint64)[0])
    for window, old in zip(windows, values):
        window.extend(old)


def restore(loader, shard_index, sample_index, state):
    """Take a data loader to where shuffle_state() was called. state: its bytes. False where they do not fit it"""
    shards, words = len(loader.files), np.frombuffer(state[:len(state) // 4 * 4], np.uint32)
    if shard_index >= shards:
        return False
    if loader.random:
        order, samples = words[2:2 + shards].tolist(), words[4 + shards:-630].tolist()
        left, position = words[-628:-626].tolist() if len(words) > 630 else (0, 0)
        fits = left == 1 or 0 < position < 625 and left + position == 625
        fits = fits and sorted(order) == list(range(shards))
        if not fits or sorted(samples) != list(range(loader.samples_in(order[shard_index]))):
            return False
        loader.shard_order = order
    elif len(state):
        return False
    loader.open_shard(shard_index)
    if loader.random:
        loader.sample_order = samples
        loader.random.set_state(("MT19937", words[-626:-2], 624 if left == 1 else position))
    loader.sample_index = sample_index
    return True


def save(flags, step, model, loader, sampler, windows):
    """Write a checkpoint; when it is complete, remove those that are too old."""
    start = time.perf_counter()
    with open(os.path.join(flags.output_dir, "main.log"), "a") as log:
        os.fsync(log.fileno())  # the checkpoint's lines, before it
    write_run_checkpoint(flags.output_dir, step, model, loader, sampler, windows)
    remove_old_checkpoints(flags.output_dir, flags.checkpoints_keep, flags.major_checkpoint_every)
    seconds = time.perf_counter() - start
    print(f"checkpoint of step {step} written to {flags.output_dir} (took {seconds:.1f} s)", flush=True)


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
    """Make the output folder fit for a run: without leftovers of one that was killed, or ended and is not resumed."""
    os.makedirs(flags.output_dir, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(flags.output_dir), "*.tmp")):
        os.unlink(path)
    steps = complete_checkpoints(flags.output_dir)
    if flags.resume and not steps:
        print(f"no complete checkpoint in {flags.output_dir}: starting from {flags.model}")
    elif resume_step is None and steps:
        print(f"starting anew in {flags.output_dir}: checkpoints of steps {steps[0]} to {steps[-1]} are overwritten")
        for step in steps:
            os.unlink(checkpoint_files(flags.output_dir, step)[0])  # without DONE it is none
    else:
        remove_old_checkpoints(flags.output_dir, flags.checkpoints_keep, flags.major_checkpoint_every)


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


def write_log(folder, line):
    """Add a line to the folder's main.log."""
    if folder:
        with open(os.path.join(folder, "main.log"), "a") as file:
            file.write(line + "\n")
