"""
Every line that a run prints or logs. Lines keep llm.c's wording, so that what parses its output parses ours; what we
add comes after it. Only the first of several processes says anything.
"""
import contextlib
import importlib.metadata
import math
import platform
import re
import shutil
import time
from collections import Counter
from datetime import timedelta

from dev.run.machine import peak_memory
from dev.run.multiple_choice import accuracy
from dev.run.verdict import summary


def step_seconds(line):
    """The seconds of a step, of which Report.step_line() or llm.c has printed a line; 0 for any other line"""
    match = re.match(r"step \d+(?:/\d+.*?)?: .*\(took ([\d.]+) ms\)", line)
    return float(match[1]) / 1e3 if match else 0.0


class Report:
    """What a run tells its user, on standard output and in main.log, and the figures that it keeps for that."""

    def __init__(self, flags, processes):
        self.flags, self.processes = flags, processes
        self.loss = self.val_loss = self.first_val_loss = math.nan
        self.steps, self.seconds, self.best = 0, 0.0, math.inf  # of training steps so far
        self.weighted = self.weights = 0.0  # of their losses
        self.kernels = Counter()  # seconds in each

    def say(self, *lines, end="\n"):
        for line in lines:
            self.processes.print(line, end=end)

    # before the first step

    def program(self, engine):
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("NumPy", "Numba"))
        self.say(f"llm.numba: Python {platform.python_version()}, {versions}", *engine.describe(),
                 *self.processes.describe())
        if self.flags.note:
            self.say(self.flags.note)
        if self.flags.ignored:
            where = {"cpu": "a CPU", "cuda": "a GPU"}[self.flags.device]
            self.say(f"ignored, since they mean nothing on {where}: {' '.join(self.flags.ignored)}")

    def model(self, engine, memory, loader, val_loader):
        """memory: {what: bytes}, from the engine's prepare()"""
        config, tokens = engine.config, self.flags.batch_size * self.flags.sequence_length
        self.say("memory: " + " + ".join(f"{what} {size / 2**20:,.0f}" for what, size in memory.items())
                 + f" = {sum(memory.values()) / 2**20:,.0f} MiB")
        if val_loader.num_tokens and val_loader.B < self.flags.batch_size:
            self.say(f"validation has {val_loader.num_tokens:,} tokens: a batch of it has {val_loader.B} x "
                     f"{val_loader.T}")
        self.say("[GPT-2]", *(f"{key}: {value}" for key, value in vars(config).items()),
                 f"num_parameters: {engine.num_parameters}",
                 f"train dataset num_batches: {loader.num_tokens // tokens}",
                 f"val dataset num_batches: {val_loader.num_tokens // tokens}",
                 f"num_activations: {engine.num_activations}")

    def begin(self, run, last_step, tokenizer, output):
        """run: where it begins; last_step: where it will end; output: what keeps the log"""
        flags, self.output = self.flags, output
        self.say(*output.describe(last_step))
        if tokenizer.tokens is None and flags.sample_every:
            self.say(f"samples are printed as token numbers: {tokenizer.problem}")
        self.run, self.epoch = run, 0 if flags.overfit_single_batch else run.loader.num_tokens
        self.flops = flags.total_batch_size * run.engine.flops_per_token(flags.sequence_length)
        self.peak = self.processes.sum(run.engine.peak())
        self.last_step, self.start = last_step, time.perf_counter()

    # once in a while

    def validation(self, step, loss):
        self.val_loss = loss
        self.first_val_loss = loss if math.isnan(self.first_val_loss) else self.first_val_loss
        self.say(f"val loss {loss:f} | perplexity {math.exp(min(loss, 700)):.2f}")
        self.output.log(f"s:{step} tel:{loss:.4f}")

    def hellaswag(self, step, correct, count):
        share, error = accuracy(correct, count)
        self.say(f"HellaSwag: {correct}/{count} = {share:f} | standard error {error:f}")
        self.output.log(f"s:{step} eval:{share:.4f}")

    def sample(self, tokenizer, tokens):
        """Print a text as its tokens come, in the first process."""
        if self.processes.rank > 0:
            return
        self.say("generating:\n---")
        tokenizer.reset()
        try:
            for token in tokens:
                self.say(tokenizer.decode(token), end="")
        finally:
            self.say("\n---")

    def checkpoint(self, step, seconds):
        self.say(f"checkpoint of step {step} written to {self.flags.output_dir} (took {seconds:.1f} s)")

    # steps

    def start_step(self):
        self.step_start = time.perf_counter()

    def step(self, step, loss, norm, learning_rate, skipped=None):
        """skipped: the Outliers for which the update was skipped"""
        seconds = time.perf_counter() - self.step_start
        self.loss, self.steps, self.seconds = loss, self.steps + 1, self.seconds + seconds
        self.best = min(self.best, seconds)
        self.weighted, self.weights = 0.95 * self.weighted + 0.05 * loss, 0.95 * self.weights + 0.05
        if skipped or step % self.flags.log_every == 0 or step == self.last_step - 1:
            self.say(self.step_line(step, loss, norm, learning_rate, seconds, skipped))
        self.output.log(f"s:{step} trl:{loss:.4f} lr:{learning_rate:.6f} norm:{norm:.2f}")

    def step_line(self, step, loss, norm, learning_rate, seconds, skipped):
        """What is said of a step. Where a terminal is narrow, what says the least is left out; a file has 100 columns
        (COLUMNS has another number)."""
        left = int(self.seconds / self.steps * (self.last_step - step - 1))
        left = timedelta(seconds=left) if left >= 3600 else f"{left // 60}:{left % 60:02}"
        batch, milliseconds = self.flags.total_batch_size, 1000 * seconds
        digits = 3 if milliseconds < 100 else 1 if milliseconds < 1000 else 0
        line = {"step": f"step {step}/{self.last_step}", "epoch": "",
                "loss": f": train loss {loss:f} (took {milliseconds:.{digits}f} ms)",
                "mean": f" | mean {self.weighted / self.weights:.3f}", "norm": f" | norm {norm:.4f}",
                "rate": f" | lr {learning_rate:.2e}", "MFU": f" | {100 * self.flops / seconds / self.peak:.1f}% MFU",
                "speed": f" | {batch / seconds:.0f} tok/s",
                "left": f" | {left} left"}
        if self.epoch and self.last_step * batch > self.epoch:
            line["epoch"] = f" (epoch {(self.run.tokens + batch) / self.epoch:.1f})"
        if skipped:
            loss_score, norm_score = skipped.scores
            line["skip"] = f" | update skipped: z-scores of loss {loss_score:.1f}, norm {norm_score:.1f}"
        for name in "MFU", "rate", "speed", "epoch", "norm", "mean", "left":  # the least first
            if sum(map(len, line.values())) > shutil.get_terminal_size((100, 24)).columns:
                line[name] = ""
        return "".join(line.values())

    # the end

    @contextlib.contextmanager
    def profile(self, engine):
        """A context in which kernels are timed, where --profile asks for it"""
        def record(name, arguments, seconds):
            self.kernels[name] += seconds
        with engine.kernel_times(record) if self.flags.profile else contextlib.nullcontext():
            yield

    def end(self):
        total = time.perf_counter() - self.start
        if self.steps:
            mean = self.seconds / self.steps
            tokens, (steps_in_all, tokens_in_all) = self.steps * self.flags.total_batch_size, ("", "")
            if self.run.resumed:
                steps_in_all, tokens_in_all = (f" ({number} in all)" for number in (self.run.step, self.run.tokens))
            self.say(f"steps: {self.steps}{steps_in_all}", f"tokens: {tokens}{tokens_in_all}",
                     f"final train loss: {self.loss:f}",
                     *([] if math.isnan(self.val_loss) else [f"final val loss: {self.val_loss:f}"]),
                     f"mean ms per step: {1000 * mean:.1f}", f"best ms per step: {1000 * self.best:.1f}",
                     f"tokens per second: {self.flags.total_batch_size / mean:.0f}",
                     f"MFU: {100 * self.flops / mean / self.peak:.1f}%",
                     f"peak memory: {peak_memory() / 2**20:,.0f} MiB")
        if self.run.step >= self.last_step:
            losses = self.first_val_loss, self.val_loss, self.loss
            self.say(*summary(self.flags, self.run.step, losses, self.run.engine.config.vocab_size))
        self.kernels.update(self.processes.times if self.flags.profile else {})
        for name, seconds in self.kernels.most_common():
            self.say(f"{name:24} {1000 * seconds:12.1f} ms {100 * seconds / total:5.1f} % of the run")
