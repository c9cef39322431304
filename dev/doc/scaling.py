"""
The model in scaling.md: how many tokens a second N machines train, from what one computes and the network carries.

    python dev/doc/scaling.py                            micro-batches of 4 x 64 tokens, machines of 0.8 TFLOP/s
    python dev/doc/scaling.py -t 1024 --tflops 5
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

import math

from dev.run.arguments import Defaults, Parser
from dev.run.config import descriptor_config, parameter_table
from dev.run.engine import size_of

MODELS = {"d12": "124M", "d24": "350M", "d36": "774M", "d48": "1558M"}


def step_seconds(config, machines, tokens, micro_batches, T, flops, bandwidth, latency, overlap=True):
    """(seconds that a step computes, seconds that a sum of gradients takes, those of them that nothing hides)

    tokens: of a micro-batch of one machine. flops: that it computes a second. bandwidth: bytes a second and direction
    """
    P, wte = size_of(parameter_table(config)), config.padded_vocab_size * config.channels
    attention = config.num_layers * config.channels * T
    micro_batch = tokens * 6 * (P + attention) / flops
    backward = tokens * 4 * (P - wte + attention) / flops  # of the layers, the classifier's belongs to the forward pass
    calls = 4 + 5 * config.num_layers  # each once around the ring, twice
    total = 2 * (machines - 1) / machines * 4 * P / bandwidth + calls * 2 * (machines - 1) * latency
    exposed = max(0, total - backward) if overlap else total
    return micro_batches * micro_batch, total, exposed


def main():
    parser = Parser(formatter_class=Defaults)
    parser.add_argument("--tflops", type=float, default=0.8, help="that a machine reaches in training")
    parser.add_argument("--share", type=float, default=0.55, help="of the link's bits that a sum uses")
    parser.add_argument("--latency", type=float, default=50e-6, help="seconds")
    parser.add_argument("-b", type=int, default=4)
    parser.add_argument("-t", type=int, default=64)
    flags = parser.parse_args()
    print("| model | Gbit/s | sum, s | " + " | ".join(f"N = {n}" for n in (1, 2, 4, 8, 16)) + " | micro-batches |")
    print("|---" * 9 + "|")
    for descriptor, name in MODELS.items():
        for gigabits in 10, 25, 100:
            cells = []
            for N in 1, 2, 4, 8, 16:
                compute, total, exposed = step_seconds(
                    descriptor_config(descriptor), N, flags.b * flags.t, 1, flags.t, flags.tflops * 1e12,
                    gigabits * flags.share / 8 * 1e9, flags.latency)
                cells.append(f"{N * flags.b * flags.t / (compute + exposed):,.0f}")
            enough = max(1, math.ceil(19 * exposed / compute))  # so many micro-batches a step lose 5 % at most
            print(f"| {name} | {gigabits} | {total:.2f} | {' | '.join(cells)} | {enough} |")


if __name__ == "__main__":
    main()
