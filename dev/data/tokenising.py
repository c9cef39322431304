"""
Documents in, end-of-text + tokens through, shards out.

A dataset is a stream of pieces: (split, whether a document begins here, text). Pieces are gathered into batches,
worker processes tokenise them, and the ids are written in the order of the batches. What a batch is depends on the
text alone, so the bytes of the shards do not depend on the number of workers; only a few batches are in memory.
"""

import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np

from dev.data.command_line import Progress, say, show
from dev.data.vocabulary import get_encoder, header_word, replace_surrogates, write_tokenizer
from dev.run.console import shown
from dev.run.files import NewFile
from dev.run.reading import is_a, read_json

STATE = {"job": object, "complete": bool, "done": {str: [int, int, int]},
         "dealt?": {str: ([int, int, (str, None)], None)}}  # what a progress.json says
PIECE = 1 << 16  # characters; a longer document is cut
BATCH = 1 << 19  # characters; about 0.06 s of work, a hundred times what handing it to a worker costs


def pieces(blocks):
    """
    Cut a document, given as any number of blocks of text, into (is it the first?, piece) of at most PIECE characters.
    The cut is before the last white space of a run, which is always a border between tokens: GPT-2 never merges a
    word with the one before it. (Where there is no space in half a piece, it is anywhere.)
    """
    first, rest = True, ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > PIECE:
            end = start + PIECE - 1
            borders = (i for i in range(end, end - PIECE // 2, -1) if rest[i] in " \n\t" and not rest[i + 1].isspace())
            cut = next(borders, end)
            yield first, rest[start:cut]
            first, start = False, cut
        rest = rest[start:]
    yield first, rest


def cpu_count():
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class HoldOut:
    """
    Deals the tokens of one batch after another to "train" and "val", so that `fraction` of all tokens is in val after
    every batch, and after the last. A document goes to val as a whole where val has too little at its start; at the
    end of a batch val gets or gives as many tokens as it lacks or has too many. What does not go on where its split
    left off begins with an end-of-text token.

    state: [tokens in train, tokens in val, the split of the last token], all that the next batch depends on.
    """

    def __init__(self, fraction, eot):
        self.fraction, self.eot, self.state = fraction, eot, [0, 0, None]

    def __call__(self, tokens):
        """{split: tokens}; tokens: uint16, those of a batch"""
        held, parts = self.choose(tokens), {"train": [], "val": []}
        borders = np.flatnonzero(np.diff(held)) + 1
        for part, split in ((p, "val" if h[0] else "train")
                            for p, h in zip(np.split(tokens, borders), np.split(held, borders), strict=True) if len(p)):
            if part[0] != self.eot and split != self.state[2]:
                parts[split].append(np.array([self.eot], np.uint16))
            parts[split].append(part)
            self.state = [*self.state[:2], split]
        parts = {split: np.concatenate([np.empty(0, np.uint16), *arrays]) for split, arrays in parts.items()}
        self.state = [self.state[0] + len(parts["train"]), self.state[1] + len(parts["val"]), self.state[2]]
        return parts

    def choose(self, tokens):
        """Which tokens are held out: bool, one for each"""
        train, val, _ = self.state
        held = np.zeros(len(tokens), bool)
        begins = [0, *(np.flatnonzero(tokens[1:] == self.eot) + 1).tolist(), len(tokens)]
        count, before = 0, train + val
        for begin, end in itertools.pairwise(begins):
            if val + count < self.fraction * (before + begin):
                held[begin:end] = True
                count += end - begin
        wanted = round(self.fraction * (before + len(tokens))) - val
        if self.fraction and not before and len(tokens) > 3:  # of a few words, two tokens are better than none
            wanted = max(2, wanted)
        surplus = count - min(max(0, wanted), len(tokens))
        if surplus > 0:
            held[np.flatnonzero(held)[-surplus:]] = False
        elif surplus < 0:
            held[np.flatnonzero(~held)[surplus:]] = True
        return held


def tokenize(stream, writers, job=None, tokenizer="gpt2", workers=None, fraction=lambda: None, max_shards=None,
             deal=None):
    """
    Tokenise a stream of pieces into {split: ShardWriter}.

    job: what decides the result (flags, input files), in JSON's terms. A run that was interrupted, or that stopped at
    max_shards, is gone on with by the next one with the same job; another job starts afresh and replaces the shards.
    Without a job nothing is remembered. fraction() tells how much of the input has been read, where that is known.
    deal: a HoldOut, which decides what goes into which split; the stream's pieces have none then.
    """
    folder, name = next((w.folder, w.name) for w in writers.values())
    job = job and json.loads(json.dumps([job, tokenizer, PIECE, BATCH, sorted(writers)]))
    state_path = folder / f"{name}.progress.json"
    state = _load_state(state_path, job, writers)
    dealt = state.setdefault("dealt", {split: deal and deal.state for split in writers})  # before the batch in `done`
    if deal and None in dealt.values():
        raise ValueError(f"{show(state_path)} does not say what is held out\n---> HINT: delete it to begin anew")
    done = state["done"]  # {split: [complete shards, batches before the next token, its place in that batch]}
    full = max_shards is not None and all(d[0] >= max_shards for d in done.values())
    if state["complete"] or full:
        say(f"{show(folder)} has all of it already; to make it anew, delete {show(state_path)}")
        for writer in writers.values():
            writer.shards = len(writer.complete())
        return
    for writer in writers.values():
        writer.remove_leftovers()
    if any(d[0] for d in done.values()):
        say(f"going on after {sum(d[0] for d in done.values())} complete shards")
    else:
        state_path.unlink(missing_ok=True)
        for writer in writers.values():
            writer.remove_shards()

    get_encoder(tokenizer)  # fetched once, before the workers look for it
    for writer in writers.values():
        writer.vocabulary = header_word(tokenizer)
    start, total, progress = time.monotonic(), 0, Progress("tokenising")
    behind = min(done, key=lambda split: done[split][1])
    if deal:
        deal.state = dealt[behind]
    batches = (b for b in _batches(stream) if b[1] >= done[behind if deal else b[0]][1])
    try:
        for source, number, batch in _in_order(batches, tokenizer, workers or cpu_count()):
            before = deal and deal.state
            for split, tokens in (deal(batch) if deal else {source: batch}).items():
                writer = writers[split]
                skip = done[split][2] if number == done[split][1] else len(tokens) * (number < done[split][1])
                total += len(tokens) - skip
                for used in writer.write(tokens[skip:]):
                    done[split], dealt[split] = [writer.shards, number, skip + used], before
                    if job:
                        _save_state(state_path, state)
                    full = writer.shards == max_shards
                    if full:
                        break
            if full:
                break
            progress.update(total / 1e6, "M tokens", fraction())
        if not full:
            for writer in writers.values():
                writer.finish()
            state["complete"] = True
            anything = any(writer.shards for writer in writers.values())  # nothing is not worth remembering
            if anything and tokenizer == "bytes":
                write_tokenizer(folder.parent, tokenizer)
            if anything and job:
                _save_state(state_path, state)
    finally:
        progress.clear()
        for writer in writers.values():
            writer.discard()
    seconds = time.monotonic() - start
    say(f"{total:,} tokens in {seconds:.1f} s ({total / seconds / 1e6:.2f} M tokens/s)")


def _load_state(path, job, writers):
    """What an earlier run with this job has done, if its shards are still there."""
    fresh = {"job": job, "complete": False, "done": {split: [0, 0, 0] for split in writers}}
    if job is None or not path.exists():
        return fresh
    state = read_json(path, STATE, f"delete {shown(path)} to make the shards anew")
    done = state["done"]
    if state["job"] != job or done.keys() != writers.keys() or state.get("dealt", done).keys() != writers.keys():
        return fresh
    counts = [n for d in (*done.values(), *filter(None, state.get("dealt", {}).values())) for n in d if is_a(n, int)]
    if min(counts) < 0 or max(counts) > 1 << 48:
        raise ValueError(f"{shown(path)}: a count makes no sense\n---> HINT: delete it to make the shards anew")
    shards = (writer.path(i) for split, writer in writers.items() for i in range(done[split][0]))
    if not all(path.exists() for path in shards):  # one after another, until one is missing: a count may be absurd
        return fresh
    for split, writer in writers.items():
        writer.shards = state["done"][split][0]
    return state


def _save_state(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(path) as f:
        f.write(json.dumps(state).encode())


def _batches(stream):
    """Gather pieces into (split, number, [(a document begins here, text), …])."""
    pending, numbers = {}, collections.Counter()
    for split, begins, text in stream:
        size, batch = pending.get(split, (0, []))
        batch.append((begins, text))
        size += len(text) + 100  # so that there is an end to empty documents, too
        pending[split] = size, batch
        if size >= BATCH:
            yield split, numbers[split], batch
            numbers[split] += 1
            del pending[split]
    for split, (_, batch) in pending.items():
        yield split, numbers[split], batch


def _in_order(batches, tokenizer, workers):
    """Tokenise batches in worker processes: (split, number, tokens) in the order in which they came."""
    if workers == 1:
        _start_worker(tokenizer)
        yield from ((split, number, _encode_batch(batch)) for split, number, batch in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, True)
    )
    backlog = collections.deque()  # so many batches are in memory, and no more
    try:
        for split, number, batch in batches:
            backlog.append((split, number, pool.submit(_encode_batch, batch)))
            if len(backlog) > 3 * workers:
                split, number, future = backlog.popleft()
                yield split, number, future.result()
        while backlog:
            split, number, future = backlog.popleft()
            yield split, number, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer, own_process=False):
    global _encoder
    _encoder = get_encoder(tokenizer)
    if own_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_batch(batch):
    """Ids of a batch as uint16, end-of-text before each document."""
    eot = np.array([_encoder.eot_token], dtype=np.uint16)
    parts = []
    for begins, text in batch:
        if begins:
            parts.append(eot)
        parts.append(_encode(text))
    return np.concatenate(parts).astype(np.uint16, copy=False)


def _encode(text):
    if not hasattr(_encoder, "encode_to_numpy"):  # ByteEncoding, tiktoken before 0.8
        return np.asarray(_encoder.encode_ordinary(text), dtype=np.uint16)
    try:
        return _encoder.encode_to_numpy(text, disallowed_special=())  # no Python list of integers: 10 % faster
    except UnicodeEncodeError:
        return _encode(replace_surrogates(text))
