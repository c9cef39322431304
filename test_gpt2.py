"""
Checks the trainer against PyTorch's numbers: logits, loss and gradients of one batch, then ten steps of AdamW.

    python test_gpt2.py                      the tiny model in dev/test/, and GPT-2 124M where data/ holds its state
    python test_gpt2.py MODEL.bin STATE.bin  any checkpoint and debug state (dev/train_gpt2_torch.py writes them)
    python test_gpt2.py --device cuda --precision bf16 ...    by another engine, or in another precision

It prints what llm.c's test prints, but its bounds are relative as well, so that a gradient of zeros does not pass,
and its exit status is 1 when anything is wrong.
"""
import argparse
import os
import sys
import time
from types import SimpleNamespace

import numpy as np

from dev.run.console import program
from dev.run.engine import Tensors
from dev.run.files import DEBUG_STATE_MAGIC, HEADER_BYTES, check_size, open_file, read_header, require_numbers
from dev.run.reading import read_json
from train_gpt2 import build

TINY = ("dev/test/gpt2_tiny.bin", "dev/test/gpt2_tiny_debug_state.bin")
GPT2_124M = ("data/gpt2_124M.bin", "data/gpt2_124M_debug_state.bin")
# the ten losses that llm.c expects of GPT-2 124M, for a state that comes without a .json of its own
LOSSES_124M = [5.270007133483887, 4.059706687927246, 3.3751230239868164, 2.8007826805114746, 2.315382242202759,
               1.8490285873413086, 1.3946564197540283, 0.9991465210914612, 0.6240804195404053, 0.37651097774505615]

# logits: largest difference, by the largest logit; loss: relative; gradient: of a tensor, norm of the
# difference relative to the norm, and largest relative to the largest; steps: difference of each of the ten losses
# bf16: a narrow model averages fewer roundings. PyTorch in bfloat16, with the same files: the tiny model has gradients
# up to 2.6e-2 off (under autocast 1.5e-2), a random d12 7.6e-3 (autocast), its ten losses are up to 1.0e-2 off
BF16 = {"logits": lambda largest: 3e-2 * largest, "loss": 1e-3, "steps": 1e-2}
BOUNDS = {"fp32": SimpleNamespace(logits=lambda largest: 2e-4, loss=1e-5, gradient=1e-4, largest=1e-4, steps=1e-4),
          "bf16": SimpleNamespace(**BF16, gradient=1e-2, largest=6e-2),
          "bf16, narrow": SimpleNamespace(**BF16, gradient=3e-2, largest=6e-2)}
NARROW = 256  # channels


def read_state(path, engine):
    """Inputs, targets (B, T), logits (B*T, V), loss and gradients from a debug state; ValueError if it isn't whole."""
    V, N = engine.config.vocab_size, engine.num_parameters
    with open_file(path) as file:
        B, T = (int(n) for n in read_header(file, path, DEBUG_STATE_MAGIC, (2,))[2:4])
        if B < 1 or not 1 <= T <= engine.config.max_seq_len:
            raise ValueError(f"{path}: its header says a batch of {B} times {T} tokens, and the model has "
                             f"{engine.config.max_seq_len} positions")
        check_size(path, HEADER_BYTES + 4 * (2 * B * T + B * T * V + 1 + N))
        x, y = (np.fromfile(file, np.int32, B * T).reshape(B, T) for _ in range(2))
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        if low < 0 or high >= V:
            raise ValueError(f"{path}: it has tokens {low} to {high}, and the model's vocabulary is 0 to {V - 1}")
        logits = np.fromfile(file, np.float32, B * T * V).reshape(B * T, V)
        loss = float(np.fromfile(file, np.float32, 1)[0])
        grads = np.fromfile(file, np.float32, N)
        for name, numbers in ("its logits", logits), ("its loss", np.array([loss])), ("its gradients", grads):
            require_numbers(path, name, numbers)
        return x, y, logits, loss, Tensors(grads, engine.table)


