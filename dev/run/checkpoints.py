"""
Checkpoints, from which a run goes on as if it had never stopped.

A checkpoint is model_*.bin, state_*.bin (AdamW's moments, where the data loader is) and DONE_*, in llm.c's formats, and
run_*.json, which is ours and has their checksums. DONE_* is written last and removed first: where it is, all are
complete. Of several processes the first writes them; the others write a state_*.bin each.
"""
import contextlib
import glob
import json
import math
import os
import re
import time
from dataclasses import dataclass

import numpy as np

from dev.run.config import model_header
from dev.run.console import shown
from dev.run.engine import NO_LAYERS, Engine
from dev.run.files import (
    HEADER_BYTES,
    MODEL_MAGIC,
    STATE_MAGIC,
    new_header,
    read_header,
    sum_of,
    sync_folder,
    to_bfloat16,
    write_file,
)
from dev.run.reading import read_json, reading, reason
from dev.run.schedule import Outliers
from dev.run.shard import check_shards
from dev.run.stop import CutShort
from dev.run.text import Sampler

RUN = {"tokens_per_batch": int, "shard_tokens": [int], "windows": [[float], [float]], "zero_stage?": int,
       "model?": str, "coins?": int, "flags?": {"-e?": str}, "tokens?": int, "sums?": {str: int},
       "shards?": [str], "offset?": int}  # in a run_*.json
ANEW = "begin anew with --overwrite 1 instead of -y 1"  # the end of hints


@dataclass
class Run:
    """All that a checkpoint saves, and restores"""
    engine: Engine
    loader: object  # train_gpt2.DataLoader
    sampler: Sampler
    outliers: Outliers
    settings: dict      # {short flag: value} of what decides its numbers; -e: with which it began
    step: int = 0
    earlier: tuple = (0, 0)  # steps and tokens of the run that it goes on from
    changed: tuple = ()      # the settings that are others than that run's
    data: tuple = ()         # how its data go on where batches or shards are others than that run's, in words
    coins: int = None   # while validation and samples of this step are not over: the sampler's state before them
    resumed: tuple = None  # the step of the checkpoint that it goes on from, and whether they were over there
    place: dict = None  # the loader's state at the step's beginning; None while an update changes the weights

    @property
    def tokens(self):
        """That it has been trained on before this step"""
        steps, tokens = self.earlier
        return tokens + (self.step - steps) * self.settings["-d"]

    def begin(self, step):
        """A step begins, to which a checkpoint goes back until its update"""
        self.step, self.place = step, self.loader.state()

    @contextlib.contextmanager
    def look(self):
        """A context for the validation and the samples of a step, which may be cut short: then a run that goes on from
        this step begins them again."""
        self.coins = self.sampler.state
        with contextlib.suppress(CutShort):
            yield
            self.coins = None


def checkpoint_files(folder, step, rank=0):
    """The paths of a checkpoint's files, DONE first, the state that of a process"""
    names = f"DONE_{step:08d}", f"model_{step:08d}.bin", f"state_{step:08d}_{rank:05d}.bin", f"run_{step:08d}.json"
    return [os.path.join(folder, name) for name in names]


def complete_checkpoints(folder):
    """The steps for which the folder holds a complete checkpoint, in order"""
    names = [os.path.basename(path)[5:] for path in glob.glob(os.path.join(glob.escape(folder), "DONE_????????"))]
    return sorted(int(name) for name in names if name.isdigit())


def newest_checkpoint(folder):
    """(step, path of the weights) of the newest complete checkpoint, (None, None) where there is none. ValueError where
    it is not complete, whatever its DONE says"""
    steps = complete_checkpoints(folder)
    if not steps:
        return None, None
    done, *paths = checkpoint_files(folder, steps[-1])
    for path in paths[:2]:
        if not os.path.isfile(path) or os.path.getsize(path) < HEADER_BYTES:
            what = "cut short" if os.path.isfile(path) else "missing"
            raise ValueError(f"{path} is {what}, a part of the checkpoint of step {steps[-1]}\n{way_back(folder)}")
    return steps[-1], paths[0]


def way_back(folder):
    """The hint where the newest checkpoint is damaged: how to go on from the one before"""
    *before, step = complete_checkpoints(folder)
    done = checkpoint_files(folder, step)[0]
    goes_on = f"from step {before[-1]}" if before else "anew"
    return f"---> HINT: bring it back, or remove {done}: then -y 1 goes on {goes_on}"


@contextlib.contextmanager
def part_of(folder, path):
    """A context in which a file of the newest checkpoint is read, the weights or a state: an error in it says how to go
    on without that. None: it is a file of none"""
    try:
        yield
    except ValueError as error:
        if path is None or not str(error).startswith(f"{shown(path)}: "):
            raise
        raise ValueError(f"{reason(error)}\n{way_back(folder)}") from error


