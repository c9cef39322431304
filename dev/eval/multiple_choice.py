"""
The command line of hellaswag.py and mmlu.py: the accuracy of a checkpoint on a multiple-choice evaluation set.

train_gpt2.py reports the same during training (-h 1).
"""

import os

from dev.data.command_line import Progress, say
from dev.run.arguments import Parser
from dev.run.flags import add_device
from dev.run.multiple_choice import TOGETHER, accuracy, read_examples, score
from train_gpt2 import build


def main(name, path):
    """name: of the set and, in lower case, of the script in dev/data that writes it; path: where that puts it"""
    parser = Parser(description=f"The accuracy of a checkpoint on {name}")
    parser.add_argument("-e", "--model", default="data/gpt2_124M.bin",
                        help="a checkpoint, or a run's folder (default: %(default)s)")
    add_device(parser)
    parser.add_argument("-i", "--input", default=path, help="the evaluation set (default: %(default)s)")
    parser.add_argument("-n", "--limit", type=int, default=0, help="score the first so many examples (default: all)")
    args = parser.parse_args()
    hint = f"---> HINT: python dev/data/{name.lower()}.py writes it"
    if not os.path.isfile(args.input):
        raise FileNotFoundError(f"no evaluation set {args.input}\n{hint}")
    if args.limit < 0:
        raise ValueError(f"--limit must be 1 or more, or 0 for all, not {args.limit}")
    engine = build(args.model, args.device, args.precision)
    examples = read_examples(args.input, engine.config.vocab_size)[:args.limit or None]
    maxT, count, progress = engine.config.max_seq_len, len(examples), Progress(name)
    if cut := sum(len(context) + max(map(len, completions)) > maxT + 1 for context, completions, _ in examples):
        print(f"{cut} examples have more than {maxT} tokens: the model does not see the beginning of their context")
    most = max(len(completions) for _, completions, _ in examples)
    engine.prepare(min(most, TOGETHER), maxT, train=False)
    correct, count = score(engine, examples, lambda done: progress.update(done, "examples", done / count))
    share, error = accuracy(correct, count)
    say(f"{name}: {correct}/{count} = {share:.6f} | standard error {error:.6f}")
