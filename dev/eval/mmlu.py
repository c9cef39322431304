"""
MMLU: questions from 57 subjects with four answers. Chance is 0.25, and GPT-2 knows little more.

    python dev/data/mmlu.py                                            # the evaluation set, once
    python -m dev.eval.mmlu -e data/gpt2_124M.bin --limit 1000
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from dev.data.command_line import run
from dev.eval.multiple_choice import main

if __name__ == "__main__":
    run(lambda: main("MMLU", "data/mmlu/mmlu_test.bin"))