def check_tensor(name, ours, theirs, bounds):
    """Compare a gradient, layer by layer where it has layers; True if all are within the bound."""
    print(name)
    for a, b in zip(ours.ravel()[:5], theirs.ravel()[:5]):
        print(f"{'OK' if abs(a - b) <= bounds.largest * np.abs(theirs).max() else 'NOT OK'} {a:f} {b:f}")
    ok = True
    for a, b in zip(ours, theirs) if name[1:] not in ("wte", "wpe", "lnfw", "lnfb") else [(ours, theirs)]:
        difference = (a - b).astype(np.float64)
        ok &= bool(np.linalg.norm(difference) <= bounds.gradient * np.linalg.norm(b.astype(np.float64)))
        ok &= bool(np.abs(difference).max() <= bounds.largest * np.abs(b).max())
    print(f"TENSOR {'OK' if ok else 'NOT OK'}, maxdiff = {np.abs(ours - theirs).max():e}")
    return ok


def check(model_path, state_path, device="cpu", precision=None, **options):
    """Run the whole comparison for one model; True if everything is within its bounds."""
    engine = build(model_path, device, precision, **options)
    narrow = engine.precision == "bf16" and engine.config.channels < NARROW
    bounds = BOUNDS[engine.precision + ", narrow" * narrow]
    x, y, expected_logits, expected_loss, expected_grads = read_state(state_path, engine)
    print(f"{model_path}: {engine.num_parameters:,} parameters, B = {x.shape[0]}, T = {x.shape[1]}")

    engine.prepare(*x.shape)
    engine.forward(x)
    max_diff = max(float(np.abs(engine.logits(i) - row).max()) for i, row in enumerate(expected_logits))
    ok = max_diff < bounds.logits(float(np.abs(expected_logits).max()))
    print(f"{'OK' if ok else 'NOT OK'} (LOGITS), max_diff = {max_diff:e}")

    reference_path, losses = os.path.splitext(state_path)[0] + ".json", LOSSES_124M
    settings = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    if os.path.exists(reference_path):
        reference = read_json(reference_path, {"losses": [float], **dict.fromkeys(settings, float)})
        losses, settings = reference["losses"], {name: reference[name] for name in settings}
        for name, value in settings.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{reference_path}: {name} is {value}, expected 0 to 1")
    elif os.path.basename(state_path) != os.path.basename(GPT2_124M[1]):
        raise FileNotFoundError(f"no {reference_path}, which holds the losses of ten steps\n"
                                "---> HINT: dev/train_gpt2_torch.py writes it beside the debug state")
    for step, expected in enumerate(losses):
        start = time.perf_counter()
        loss = float(engine.forward(x, y))
        engine.backward()
        if step == 0:
            loss_ok = abs(loss - expected_loss) <= bounds.loss * abs(expected_loss)
            print(f"LOSS {'OK' if loss_ok else 'NOT OK'}: {loss:f} {expected_loss:f}")
            ok &= loss_ok
            grads = engine.host("grads")
            for name, _ in engine.table:
                ok &= check_tensor(f"d{name}", getattr(grads, name), getattr(expected_grads, name), bounds)
            padding_ok = not grads.wte[engine.config.vocab_size:].any()
            print(f"PADDING OF wte {'OK' if padding_ok else 'NOT OK'}")
            ok &= padding_ok
        engine.update(step, **settings)
        step_ok = abs(loss - expected) < bounds.steps
        print(f"step {step}: loss {loss:f} (took {(time.perf_counter() - start) * 1000:f} ms) OK = {int(step_ok)}")
        ok &= step_ok
    print(f"overall okay: {int(ok)}", flush=True)
    return ok


def main(argv):
    """The command line: see --help. Returns the exit status."""
    return program(check_all, argv)


def check_all(argv):
    parser = argparse.ArgumentParser("test_gpt2.py", description=__doc__.strip().split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="MODEL.bin STATE.bin", help="a checkpoint and its debug state")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--tf32", type=int, default=0, choices=(0, 1), help="on a GPU with fp32")
    parser.add_argument("--attention", default="auto", choices=("auto", "cudnn", "flash", "own"), help="on a GPU")
    args = parser.parse_args(argv)
    if len(args.files) not in (0, 2):
        parser.error("name a checkpoint and its debug state, or neither")
    root = os.path.dirname(os.path.abspath(__file__))
    pairs = [args.files] if args.files else [[os.path.join(root, path) for path in pair] for pair in (TINY, GPT2_124M)]
    options = {} if args.device == "cpu" else {"tf32": args.tf32, "attention": args.attention}
    # every pair is checked, also after one that fails
    results = [check(*pair, args.device, args.precision, **options) for pair in pairs
               if args.files or pair[0].endswith("tiny.bin") or os.path.exists(pair[1])]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
