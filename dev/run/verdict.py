"""
What a finished run has come to, in words, and what one may type next.
"""
import importlib.util
import math
import os
import shlex
import shutil
import sys

from dev.run.checkpoints import checkpoint_files
from dev.run.text import Bytes

# Below such a validation loss of a byte or of one of GPT-2's tokens a text drawn from the model looks like this. Bytes
# of English have 5.5 at the start, about 2.5 from the frequencies of pairs; GPT-2's tokens 10.8, and GPT-2 has about 3.
LEVELS = {
    "byte": ((1.3, "it writes whole sentences"), (1.75, "it writes words and half sentences"),
             (2.1, "it spells many words, and knows little of sentences"), (2.7, "it knows which letters go together"),
             (math.inf, "it knows hardly more than which letters are frequent")),
    "token": ((3.8, "it writes whole sentences"), (4.8, "it writes half sentences"),
              (6.5, "it knows words, not yet grammar"),
              (math.inf, "it knows hardly more than which words are frequent")),
}


def verdict(first, last, train_loss, vocab_size):
    """A line about a run from its first and last validation loss; None where there are no two"""
    if not (math.isfinite(first) and math.isfinite(last)):
        return None
    change = f"verdict: val loss {first:.2f} → {last:.2f}"
    if last >= first:
        return f"{change}: it has not learnt; a smaller learning rate (-l) or more text may help"
    levels = LEVELS["byte" if vocab_size == len(Bytes.tokens) else "token"]
    words = next(text for limit, text in levels if last < limit)
    by_heart = "; it begins to know its text by heart: more text is better than more steps" if (
        last > 1.25 * train_loss) else ""
    return f"{change}: {words}{by_heart}"


def python_command():
    """How this Python is called here: `python`, where that is the one, else its path"""
    if shutil.which("python") == sys.executable:
        return "python"
    inside = os.path.abspath(sys.executable).startswith(os.getcwd() + os.sep)
    return os.path.relpath(sys.executable) if inside else sys.executable


def next_commands(flags, step):
    """[(what for, command)]: go on from the last step, write a text, plot the run"""
    python, folder, here = python_command(), flags.output_dir, os.path.dirname(os.path.abspath(__file__))
    script = lambda *names: os.path.relpath(os.path.join(here, "..", "..", *names))
    changed = "-x", "--num_iterations", "-y", "--resume", "--overwrite"
    pairs = [flags.argv[i:i + 2] for i in range(0, len(flags.argv), 2)]  # every flag has a value
    same = [word for pair in pairs if pair[0] not in changed for word in pair]
    commands = [("go on", [python, script("train_gpt2.py"), *same, "-y", "1", "-x", str(2 * max(step, 1))]),
                ("write text", [python, script("dev", "generate.py"), "-e", checkpoint_files(folder, step)[1],
                                "--temperature", "0.8"])]
    if importlib.util.find_spec("matplotlib") is None:
        commands.append(("to plot", [python, "-m", "pip", "install", "matplotlib"]))
    return [*commands, ("plot", [python, script("dev", "vislog.py"), folder, "-o", os.path.join(folder, "run.png")])]


def summary(flags, step, losses, vocab_size):
    """The lines at the end of a run. losses: the first and the last validation loss, and the last train loss"""
    lines = [verdict(*losses, vocab_size)]
    if flags.output_dir:
        lines += [f"{what + ':':12}{shlex.join(command)}" for what, command in next_commands(flags, step)]
    return [line for line in lines if line]
