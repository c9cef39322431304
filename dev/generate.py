"""
Lets a model write: text appears as it is drawn, token by token.

    python -m dev.generate                                                 GPT-2 124M, beginning with anything
    python -m dev.generate --prompt "The meaning of life is" --samples 3 --top_k 40
    python -m dev.generate -e out/model_00005000.bin --temperature 0.8     a checkpoint of a run
    python -m dev.generate --device cuda --samples 100                     on an NVIDIA GPU
    head -c 2000 story.txt | python -m dev.generate --prompt -             goes on with standard input

Runs in the project's folder. The texts go to standard output, everything else to standard error.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import contextlib
import sys
import time
from collections import Counter

from dev.run.arguments import Defaults, Parser
from dev.run.console import lose, program, say
from dev.run.flags import add_device
from dev.run.found import model_file
from dev.run.text import Sampler, generate
from dev.run.vocabulary import tokenizer_of
from train_gpt2 import build


def parse_flags(argv):
    parser = Parser(prog="python -m dev.generate", description=__doc__.strip().splitlines()[0],
                    formatter_class=Defaults)
    flag = parser.add_argument
    flag("-e", "--model", default="data/gpt2_124M.bin",
         help="a checkpoint, a folder of a run or of Hugging Face's, or a descriptor: d6, d12, gpt2:l4c256h4 …")
    add_device(parser)
    flag("-p", "--prompt", default="", help="how the text begins; - reads it from standard input")
    flag("-n", "--tokens", type=int, default=256, help="tokens of a sample, at most")
    flag("--samples", type=int, default=1, help="how many texts are written")
    flag("--temperature", type=float, default=1.0, help="below 1 likely tokens become likelier, 0 = the likeliest only")
    flag("--top_k", type=int, default=0, help="draw from the k most likely tokens, 0 = all")
    flag("--top_p", type=float, default=0.0, help="of the likeliest that have this probability together, 0 = all")
    flag("--seed", type=int, default=1337, help="of the sampler")
    flag("--past_end", action="store_true", help="go on with another text where the model ends one")
    flags = parser.parse_args(argv)
    if flags.tokens < 1 or flags.samples < 1:
        parser.error("--tokens and --samples must be at least 1")
    return flags


def write_sample(tokenizer, tokens, end):
    """Print tokens as they come, up to the end-of-text token (None: to the last)."""
    tokenizer.reset()
    for token in tokens:
        if token == end:
            break
        print(tokenizer.decode(token), end="", flush=True)
    print(tokenizer.decoder.decode(b"", True), flush=True)  # a character that was left incomplete


def counted(tokens, counter):
    """The tokens, which counter["tokens"] counts as they come"""
    for token in tokens:
        counter["tokens"] += 1
        yield token


def run(flags):
    sampler = Sampler(flags.seed, flags.temperature, flags.top_k, flags.top_p)
    flags.model = model_file(flags.model)
    engine = build(flags.model, flags.device, flags.precision)
    config, tokenizer = engine.config, tokenizer_of(flags.model, engine.config.vocab_size)
    if tokenizer.tokens is None:
        say(f"texts are printed as token numbers: {tokenizer.problem}", file=sys.stderr)
    text = sys.stdin.read().rstrip("\n") if flags.prompt == "-" else flags.prompt
    end = min(tokenizer.eot_token, config.vocab_size - 1)
    prompt = tokenizer.encode(text) if text else [end]  # a text begins after the end of another
    with contextlib.redirect_stdout(sys.stderr):
        memory = engine.prepare(1, config.max_seq_len, train=False)
        print(f"{flags.model}: {engine.num_parameters:,} parameters, {sum(memory.values()) / 2**20:,.0f} MiB of memory")

    start, counter = time.perf_counter(), Counter()
    try:
        for sample in range(flags.samples):
            print("---\n" if sample else "", text, sep="", end="", flush=True)
            tokens = counted(generate(engine, sampler, prompt, flags.tokens), counter)
            write_sample(tokenizer, tokens, None if flags.past_end else end)
    except BrokenPipeError:  # as in `| head`: nobody wants the rest
        lose(sys.stdout)
    finally:
        seconds, count = time.perf_counter() - start, counter["tokens"]
        say(f"\n{count} tokens in {seconds:.1f} s: {count / seconds:.1f} tok/s", file=sys.stderr)


def main(argv=None):
    """The command line: see --help. Returns the exit status."""
    return program(lambda: run(parse_flags(argv)))


if __name__ == "__main__":
    sys.exit(main())
