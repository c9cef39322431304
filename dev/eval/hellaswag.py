"""
HellaSwag: which of four endings goes on with a text? Chance is 0.25, GPT-2 124M reaches 0.2955, 1558M 0.4893.

    python dev/data/hellaswag.py                                       # the evaluation set, once
    python -m dev.eval.hellaswag -e data/gpt2_124M.bin --limit 1000
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from dev.data.command_line import run
from dev.eval.multiple_choice import main

if __name__ == "__main__":
    run(lambda: main("HellaSwag", "data/hellaswag/hellaswag_val.bin"))