def write_model(path, engine, version=3):
    """Write an engine's parameters, in version 5 rounded to bfloat16. What was at `path` stays until the new one is
    there. Returns its checksum."""
    memory = engine.host("params").memory
    return write_file(path, model_header(engine.config, version), memory if version == 3 else to_bfloat16(memory))


def pieces_of(engine):
    """[(tensor, its pieces that this process updates)] for all parameters: the pieces lie in files as the moments do"""
    params, pieces = engine.host("params"), engine.processes.pieces
    tensors = [getattr(params, name)[None] if name in NO_LAYERS else getattr(params, name) for name, _ in engine.table]
    return [(tensor, pieces(tensor)) for tensor in tensors]


def write_run_checkpoint(folder, run, master=0):
    """Write all that a run needs to go on. master: 1 = its float32 weights are in the state files, as llm.c's are, and
    the model's file holds what products read."""
    engine, state, processes = run.engine, run.place, run.engine.processes
    done, model_path, state_path, run_path = checkpoint_files(folder, run.step, processes.rank)
    sums = np.zeros(processes.size + 1, np.int64)  # of each process's state, and of the model
    if processes.rank == 0:
        sums[-1] = write_model(model_path, engine, 5 if master and engine.precision == "bf16" else 3)
    header = new_header(STATE_MAGIC, 1, processes.size, processes.rank, master, "generator" in state)
    header[10] = run.step
    header[20:24].view(np.uint64)[:] = run.sampler.state if run.coins is None else run.coins
    sample, offset = divmod(state["taken"], state["sample_tokens"])
    header[30:34].view(np.uint64)[:] = state["shard_index"], sample
    weights = [piece for _, pieces in pieces_of(engine) for piece in pieces] if master else []
    moments = engine.host("m").memory, engine.host("v").memory
    sums[processes.rank] = write_file(state_path, header, *moments, *weights, *pack_order(state))
    names = [checkpoint_files(folder, run.step, rank)[2] for rank in range(processes.size)] + [model_path]
    sums = processes.sum(sums).tolist()  # so every process has written its state
    more = {"tokens_per_batch": state["sample_tokens"], "offset": offset, "shard_tokens": run.loader.shard_tokens,
            "shards": list(map(os.path.basename, run.loader.files)),
            "windows": [list(window) for window in run.outliers.windows], "zero_stage": processes.zero_stage,
            "flags": run.settings, "tokens": run.tokens, "sums": dict(zip(map(os.path.basename, names), sums))}
    if run.coins is not None:
        more["coins"] = run.coins
    if processes.rank == 0:
        write_file(run_path, np.frombuffer(json.dumps(more).encode(), np.uint8))
        write_file(done)


