"""
Which batches there are for validation: none, or as large ones as its text has.
"""
from types import SimpleNamespace

NO_DATA = SimpleNamespace(num_tokens=0, num_batches=0)  # without validation no -j is needed


def largest_batches(loader, pattern, B, T, vocab_size):
    """A loader(pattern, B, T), or one with fewer sequences in a batch where there are not so many tokens: a text of
    which a part is held out for validation has few there. ValueError where there is not one sequence"""
    fit = (max(loader(pattern, 1, T, vocab_size=vocab_size).shard_tokens) - 1) // T
    return loader(pattern, min(B, fit), T, vocab_size=vocab_size)
