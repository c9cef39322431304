"""
MMLU: questions from 57 subjects with four answers. Chance is 0.25, and GPT-2 knows little more.

    python dev/data/mmlu.py                                            # the evaluation set, once
    python -m dev.eval.mmlu -e data/gpt2_124M.bin --limit 1000
"""

from dev.data.data_common import run
from dev.eval.multiple_choice import main

if __name__ == "__main__":
    run(lambda: main("MMLU", "data/mmlu/mmlu_test.bin"))