def loosen(folder, step):
    """A checkpoint of this step, where there is one, is about to be written anew. Its files will be of both for a
    moment: all the same but the sampler's state, which a run_*.json knows; only checksums would not fit."""
    done, *_, run_path = checkpoint_files(folder, step)
    if os.path.exists(done) and os.path.exists(run_path):
        said = read_json(run_path, RUN)
        if said.pop("sums", None):
            write_file(run_path, np.frombuffer(json.dumps(said).encode(), np.uint8))


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
    """What pack_order() made, from its bytes, as entries of a loader's state. ValueError where they make no sense

    shards: how many there are now. More than then come after the others of this epoch."""
    words = np.frombuffer(data[:len(data) // 4 * 4], np.uint32)
    left, position = words[-628:-626].tolist() if len(words) > 630 else (0, 0)
    if left != 1 and not (0 < position < 625 and left + position == 625):
        raise ValueError("its generator's state is damaged")
    count = int(words[:2].view(np.uint64)[0])
    shard_order, sample_order = (part.astype(np.int32) for part in (words[2:2 + count], words[4 + count:-630]))
    shard_order = np.append(shard_order, np.arange(min(count, shards), shards, dtype=np.int32))
    return {"shard_order": shard_order, "sample_order": sample_order,
            "generator": (words[-626:-2], 624 if left == 1 else position)}


def choose_state(folder, step, saved_stage, processes):
    """The path of the state file from which this process goes on: its own, or, where the run had another number of
    processes, the first one's, which has all moments and the same place in the data. ValueError where it has not."""
    first, own = (checkpoint_files(folder, step, rank)[2] for rank in (0, processes.rank))
    with part_of(folder, first), open(first, "rb") as file:
        count = int(read_header(file, first, STATE_MAGIC, (1,))[2])
        if count < 1:
            raise ValueError(f"{first}: damaged: its header says {count} processes")
    same = count == processes.size
    if saved_stage != processes.zero_stage and count > 1 or processes.zero_stage and not same:
        raise ValueError(f"{first}: a run of {count} processes with -z {saved_stage} left off here; these are "
                         f"{processes.size} with -z {processes.zero_stage}\n---> HINT: -z stays what it was, and with "
                         "-z 1 so does the number of processes")
    if same and not os.path.exists(own):
        raise ValueError(f"{own} is missing: each of the {count} processes of the run wrote such a file\n"
                         f"---> HINT: bring it back, or {ANEW}")
    return own if same else first


def read_run_checkpoint(folder, step, run):
    """Restore all that write_run_checkpoint saved but the weights. ValueError where it is damaged or does not fit."""
    engine, loader, processes = run.engine, run.loader, run.engine.processes
    done, model_path, _, run_path = checkpoint_files(folder, step)
    more = read_run_json(run_path, loader)
    size, offset = more["tokens_per_batch"], more.get("offset", 0)
    stage = more.get("zero_stage", processes.zero_stage)
    fit = f"---> HINT: resume with the model, the data (-i), -a, -b and -t that the run began with, or {ANEW}"
    state_path = choose_state(folder, step, stage, processes)
    check_sums(folder, more.get("sums", {}), model_path, state_path)
    with open(state_path, "rb") as file:
        header = read_header(file, state_path, STATE_MAGIC, (1,))
        rest = os.path.getsize(state_path) - HEADER_BYTES - (12 if header[4] else 8) * engine.host("m").memory.size
        if header[10] != step or rest < 0:
            raise ValueError(f"{state_path}: its header says step {header[10]}, {header[2]} processes; it has "
                             f"{max(0, -rest)} bytes too few for {engine.num_parameters:,} parameters\n{fit}\n"
                             f"{way_back(folder)}")
        engine.load("m", file)
        engine.load("v", file)
        if header[4]:  # float32 weights, where the model's file may hold bfloat16
            load_weights(engine, file)
        elif model_version(model_path) == 5:
            raise ValueError(f"{model_path} holds weights rounded to bfloat16, and {state_path} no float32 ones: a run "
                             f"cannot go on from them as it was\n---> HINT: -e {model_path} begins another one")
        order = file.read()
    try:
        check_shards(loader, more["shard_tokens"], more.get("shards"))
    except ValueError as error:
        raise ValueError(f"{run_path}: {error}\n---> HINT: resume with the data (-i) that the run began with, others "
                         f"may come after them; or {ANEW}") from error
    if size % loader.T or offset % loader.T:
        fits = next(T for T in range(loader.T, 0, -1) if size % T == offset % T == 0)
        raise ValueError(f"{run_path}: the run's samples have {size:,} tokens, the one where it stopped has "
                         f"{size - offset:,} left: -t {loader.T} does not divide both\n---> HINT: -t {fits} goes on, "
                         "with any -b")
    shard, sample = map(int, header[30:34].view(np.uint64))
    state = {"shard_index": shard, "taken": sample * size + offset, "sample_tokens": size}
    try:
        if bool(header[5]) != bool(order):
            raise ValueError("its header and its size disagree about whether batches are shuffled")
        loader.restore(state | (unpack_order(order, len(loader.files)) if order else {}))
    except ValueError as error:
        if header[2] > 1 and not os.path.exists(run_path):
            fit = ("---> HINT: llm.c shuffles each process's batches in its own way: "
                   f"-e {model_path} begins a new run with its weights")
        raise ValueError(f"{state_path}: {error}\n{fit}\n{way_back(folder)}") from error
    hint = way_back(folder)
    require_sound(run, f"{model_path}, {state_path}", hint)
    run.sampler.state = more.get("coins", int(header[20:22].view(np.uint64)[0]))
    if not run.sampler.state:
        raise ValueError(f"{state_path}: damaged: its sampler's state is 0, from which all coins are 0\n{hint}")
    for window, old in zip(run.outliers.windows, more["windows"]):
        window.extend(old)
    before = {"-e": more.get("model", run.settings["-e"])} | more.get("flags", {})
    run.changed = tuple(name for name, value in run.settings.items() if before.get(name, value) != value)
    run.settings["-e"] = before["-e"]
    if size != loader.B * loader.T:
        run.data += f"on with the next token, in samples of {size:,} as before",
    if order and (added := len(loader.files) - int.from_bytes(order[:8], "little")):
        run.data += f"{added} more shard{'s' * (added > 1)} at the end of this epoch",
    run.step, run.resumed = step, (step, "coins" not in more)
    run.earlier = step, more.get("tokens", step * run.settings["-d"])


def check_sums(folder, sums, *paths):
    """ValueError where a file of the newest checkpoint is not what was written there. sums: {name: checksum}; llm.c's
    checkpoints, and ours of old, have none."""
    for path in paths:
        written = sums.get(os.path.basename(path))
        if written is not None and (found := sum_of(path)) != written:
            raise ValueError(f"{path}: damaged, or changed since it was written: its checksum is {found:08x}, it was "
                             f"{written & 0xFFFFFFFF:08x}\n{way_back(folder)}")


def load_weights(engine, file):
    """Replace the parameters by the float32 ones that come next in a state file: all, or this process's pieces."""
    if not engine.processes.zero_stage:
        engine.load("params", file)
        return
    for tensor, pieces in pieces_of(engine):
        for piece in pieces:
            file.readinto(piece.view(np.uint8))
        engine.processes.gather(tensor)
    engine.processes.wait()


def model_version(path):
    with open(path, "rb") as file:
        return read_header(file, path, MODEL_MAGIC, (3, 5))[1]


def require_sound(run, where, hint):
    """ValueError where a weight or a moment is not a finite number"""
    for what in ("params", "m", "v"):
        memory = run.engine.host(what).memory
        if memory.size and not math.isfinite(float(memory.min()) - float(memory.max())):
            raise ValueError(f"{where}: not all of {what} are finite numbers: training has diverged\n{hint}")


def read_run_json(path, loader):
    """All that a run_*.json holds; without the file, no windows, and data as they are now"""
    if not os.path.exists(path):  # a checkpoint of llm.c has none
        return {"tokens_per_batch": loader.B * loader.T, "shard_tokens": loader.shard_tokens, "windows": []}
    hint = "remove it to go on without what it holds: the last 128 losses and gradient norms"
    run = read_json(path, RUN, hint)
    with reading(path, hint):  # halves of surrogate pairs name no file
        os.fsencode(run.get("model", "") + run.get("flags", {}).get("-e", ""))
    if not 0 < run.get("coins", 1) < 1 << 64:
        raise ValueError(f"{path}: coins is {shown(run['coins'], 60)}, which is no state of the sampler\n"
                         f"---> HINT: {hint}")
    if not 0 <= run.get("offset", 0) < run["tokens_per_batch"]:
        raise ValueError(f"{path}: a place {run.get('offset', 0)} tokens into a sample of {run['tokens_per_batch']} "
                         f"makes no sense\n---> HINT: {hint}")
    run["windows"] = [[float(value) for value in window] for window in run["windows"]]
    largest = max((abs(value) for window in run["windows"] for value in window), default=0)
    if largest > 1e30:  # whose square is no number any more, when a loss is compared with them
        raise ValueError(f"{path}: a loss or a norm of {largest:.0e} makes no sense\n---> HINT: {hint}")
    return {"zero_stage": 0} | run


def save(flags, run):
    """Write a checkpoint; when it is complete, remove those that are too old. Returns the seconds that it took.
    ValueError, and nothing is written or removed, where the weights are no numbers any more."""
    start = time.perf_counter()
    require_sound(run, f"step {run.step}", "---> HINT: use a smaller learning rate (-l), or --grad_clip 1; no "
                  "checkpoint is written, those before are as they were")
    first = run.engine.processes.rank == 0
    if first:
        # the checkpoint's lines, before it; a log that cannot be written does not keep us from it
        with contextlib.suppress(OSError), open(os.path.join(flags.output_dir, "main.log"), "rb") as log:
            os.fsync(log.fileno())
    write_run_checkpoint(flags.output_dir, run, flags.master_weights)
    if first:
        remove_old_checkpoints(flags.output_dir, flags.checkpoints_keep, flags.major_checkpoint_every)
    return time.perf_counter() - start


def remove_old_checkpoints(folder, keep, major_every):
    """Remove what is older than the newest `keep` complete checkpoints (0 = nothing), but for multiples of major_every.
    Incomplete ones too: they are what a run left that was killed while it removed them."""
    complete = complete_checkpoints(folder)
    if not keep or not complete:
        return
    names = r"(?:DONE|model|state|run)_(\d{8})(?:_\d{5})?(?:\.bin|\.json)?"
    matches = (re.fullmatch(names, name) for name in os.listdir(folder))
    steps = {int(match[1]) for match in matches if match}
    minor = [step for step in complete if not major_every or step % major_every]
    for step in steps - set(minor[-keep:]) - (set(complete) - set(minor)):
        if step < complete[-1]:
            remove_checkpoint(folder, step)


def remove_checkpoint(folder, step):
    """Remove what there is of a checkpoint: DONE first, the states of all processes last"""
    states = sorted(name for name in os.listdir(folder) if re.fullmatch(rf"state_{step:08d}_\d{{5}}\.bin", name))
    for path in checkpoint_files(folder, step) + [os.path.join(folder, name) for name in states]:
        if os.path.exists(path):
            os.unlink(path)
            sync_folder(folder)
