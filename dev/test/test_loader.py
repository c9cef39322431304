"""The order of batches against formulas.py's; shards of any size; shards that are damaged."""
import copy
import errno
import os
import re
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from formulas import Order

from dev.run.checkpoints import pack_order, unpack_order
from dev.run.data import largest_batches
from dev.run.shard import is_order, shuffle
from train_gpt2 import DataLoader

SHAKESPEARE = [408, 791, 914, 1057, 81, 450, 299, 907, 582, 321, 670, 134]  # FACTS of llm.c's order at B=4, T=64


# ---------------------------------------------------------------------------------------------------------------------
# what is expected

def shuffled(shard_tokens, batch_tokens, count):
    """The first `count` (shard, sample) that a loader visits"""
    order = Order([max(0, size - 1) // batch_tokens for size in shard_tokens])
    return [order.draw() for _ in range(count)]


def check(loader, shards, order):
    """The loader's next batches are those of (shard, sample) in order. shards: their tokens"""
    B, T = loader.B, loader.T
    for shard, sample in order:
        inputs, targets = loader.next_batch()
        expected = shards[shard][sample * B * T:(sample + 1) * B * T + 1]
        assert inputs.shape == targets.shape == (B, T) and inputs.dtype == targets.dtype == np.int32
        assert (inputs.ravel() == expected[:-1]).all() and (targets.ravel() == expected[1:]).all(), (shard, sample)


@pytest.fixture
def write_shards(make_shard, tmp_path):
    """write_shards(sizes): shards of so many random tokens; returns the glob pattern and the tokens"""
    def write_shards(*sizes):
        rng = np.random.default_rng(1)
        shards = [rng.integers(0, 50257, size) for size in sizes]
        for i, tokens in enumerate(shards):
            make_shard(tmp_path / f"text_train_{i:06d}.bin", tokens)
        return str(tmp_path / "text_train_*.bin"), shards
    return write_shards


# ---------------------------------------------------------------------------------------------------------------------
# the order

def test_order_of_tiny_shakespeare(write_shards):
    pattern, shards = write_shards(305_260)
    order = shuffled([305_260], 256, 2 * 1192 + 5)  # into the third epoch
    assert [sample for _, sample in order[:12]] == SHAKESPEARE
    assert sorted(order[:1192]) == sorted(order[1192:2384]) == [(0, sample) for sample in range(1192)]
    check(DataLoader(pattern, 4, 64, should_shuffle=True), shards, order)


@pytest.mark.parametrize("sizes", [(500, 500, 500), (500, 33, 1000, 257, 32, 0, 700, 64, 65)])  # 33 make one batch
def test_order_of_several_shards(write_shards, sizes):
    pattern, shards = write_shards(*sizes)
    epoch = sum(max(0, size - 1) // 32 for size in sizes)
    order = shuffled(sizes, 32, 3 * epoch + 2)
    assert len(set(order[:epoch])) == epoch and order[:epoch] != order[epoch:2 * epoch]
    check(DataLoader(pattern, 2, 16, should_shuffle=True), shards, order)


def test_validation_is_never_shuffled(write_shards):
    pattern, shards = write_shards(300, 10, 200)
    order = [(0, sample) for sample in range(9)] + [(2, sample) for sample in range(6)]
    loader = DataLoader(pattern, 2, 16)
    check(loader, shards, 2 * order + order[:4])
    loader.reset()
    check(loader, shards, order)


@pytest.mark.parametrize("folder", ["[2024] texts", "a[b", "[!x]", "x?*"])
@pytest.mark.parametrize("name", ["s_train_*.bin", "s_train_000000.bin", "s_train_??????.bin"])
def test_folders_that_exist_are_taken_literally(make_shard, tmp_path, folder, name):
    (tmp_path / folder).mkdir()
    path = make_shard(tmp_path / folder / "s_train_000000.bin", range(100))
    assert DataLoader(str(tmp_path / folder / name), 2, 16).files == [path]


def test_files_that_exist_are_taken_literally(make_shard, tmp_path, monkeypatch):
    make_shard(tmp_path / "a.bin", range(50))
    make_shard(tmp_path / "[a].bin", range(100))
    monkeypatch.chdir(tmp_path)
    assert DataLoader("[a].bin", 2, 16).num_tokens == 100 and DataLoader("[ab].bin", 2, 16).num_tokens == 50
    (tmp_path / "folder").mkdir()
    make_shard(tmp_path / "folder" / "b.bin", range(70))
    assert DataLoader(str(tmp_path / "*" / "[b].bin"), 2, 16).num_tokens == 70  # a pattern of folders, as ever


def test_number_of_tokens(write_shards):
    pattern, _ = write_shards(300, 10, 200)
    assert DataLoader(pattern, 2, 16).num_tokens == 510


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 21, 22, 30, 53, 54, 200])
def test_it_goes_on_where_another_was(write_shards, shuffle, batches):
    pattern, _ = write_shards(700, 40, 333)
    first, second = (DataLoader(pattern, 2, 16, should_shuffle=shuffle) for _ in range(2))
    for _ in range(batches):
        first.next_batch()
    second.next_batch()
    state = copy.deepcopy(first.state())
    second.restore(state)
    for step in range(70):
        assert (np.stack(second.next_batch()) == np.stack(first.next_batch())).all(), step


def stream(loader, tokens):
    """At least so many tokens that come next, inputs and targets (2, n)"""
    batches = [np.stack(loader.next_batch()) for _ in range(-(-tokens // (loader.B * loader.T)))]
    return np.concatenate([batch.reshape(2, -1) for batch in batches], axis=1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 21, 22, 53, 54, 75, 200])
@pytest.mark.parametrize("others", [[(1, 16)], [(5, 16)], [(4, 16)], [(1, 32)], [(7, 2)], [(33, 16)], [(1, 1)],
                                    [(3, 16), (2, 16)], [(3, 8), (1, 8), (5, 4), (1, 4)], [(5, 8), (2, 4), (4, 16)]])
def test_batches_of_another_size_go_on_at_the_next_token(write_shards, shuffle, batches, others):
    pattern, _ = write_shards(700, 40, 333)
    loader, whole = (DataLoader(pattern, 2, 16, should_shuffle=shuffle) for _ in range(2))
    for _ in range(batches):
        loader.next_batch()
        whole.next_batch()
    found = []
    for B, T in others:
        state = copy.deepcopy(loader.state())
        loader = DataLoader(pattern, B, T, should_shuffle=shuffle)
        loader.next_batch()
        loader.restore(state)
        found.append(stream(loader, 1500 if (B, T) == others[-1] else B * T))
        assert found[-1].size and loader.next_batch(read=False) is None
        found.append(np.full((2, B * T), -1))  # passed over
    found = np.concatenate(found, axis=1)
    expected = stream(whole, found.shape[1])[:, :found.shape[1]]
    assert (found == np.where(found < 0, -1, expected)).all() and (found >= 0).sum() >= 2 * 1500


@pytest.mark.parametrize("B, T", [(1, 3), (2, 64), (1, 24)])
def test_no_sequence_has_parts_of_two_samples(write_shards, B, T):
    pattern, _ = write_shards(700)
    loader = DataLoader(pattern, 2, 16, should_shuffle=True)
    with pytest.raises(ValueError, match="place in it, is not one of this data"):
        DataLoader(pattern, B, T, should_shuffle=True).restore(loader.state())


@pytest.mark.parametrize("at", [0, 20, 31])
def test_a_damaged_batch_of_several_samples_is_passed_over(make_shard, tmp_path, at):
    tokens = np.arange(200) % 50
    path = make_shard(tmp_path / "shard.bin", tokens)
    state = DataLoader(path, 1, 8).state()
    tokens[48 + at] = 50
    loader = DataLoader(make_shard(tmp_path / "shard.bin", tokens), 3, 8, vocab_size=50)
    loader.restore(state)
    loader.restore(state | {"taken": 48 if at < 24 else 72})
    with pytest.raises(ValueError, match=f"token 50 at position {48 + at} "):
        loader.next_batch()
    start = 72 if at < 24 else 96
    assert loader.next_batch()[0].ravel().tolist() == tokens[start:start + 24].tolist()


@pytest.mark.parametrize("batches", [1, 20, 33, 40, 74, 130])
@pytest.mark.parametrize("B", [2, 1, 3])
def test_more_shards_come_at_the_end_of_the_epoch(write_shards, batches, B):
    pattern, _ = write_shards(700, 40, 333)
    loader, order = DataLoader(pattern, 2, 16, should_shuffle=True), Order([21, 1, 10])
    for _ in range(batches):
        loader.next_batch()
        order.draw()
    state = loader.state()
    pattern, shards = write_shards(700, 40, 333, 100, 500)
    order.samples, order.shards = [21, 1, 10, 3, 15], [*order.shards, 3, 4]
    later = DataLoader(pattern, B, 16, should_shuffle=True)
    later.restore(state | unpack_order(b"".join(map(bytes, pack_order(state))), 5))
    expected = [shards[shard][32 * sample + i:32 * sample + 32 + i]
                for shard, sample in [order.draw() for _ in range(150)] for i in (0, 1)]
    found = stream(later, 140 * 32)
    for i in 0, 1:
        assert (np.concatenate(expected[i::2])[:found.shape[1]] == found[i]).all()


@pytest.mark.parametrize("change", [
    {"shard_index": 3}, {"shard_index": -1}, {"shard_order": [0, 1, 1]}, {"shard_order": [0, 1]},
    {"sample_order": [0]}, {"sample_order": list(range(1, 22))},
])
def test_states_of_other_data(write_shards, change):
    loader = DataLoader(write_shards(700, 40, 333)[0], 2, 16, should_shuffle=True)
    with pytest.raises(ValueError, match="not one of this data"):
        loader.restore(loader.state() | change)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_state_of_another_order(write_shards, shuffle):
    pattern, _ = write_shards(700, 40, 333)
    state = DataLoader(pattern, 2, 16, should_shuffle=shuffle).state()
    with pytest.raises(ValueError, match="not one of this data"):
        DataLoader(pattern, 2, 16, should_shuffle=not shuffle).restore(state)


def test_shard_of_more_than_2_GiB(make_shard, tmp_path):
    size, path, marks = (1 << 30) + 100_000, tmp_path / "large.bin", np.arange(10_000, dtype=np.uint16)
    make_shard(path, [], count=size)
    try:
        with open(path, "r+b") as file:  # a sparse file: it takes no room
            file.seek(1024 + 2 * (size - len(marks)))
            file.write(marks.tobytes())
    except OSError as error:
        pytest.skip(f"this file system has no sparse files: {error}")
    B, T = 4, 1000
    loader, last = DataLoader(str(path), B, T), (size - 1) // (B * T) - 1
    loader.restore(loader.state() | {"taken": last * B * T})
    inputs, targets = loader.next_batch()
    start = last * B * T - (size - len(marks))
    assert (inputs.ravel() == marks[start:start + B * T]).all()
    assert (targets.ravel() == marks[start + 1:start + B * T + 1]).all()


def test_small_batches_of_a_large_shard(make_shard, tmp_path):
    """Four million samples: their order takes four bytes each, and little more while it is made or restored."""
    count = 1 << 22
    path = make_shard(tmp_path / "large.bin", [], count=16 * count + 1)
    try:
        os.truncate(path, 1024 + 2 * (16 * count + 1))  # a sparse file
    except OSError as error:
        pytest.skip(f"this file system has no sparse files: {error}")
    tracemalloc.start()
    try:
        loader = DataLoader(path, 1, 16, should_shuffle=True)
        loader.next_batch()
        state = loader.state()
        loader.restore(state)
        assert tracemalloc.get_traced_memory()[1] < 6 * count
    finally:
        tracemalloc.stop()
    assert len(state["sample_order"]) == count and is_order(state["sample_order"], count)


@pytest.mark.parametrize("numbers, is_one", [
    ([2, 0, 1], True), ([2, 0, 0], False), ([0, 1], False), ([0, 1, 2, 2], False), ([-1, 0, 1], False),
    ([1, 2, 3], False), ([], False)])
def test_orders_of_three(numbers, is_one):
    assert is_order(np.array(numbers, np.int32), 3) is is_one and is_order(np.empty(0, np.int32), 0)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize("damage, message", [
    ({"magic": 20240326}, "magic"), ({"version": 2}, "version 2"), ({"count": 101}, "truncated"),
    ({"count": 99}, "too long"), ({"count": -1}, "too long"),
])
@pytest.mark.parametrize("neighbours", [0, 2])
def test_damaged_shards(make_shard, tmp_path, damage, message, neighbours):
    for i in range(neighbours):
        make_shard(tmp_path / f"{i}.bin", range(100))
    make_shard(tmp_path / "damaged.bin", range(100), **damage)
    with pytest.raises(ValueError, match=f"(?s)damaged.bin.*{message}"):
        DataLoader(str(tmp_path / "*.bin"), 2, 8)


@pytest.mark.parametrize("content", [b"", b"a text", bytes(1023)])
def test_files_that_are_no_shards(tmp_path, content):
    (tmp_path / "text.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.bin"):
        DataLoader(str(tmp_path / "text.bin"), 2, 8)


def test_no_match(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing_\*\.bin(?s:.)*HINT"):
        DataLoader(str(tmp_path / "missing_*.bin"), 2, 8)


@pytest.mark.parametrize("sizes", [(16,), (0, 16, 3)])
def test_too_few_tokens(write_shards, sizes):
    pattern, _ = write_shards(*sizes)
    with pytest.raises(ValueError, match="17 tokens"):
        DataLoader(pattern, 2, 8)


@pytest.mark.parametrize("B, T", [(0, 8), (2, 0), (-1, 8), (2, -8)])
def test_batches_of_nothing(write_shards, B, T):
    with pytest.raises(ValueError):
        DataLoader(write_shards(100)[0], B, T)


def test_tokens_outside_the_vocabulary(make_shard, tmp_path):
    tokens = np.arange(100) % 50
    tokens[70] = 50
    loader = DataLoader(make_shard(tmp_path / "shard.bin", tokens), 2, 8, vocab_size=50)
    for _ in range(4):
        loader.next_batch()
    with pytest.raises(ValueError, match=r"shard\.bin: token 50 at position 70 "):
        loader.next_batch()


def test_a_target_outside_the_vocabulary(make_shard, tmp_path):
    tokens = np.arange(17)
    with pytest.raises(ValueError, match="token 16 at position 16"):
        DataLoader(make_shard(tmp_path / "shard.bin", tokens), 2, 8, vocab_size=16).next_batch()


def test_another_process_s_batch_is_not_read(make_shard, tmp_path):
    tokens = np.arange(100) % 50
    tokens[5] = 50
    loader = DataLoader(make_shard(tmp_path / "shard.bin", tokens), 2, 8, vocab_size=50)
    assert loader.next_batch(read=False) is None
    assert loader.next_batch()[0].ravel().tolist() == tokens[16:32].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# shards that change while they are read

def test_a_shard_that_is_cut_short(write_shards, tmp_path):
    """A memory map would end the program."""
    pattern, shards = write_shards(700)
    loader = DataLoader(pattern, 2, 16)
    check(loader, shards, [(0, 0), (0, 1)])
    with open(tmp_path / "text_train_000000.bin", "r+b") as file:
        file.truncate(1024 + 2 * 100)
    with pytest.raises(ValueError, match=r"text_train_000000\.bin: truncated: it has 1,224 bytes"):
        loader.next_batch()


@pytest.mark.parametrize("magic, count, message", [(123, 700, "magic number is 123"), (20240520, 690, "too long")])
def test_a_shard_that_is_replaced_by_others_bytes(write_shards, make_shard, tmp_path, magic, count, message):
    """of the same size: in the same file, and under its name when it is opened in the next epoch"""
    pattern, shards = write_shards(700)
    path = tmp_path / "text_train_000000.bin"
    loader, sound = DataLoader(pattern, 2, 16), path.read_bytes()
    check(loader, shards, [(0, 0)])
    make_shard(path, np.zeros(700), magic=magic, count=count)  # written over
    with pytest.raises(ValueError, match=message):
        loader.next_batch()
    path.write_bytes(sound)
    loader.reset()
    make_shard(tmp_path / "other", np.zeros(700), magic=magic, count=count)
    (tmp_path / "other").replace(path)
    check(loader, shards, [(0, sample) for sample in range(21)])  # the open file is the old one
    with pytest.raises(ValueError, match=message):
        loader.next_batch()


def test_a_disk_that_fails(write_shards, monkeypatch):
    loader = DataLoader(write_shards(700)[0], 2, 16)
    loader.next_batch()

    class Failing:
        def __getattr__(self, name):
            return getattr(file, name)

        def read(self, size):
            raise OSError(errno.EIO, "Input/output error")
    file = loader.shard.file
    monkeypatch.setattr(loader.shard, "file", Failing())
    with pytest.raises(ValueError, match=r"bin: tokens 32 to 65 cannot be read: Input/output error"):
        loader.next_batch()


@pytest.mark.parametrize("change", [
    {"taken": 22 * 32}, {"taken": 21 * 32 + 16}, {"taken": 2**63 * 32}, {"taken": -32}, {"taken": 8},
    {"sample_tokens": 0}, {"sample_tokens": -32}, {"sample_tokens": 24}, {"sample_tokens": 800, "sample_order": [],
                                                                         "taken": 0}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_places_that_are_none(write_shards, change, shuffle):
    """21 samples of 32 tokens, sequences of 16"""
    loader = DataLoader(write_shards(700)[0], 2, 16, should_shuffle=shuffle)
    loader.restore(loader.state() | {"taken": 21 * 32})
    before = loader.state()
    with pytest.raises(ValueError, match="place in it, is not one of this data"):
        loader.restore(before | change)
    assert loader.state()["taken"] == 21 * 32 and loader.sample_tokens == 32


@pytest.mark.parametrize("size", [0, 1, 2, 3, 64, 65, 1000, 300_000])
def test_large_shards_are_shuffled_in_the_same_order(size):
    """One swap after another"""
    expected, numbers = list(range(size)), np.random.RandomState(42).randint(0, 2**32, max(0, size - 1), np.uint32)
    for i, number in zip(range(size - 1, 0, -1), numbers.tolist()):
        j = number % (i + 1)
        expected[i], expected[j] = expected[j], expected[i]
    assert shuffle(np.arange(size, dtype=np.int32), np.random.RandomState(42)).tolist() == expected


def test_what_is_held_out_serves_every_batch_in_the_readme(make_shard, tmp_path):
    """5 % of a short text, README's own, has fewer tokens than the batches in README's table: smaller ones are made."""
    readme = (ROOT / "README.md").read_text()
    sizes = {tuple(map(int, size)) for size in re.findall(r"-b (\d+) -t (\d+)", readme)}
    held_out = len(readme) // 20
    shard = make_shard(tmp_path / "val.bin", range(held_out))
    assert len(sizes) >= 3 and any(B * T >= held_out for B, T in sizes)
    for B, T in sizes:
        loader = largest_batches(DataLoader, shard, B, T, held_out)
        inputs, targets = loader.next_batch()
        assert inputs.shape == targets.shape == (min(B, (held_out - 1) // T), T)
