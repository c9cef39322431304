"""
The engine for one NVIDIA GPU, see dev/run/engine.py: the same model as train_gpt2.py's GPT2, in the same order.

Kernels are ours (cuda_kernels.py), products cublasLt's. Attention is cuDNN's in bfloat16, our flash_attention.py's in
TF32, and where there is neither, our own from products and a softmax. What products read is bfloat16, or float32 with
--precision fp32; master weights, gradients, AdamW's moments, statistics, losses and all sums are float32. A step's work
is queued on one stream without waiting for it: each piece the first time in the ordinary way, the second time recorded
as a CUDA graph, which is replayed ever after.
"""
import functools
import importlib.util
import math
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np

BEGIN = time.perf_counter()


def installed(name):
    """Can a module be imported?"""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


MISSING = [name for name in ("cuda.bindings", "numba_cuda", "nvmath") if not installed(name)]
if MISSING:
    raise ValueError(f"--device cuda needs Python packages that are not installed: {' '.join(MISSING)}\n"
                     "---> HINT: make train-gpu installs them; or pip install -r dev/engine/requirements.txt")

from dev.engine import cuda_kernels as k  # noqa: E402
from dev.engine.cublaslt import Matrix, Products  # noqa: E402
from dev.engine.gpu import Buffer, Gpu, Views, bytes_of, place  # noqa: E402
from dev.run.engine import DECAYED, Engine, Tensors, aligned  # noqa: E402
from dev.run.processes import ALONE  # noqa: E402

IMPORTS = time.perf_counter() - BEGIN
F32, BF16, I32 = k.F32, k.BF16, np.dtype(np.int32)
CLASSIFIER_ROWS = 1 << 15  # rows whose logits exist at a time: 3.3 GB of bfloat16
SQUARES = 64 << 20         # bytes of our own attention's float32 squares at a time, if a head does not need more
EVALUATED = 64             # sequences that are only evaluated are filled up to a multiple of so many tokens
SLOTS = 1024               # losses that may be on their way to the host
SHARED = (48 << 10) - 256  # bytes of shared memory that attention_decode may ask for
LAYER_TENSORS = ("ln1", "ln1_mean", "ln1_rstd", "qkv", "atty", "lse", "residual2",
                 "ln2", "ln2_mean", "ln2_rstd", "fch", "fch_gelu", "residual3")
LAYER_PARAMS = ("ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
                "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb")

# TFLOP/s of dense products, by the vendor's data sheets: bfloat16 with float32 sums (TF32 has half of it), and float32
PEAKS = {"H100 80GB HBM3": (989.4, 66.9), "H100 SXM": (989.4, 66.9), "H100 NVL": (835, 60), "H100 PCIe": (756, 51.2),
         "H200": (989.4, 66.9), "A100": (312, 19.5), "A10": (125, 31.2), "L40S": (362, 91.6), "L4": (121, 30.3),
         "RTX 4090": (165.2, 82.6), "RTX 3090": (71, 35.6), "B200": (2250, 75)}


def in_background(function):
    """A Future of what a function returns in a thread of its own, which ends with the program"""
    def work():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
    future = Future()
    threading.Thread(target=work, daemon=True).start()
    return future


class Loss:
    """A loss that is on its way: float() waits for it."""

    def __init__(self, gpu, slot):
        self.gpu, self.slot, self.value = gpu, slot, None

    def __float__(self):
        if self.value is None:
            self.gpu.synchronize()
            self.value = float(self.slot[0])
        return self.value


# ---------------------------------------------------------------------------------------------------------------------
# attention from batched products and a softmax, some heads at a time: where there are no fused kernels

def heads_together(NH, T):
    """How many heads' squares there are at a time: a divisor of NH"""
    size = 4 * T * -(-T // 8) * 8
    return max(n for n in range(1, NH + 1) if NH % n == 0 and (n == 1 or n * size <= SQUARES))


def squares_table(NH, T, dtype):
    """(name, shape, dtype) of Attention's scratch memory, the squares: scores and the probabilities' gradient in
    float32, since a bfloat16 of -100 is off by a quarter; probabilities and the scores' gradient, as products read
    them. In float32 these take the place of the first two."""
    shape = heads_together(NH, T), T, -(-T // 8) * 8
    names = [("scores", F32), ("dprobs", F32)] + [("probs", BF16), ("dscores", BF16)] * (dtype == BF16)
    return [(name, shape, dtype) for name, dtype in names]


class Attention:
    """squares: the Buffers of squares_table(). A step of d12, B = 16, T = 1024 in TF32 takes 111 ms on an H100, with
    flash_attention.py 79; 119 with fewer heads at a time, whose squares stay in the L2 cache; 113 with strips that
    leave out what is masked."""

    def __init__(self, gpu, products, NH, T, hs, squares):
        self.gpu, self.multiply, self.NH, self.T, self.hs = gpu, products.batched, NH, T, hs
        self.squares, self.width = squares if len(squares) == 4 else 2 * squares, squares[0].shape[-1]
        self.heads, self.scale = squares[0].shape[0], np.float32(1 / math.sqrt(hs))
        self.threads = min(1024, -(-self.width // 256) * 32)

    def groups(self, lse):
        """(sequence, first head, lse of these heads) for all heads that are together"""
        for b in range(lse.shape[0]):
            for h in range(0, self.NH, self.heads):
                yield b, h, lse[b][h:h + self.heads]

    def matrices(self, b, h, packed, *plain):
        """q, k, v of sequence b for the heads from h, then the parts of other arrays (B*T, C)"""
        C, first, size = self.NH * self.hs, b * self.T, packed.dtype.itemsize
        parts = [Matrix(packed.ptr + (first * 3 * C + n * C + h * self.hs) * size, packed.dtype, 3 * C, self.hs)
                 for n in range(3)]
        return parts + [Matrix(x.ptr + (first * C + h * self.hs) * size, x.dtype, C, self.hs) for x in plain]

    def square(self, buffer):
        return Matrix(buffer.ptr, buffer.dtype, self.width, self.T * self.width)

    def free(self):
        """Its scratch memory is a part of the batch's."""

    def forward(self, out, lse, qkv):
        T, hs, multiply, n = self.T, self.hs, self.multiply, self.heads
        scores, _, probs, _ = self.squares
        for b, h, sums in self.groups(lse):
            q, keys, v, y = self.matrices(b, h, qkv, out)
            multiply(self.square(scores), q, keys, (T, T, hs), (False, True), n)
            self.gpu.launch(k.softmax_forward, n * T, self.threads, probs, sums, scores, self.scale, T, self.width)
            multiply(y, self.square(probs), v, (T, hs, T), (False, False), n)

    def backward(self, dqkv, dout, out, lse, qkv):
        T, hs, multiply, n = self.T, self.hs, self.multiply, self.heads
        scores, dprobs, probs, dscores = self.squares
        for b, h, sums in self.groups(lse):
            q, keys, v, dy = self.matrices(b, h, qkv, dout)
            dq, dkeys, dv = self.matrices(b, h, dqkv)
            multiply(self.square(scores), q, keys, (T, T, hs), (False, True), n)
            multiply(self.square(dprobs), dy, v, (T, T, hs), (False, True), n)
            self.gpu.launch(k.softmax_backward, n * T, self.threads, probs, dscores, scores, dprobs, sums, self.scale,
                            T, self.width)
            multiply(dv, self.square(probs), dy, (T, hs, T), (True, False), n)
            multiply(dq, self.square(dscores), keys, (T, hs, T), (False, False), n)
            multiply(dkeys, self.square(dscores), q, (T, hs, T), (True, False), n)


# ---------------------------------------------------------------------------------------------------------------------
# the model

class GPT2(Engine):
    """The engine for one NVIDIA GPU. tf32: 1 = float32 products are rounded to TF32. attention: cudnn, flash, own, or
    auto"""

    def __init__(self, config, table, weights, precision=None, processes=ALONE, tf32=1, attention="auto"):
        super().__init__(config, table, processes)
        if processes.size > 1:
            raise ValueError(f"--device cuda is for one process, not {processes.size}\n"
                             "---> HINT: start it without mpirun; --device cpu trains in several")
        C, hs = config.channels, config.channels // config.num_heads
        if hs % 8 or hs > 256 or C > 3072:  # 3072: registers of a block in layernorm_backward
            raise ValueError(f"a model of {C} channels in heads of {hs} does not run on a GPU\n"
                             "---> HINT: heads must be a multiple of 8 wide, up to 256, and channels at most 3072")
        self.decoding = hs // 8, 32 if hs % 16 else 16  # a head's threads in a row, and rows: whole warps
        positions = SHARED // 4 - self.decoding[1] * hs
        if config.max_seq_len > positions:
            raise ValueError(f"a model of {config.max_seq_len} positions in heads of {hs} channels does not run on a "
                             f"GPU\n---> HINT: at most {positions} do")
        self.weights, self.precision, self.tf32 = weights, precision or "bf16", bool(int(tf32))
        self.dtype = F32 if precision == "fp32" else BF16
        self.first_weights, self.filled, self.trying = in_background(self.get_weights), False, False
        start = time.perf_counter()
        self.gpu = Gpu()
        if self.dtype == BF16 and self.gpu.capability < (8, 0):
            raise ValueError(f"{self.gpu.name} does not compute with bfloat16\n---> HINT: --precision fp32")
        self.attention_name = self.choose_attention(attention)
        self.products = Products(self.gpu, self.tf32)
        self.gpu.spent.update({"imports": IMPORTS, "GPU and cuBLAS": time.perf_counter() - start})
        width = -(-C // 256) * 32
        self.block = width, min(8, 1024 // width)  # whole warps for a row's channels; rows
        self.memory, self.capacity, self.acts = None, 0, None
        self.plans, self.recompute, self.batches = {}, 1, []  # batches: (inputs, targets, Loss) since the last update
        blocks, maxT, L = 4 * self.gpu.multiprocessors, config.max_seq_len, config.num_layers
        OC = 4 * C
        sums = max(blocks * 3 * C, max(blocks * 256 + OC, OC))
        state = [("squares", (blocks,), F32), ("results", (8,), F32), ("hyper", (8,), F32), ("unused", (C,), F32),
                 ("partial", (sums,), F32)]
        self.state = place(SimpleNamespace(), state, self.gpu.allocate(bytes_of(state)))
        self.blocks, self.cache_table = blocks, [(name, (L, maxT, C), self.dtype) for name in ("keys", "values")]
        self.cache = None
        self.slots, self.slot, self.owners = self.gpu.pinned_memory(4 * SLOTS).view(np.float32), 0, {}
        self.host_partial = self.gpu.pinned_memory(4 * blocks).view(np.float32)

    def choose_attention(self, wish):
        """cudnn, flash or own, by what is wished for, the precision, the card, and what is installed"""
        hs, fused = self.config.channels // self.config.num_heads, self.gpu.capability >= (8, 0)
        fits = {"cudnn": fused and self.dtype == BF16 and hs <= 128 and installed("cudnn"),
                "flash": fused and self.dtype == F32 and self.tf32 and hs % 16 == 0 and hs <= 64, "own": True}
        needs = {"cudnn": "bfloat16, heads of at most 128 channels and nvidia-cudnn-frontend",
                 "flash": "--precision fp32, -f 1 and heads of 16, 32, 48 or 64 channels"}
        if not fits.get(wish, True):
            raise ValueError(f"--attention {wish} needs {needs[wish]}\n---> HINT: --attention own" +
                             ", or pip install -r dev/engine/requirements.txt" * (wish == "cudnn"))
        return wish if wish in fits else next(name for name in fits if fits[name])

    def describe(self):
        major, minor = self.gpu.capability
        numbers = "bfloat16" if self.dtype == BF16 else "TF32" if self.tf32 else "float32"
        return [f"GPU: {self.gpu.name} (sm_{major}{minor}), driver for CUDA {self.gpu.driver // 1000}."
                f"{self.gpu.driver % 1000 // 10} | products: cuBLAS, {numbers} | attention: {self.attention_name}"]

    def peak(self):
        words = self.gpu.name.replace("-", " ").split()
        bf16, fp32 = next((peaks for name, peaks in PEAKS.items() if set(name.split()) <= set(words)), (math.nan,) * 2)
        return 1e12 * (bf16 if self.dtype == BF16 else bf16 / 2 if self.tf32 else fp32)

    # memory

    @functools.cached_property
    def allocated(self):
        """{what: Views} of the parameters: those that products read, and the float32 ones that checkpoints hold"""
        params = self.new_tensors(F32)
        return {"params": params, "read": params if self.dtype == F32 else self.new_tensors(BF16)}

    def get_weights(self):
        """The first parameters in host memory: read or drawn, which takes seconds"""
        host = Tensors(aligned(self.num_parameters), self.table)
        self.weights(host)
        return host.memory

    def fill(self):
        """Wait for the first parameters, where they are not there yet, and send them."""
        if self.filled:
            return
        start = time.perf_counter()
        self.gpu.send(self.allocated["params"].memory, self.first_weights.result())
        self.first_weights, self.filled = None, True
        self.round()
        self.gpu.spent["weights"] += time.perf_counter() - start

    @property
    def tensors(self):
        """What is allocated, and holds the parameters; other numbers while prepare() tries kernels out"""
        if not self.trying:
            self.fill()
        return self.allocated

    def new_tensors(self, dtype):
        size = self.num_parameters
        return Views(Buffer(self.gpu.allocate(size * dtype.itemsize), (size,), dtype), self.table)

    def round(self):
        """Give products the present parameters to read."""
        read, master = self.allocated["read"].memory, self.allocated["params"].memory
        if read is not master:
            self.gpu.launch(k.convert, -(-master.size // 2048), 256, read, master)

    def activation_table(self, B, T, recompute, train):
        """(name, shape, dtype) of a batch's activations, see train_gpt2.py, and of what is sent with it"""
        c, A = self.config, self.dtype
        Vp, NH, C, BT = c.padded_vocab_size, c.num_heads, c.channels, B * T
        L = c.num_layers if train else 1
        gelus, norms = L if recompute < 1 else 1, L if recompute < 2 else 1
        table = [
            ("inputs", (BT,), I32), ("targets", (BT,), I32), ("order", (BT,), I32), ("starts", (min(BT, Vp) + 1,), I32),
            ("tokens", (min(BT, Vp),), I32), ("count", (1,), I32), ("place", (1,), I32),
            ("encoded", (BT, C), A),
            ("ln1", (norms, BT, C), A), ("ln1_mean", (L, BT), F32), ("ln1_rstd", (L, BT), F32),
            ("qkv", (L, BT, 3 * C), A), ("atty", (L, BT, C), A), ("lse", (L, B, NH, T), F32),
            ("residual2", (L, BT, C), A),
            ("ln2", (norms, BT, C), A), ("ln2_mean", (L, BT), F32), ("ln2_rstd", (L, BT), F32),
            ("fch", (L, BT, 4 * C), A), ("fch_gelu", (gelus, BT, 4 * C), A), ("residual3", (L, BT, C), A),
            ("lnf", (BT, C), A), ("lnf_mean", (BT,), F32), ("lnf_rstd", (BT,), F32),
            ("logits", (min(BT, CLASSIFIER_ROWS), Vp), A), ("losses", (BT,), F32),
        ]
        if train:
            table += [("dresidual", (BT, C), A), ("dbtc", (BT, C), A), ("dqkv", (BT, 3 * C), A),
                      ("dfch", (BT, 4 * C), A)]
        if self.attention_of(T) == "own":
            table += squares_table(NH, T, A)
        elif self.attention_of(T) == "flash" and train:
            table += [("delta", (B, NH, T), F32)]
        return table

    def attention_of(self, T):
        return self.attention_name if T > 1 else "own"

    def memory_plan(self, B, T, recompute, train):
        """{what: bytes} of the GPU"""
        c, copies = self.config, (4 + 4 + 4 + 4 if train else 4) + (2 if self.dtype == BF16 else 0)
        plan = {"parameters": copies * self.num_parameters,
                "activations": bytes_of(self.activation_table(B, T, recompute, train)),
                "keys and values": bytes_of(self.cache_table)}
        if train and self.attention_of(T) == "cudnn":
            from dev.engine import cudnn_attention
            plan["attention"] = cudnn_attention.workspace_bytes(B, c.num_heads, T)
        return plan

    def require_memory(self, B, T, recompute, train):
        """ValueError with what would fit where a batch doesn't"""
        def needed(B, recompute):
            return sum(self.memory_plan(B, T, recompute, train).values())
        free, total = self.gpu.free_memory()
        held = self.capacity + (self.held if "allocated" in vars(self) else 0)
        if needed(B, recompute) <= free + held:
            return
        fits = next((b for b in range(B - 1, 0, -1) if needed(b, recompute) <= free + held), 0)
        hint = f"use -b {fits}" if fits else "use a smaller model (-e) or a shorter sequence (-t)"
        if recompute < 2 and needed(B, 2) <= free + held:
            hint += f"; or -r 2, which takes {needed(B, 2) / 2**30:.1f} GiB"
        raise ValueError(f"this run needs {needed(B, recompute) / 2**30:.1f} GiB of the GPU's memory; of "
                         f"{total / 2**30:.1f} GiB {free / 2**30:.1f} are free\n---> HINT: {hint}")

    @property
    def held(self):
        """Bytes of the tensors that are allocated"""
        return sum({id(views.memory): views.memory.nbytes for views in self.allocated.values()}.values())

    def prepare(self, B, T, recompute=1, train=True):
        self.check_order("prepare")
        self.check_shape(B, T)
        self.require_memory(B, T, recompute, train)
        self.recompute, start, before = recompute, time.perf_counter(), self.gpu.spent.total()
        plan = self.memory_plan(B, T, recompute, train)
        self.num_activations = sum(math.prod(shape) for _, shape, _ in self.activation_table(B, T, recompute, train))
        self.try_out(B, T, train)
        self.fill()
        spent = self.gpu.spent
        spent["first passes"] += time.perf_counter() - start - (spent.total() - before)
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in spent.items() if seconds >= 0.05)
        self.processes.print(f"GPU: ready after {spent.total():.1f} s" + (f": {parts}" if parts else ""))
        spent.clear()
        return plan

    def try_out(self, B, T, train):
        """Have kernels compiled and algorithms chosen for a batch. The first parameters come meanwhile: zeros do."""
        if not self.filled:
            self.gpu.zero(self.allocated["params"].memory)
            self.round()
        self.trying = not self.filled
        try:
            self.activations(B, T, train)
            tokens = np.zeros((B, T), np.int32)
            for _ in range(2 if train else 1):  # the second time records graphs
                self.forward(tokens, tokens, train)
                if train:
                    self.backward()
                    self.forget()
            self.gpu.synchronize()
        finally:
            self.trying = False

    def activations(self, B, T, train):
        """The Buffers of a batch of (B, T), and its attention. What was allocated before is used where it is enough."""
        if train and "m" not in self.tensors:
            self.tensors.update({what: self.new_tensors(F32) for what in ("grads", "m", "v")})
            for what in "m", "v":
                self.gpu.zero(self.tensors[what].memory)
        key = B, T, train, self.recompute
        if key not in self.plans:
            table = self.activation_table(B, T, self.recompute, train)
            if bytes_of(table) > self.capacity:
                self.free_activations()
                self.memory = self.gpu.allocate(bytes_of(table))
                self.capacity = bytes_of(table)
            acts = place(SimpleNamespace(B=B, T=T), table, self.memory)
            acts.batch = Buffer(self.memory, ((acts.place.ptr + 4 - self.memory) // 4,), I32)
            acts.attention = self.make_attention(acts, train)
            self.plans[key] = acts
        self.acts = self.plans[key]
        return self.acts

    def make_attention(self, acts, train):
        """A function that returns a batch's attention: cuDNN's is waited for only then"""
        B, T, NH = acts.B, acts.T, self.config.num_heads
        hs, name = self.config.channels // NH, self.attention_of(T)
        if name == "cudnn":
            return self.cudnn_attention(B, T, hs, train)
        if name == "flash":
            from dev.engine import flash_attention
            attention = flash_attention.Attention(self.gpu, B, NH, T, hs, acts.delta if train else None)
        else:
            squares = [getattr(acts, row[0]) for row in squares_table(NH, T, self.dtype)]
            attention = Attention(self.gpu, self.products, NH, T, hs, squares)
        return lambda: attention

    def cudnn_attention(self, B, T, hs, train):
        """A function that returns cuDNN's attention, whose plans a thread makes until it is called"""
        def make():
            from dev.engine import cudnn_attention
            return cudnn_attention.Attention(self.gpu, B, self.config.num_heads, T, hs, train)

        @functools.cache
        def wait():
            start, attention = time.perf_counter(), made.result()
            self.gpu.spent["attention's plans"] += time.perf_counter() - start
            return attention
        made = in_background(make)
        return wait

    def free_activations(self):
        """Before a batch that needs more memory: nothing may use the old one, even where there is no more."""
        self.gpu.drop_graphs()
        for acts in self.plans.values():
            acts.attention().free()
        if self.memory is not None:
            self.gpu.free(self.memory)
        self.capacity, self.memory, self.acts, self.plans = 0, None, None, {}

    def layer(self, l):
        tensors = ((name, getattr(self.acts, name)) for name in LAYER_TENSORS)
        return SimpleNamespace(**{name: x[l % x.shape[0]] for name, x in tensors})

    def layer_params(self, what, l):
        return SimpleNamespace(**{name: getattr(self.tensors[what], name)[l] for name in LAYER_PARAMS})

    # the forward pass

    def send_batch(self, acts, inputs, targets, count, place, train):
        """Send tokens (B, T), and for training the order by which wte_backward goes: a token's rows side by side"""
        host, flat = np.zeros(acts.batch.size, np.int32), inputs.ravel()

        def part(buffer):
            start = (buffer.ptr - acts.batch.ptr) // 4
            return host[start:start + buffer.size]
        part(acts.inputs)[:], part(acts.targets)[:] = flat, targets.ravel()
        part(acts.count)[:], part(acts.place)[:] = count, place
        if train:
            order = part(acts.order)
            order[:] = np.argsort(flat.astype(np.uint16), kind="stable")  # a radix sort
            tokens = flat[order]
            starts = np.flatnonzero(np.diff(tokens, prepend=-1))
            part(acts.starts)[:] = flat.size
            part(acts.starts)[:starts.size], part(acts.tokens)[:starts.size] = starts, tokens[starts]
        self.gpu.send(acts.batch, host)

    def forward(self, inputs, targets=None, train=True):
        self.check_order("forward")
        inputs, targets = self.check_batch(inputs, targets)
        train = train and targets is not None
        (B, T), self.shape = inputs.shape, inputs.shape
        if not train and (B, T, True, self.recompute) not in self.plans:  # filled up: few shapes, few graphs
            T = min(-(-T // EVALUATED) * EVALUATED, self.config.max_seq_len)
        acts = self.activations(B, T, train)
        filled = np.zeros((2, B, T), np.int32)
        filled[1] = -1
        filled[0, :, :inputs.shape[1]] = inputs
        if targets is not None:
            filled[1, :, :inputs.shape[1]] = targets
        self.send_batch(acts, filled[0], filled[1], inputs.size, 0, train)
        add, scored = self.micro_batches > 0, targets is not None
        self.gpu.replay(("forward", B, T, train, scored, add and train), lambda: self.queue_forward(train, scored, add))
        self.rows, self.scored = inputs.size, inputs.shape if scored else None
        self.pending = train
        loss = self.next_loss() if scored else None
        if train:
            self.batches[self.micro_batches:] = [(inputs.copy(), targets.copy(), loss)]
        return loss

    def next_loss(self):
        """The loss that the queue has computed by then, on its way to the host"""
        self.slot = (self.slot + 1) % SLOTS
        if self.slot in self.owners:
            float(self.owners[self.slot])  # its number is about to be overwritten
        slot = self.slots[self.slot:self.slot + 1]
        self.gpu.fetch(self.state.results[:1], slot)
        loss = self.owners[self.slot] = Loss(self.gpu, slot)
        return loss

    def queue_forward(self, train, scored, add):
        acts, launch = self.acts, self.gpu.launch

        def attention(l, at):
            self.gpu.call("attention_forward", acts.attention().forward, at.atty, at.lse, at.qkv)
        self.queue_blocks(attention)
        if not scored:
            return
        read, BT = self.tensors["read"], acts.losses.size
        dloss = np.float32(1 / BT)
        for start in range(0, BT, CLASSIFIER_ROWS):
            rows = slice(start, min(BT, start + CLASSIFIER_ROWS))
            logits, lnf = acts.logits[:rows.stop - start], acts.lnf[rows]
            self.product("logits forward", self.products.forward, logits, lnf, read.wte)
            launch(k.fused_classifier, rows.stop - start, 1024, logits, acts.losses[rows], acts.targets[rows], dloss,
                   self.config.vocab_size, self.config.padded_vocab_size, train)
            if train:
                wte = self.tensors["grads"].wte
                self.product("wte backward weight", self.products.backward_weight, wte, logits, lnf, add or start > 0)
                self.product("logits backward", self.products.backward_input, acts.dbtc[rows], logits, read.wte)
        launch(k.mean_loss, 1, 1024, self.state.results, acts.losses, acts.count)

    def product(self, name, *args):
        self.gpu.call(name, *args)

    def layernorm(self, out, mean, rstd, inp, weight, bias):
        self.gpu.launch(k.layernorm_forward, -(-mean.size // 8), (32, 8), out, mean, rstd, inp, weight, bias,
                        self.config.channels)

    def queue_blocks(self, attention):
        """From the tokens that were sent to acts.lnf. attention(l, at) has layer l's at.qkv and leaves its at.atty"""
        read, acts, product, C = self.tensors["read"], self.acts, self.product, self.config.channels
        forward, width = self.products.forward, self.block[1]
        self.gpu.launch(k.encoder_forward, -(-acts.inputs.size // width), self.block, acts.encoded, acts.inputs,
                        read.wte, read.wpe, acts.place, acts.T, C)
        residual = acts.encoded
        for l in range(self.config.num_layers):
            at, w = self.layer(l), self.layer_params("read", l)
            self.layernorm(at.ln1, at.ln1_mean, at.ln1_rstd, residual, w.ln1w, w.ln1b)
            product("qkv forward", forward, at.qkv, at.ln1, w.qkvw, w.qkvb)
            attention(l, at)
            product("attproj forward", forward, at.residual2, at.atty, w.attprojw, w.attprojb, residual)
            self.layernorm(at.ln2, at.ln2_mean, at.ln2_rstd, at.residual2, w.ln2w, w.ln2b)
            if self.dtype == BF16:
                product("fc forward", forward, at.fch_gelu, at.ln2, w.fcw, w.fcb, None, at.fch)
            else:  # in float32 the product with GELU takes three times as long
                product("fc forward", forward, at.fch, at.ln2, w.fcw, w.fcb)
                self.gelu(at.fch_gelu, at.fch)
            product("fcproj forward", forward, at.residual3, at.fch_gelu, w.fcprojw, w.fcprojb, at.residual2)
            residual = at.residual3
        self.layernorm(acts.lnf, acts.lnf_mean, acts.lnf_rstd, residual, read.lnfw, read.lnfb)

    def gelu(self, out, inp):
        self.gpu.launch(k.gelu_forward, -(-inp.size // 2048), 256, out, inp)

    # the backward pass

    def layernorm_back(self, dweight, dbias, dproduct, dout, inp, weight, mean, rstd, add, first=False):
        """Adds to dresidual. dproduct: the bias gradient of the product whose output inp ends with, None without one"""
        C, partial, blocks = self.config.channels, self.state.partial, self.blocks
        self.gpu.launch(k.layernorm_backward, blocks, (self.block[0], k.LN_ROWS), self.acts.dresidual, partial, dout,
                        inp, weight, mean, rstd, C, not first, shared=12 * C)
        self.gpu.launch(k.finish_sums, -(-3 * C // 64), (8, 64), dweight, dbias, dproduct or self.state.unused, partial,
                        blocks, C, 3 * C, add)

    def bias_back(self, dbias, dout, add):
        (BT, OC), partial = dout.shape, self.state.partial
        blocks = max(1, self.blocks // -(-OC // 256))
        self.gpu.launch(k.bias_backward, (-(-OC // 256), blocks), (32, 8), partial, dout, BT, OC)
        self.gpu.launch(k.finish_sums, -(-OC // 64), (8, 64), dbias, dbias, dbias, partial, blocks, OC, OC, add)

    def backward(self, last=True):
        self.check_order("backward")
        add = self.micro_batches > 0
        self.gpu.replay(("backward", self.acts.B, self.acts.T, add), lambda: self.queue_backward(add))
        self.micro_batches += 1
        self.pending = False

    def queue_backward(self, add):
        read, g, acts, product = self.tensors["read"], self.tensors["grads"], self.acts, self.product
        C = self.config.channels
        by_input, by_weight, L = self.products.backward_input, self.products.backward_weight, self.config.num_layers
        dresidual, dbtc, dqkv, dfch = acts.dresidual, acts.dbtc, acts.dqkv, acts.dfch
        fused = self.dtype == BF16
        self.layernorm_back(g.lnfw, g.lnfb, g.fcprojb[L - 1], dbtc, acts.residual3[L - 1], read.lnfw, acts.lnf_mean,
                            acts.lnf_rstd, add, first=True)
        for l in reversed(range(L)):
            at, w, dw = self.layer(l), self.layer_params("read", l), self.layer_params("grads", l)
            inp = acts.residual3[l - 1] if l else acts.encoded
            if self.recompute >= 1:
                self.gelu(at.fch_gelu, at.fch)
            product("fcproj backward weight", by_weight, dw.fcprojw, dresidual, at.fch_gelu, add)
            product("fcproj backward", by_input, dfch, dresidual, w.fcprojw, at.fch if fused else None)
            if not fused:
                self.gpu.launch(k.gelu_backward, -(-dfch.size // 2048), 256, dfch, at.fch)
            self.bias_back(dw.fcb, dfch, add)
            if self.recompute >= 2:
                self.layernorm(at.ln2, at.ln2_mean, at.ln2_rstd, at.residual2, w.ln2w, w.ln2b)
            product("fc backward weight", by_weight, dw.fcw, dfch, at.ln2, add)
            product("fc backward", by_input, dbtc, dfch, w.fcw)
            self.layernorm_back(dw.ln2w, dw.ln2b, dw.attprojb, dbtc, at.residual2, w.ln2w, at.ln2_mean, at.ln2_rstd,
                                add)
            product("attproj backward weight", by_weight, dw.attprojw, dresidual, at.atty, add)
            product("attproj backward", by_input, dbtc, dresidual, w.attprojw)
            self.gpu.call("attention_backward", acts.attention().backward, dqkv, dbtc, at.atty, at.lse, at.qkv)
            self.bias_back(dw.qkvb, dqkv, add)
            if self.recompute >= 2:
                self.layernorm(at.ln1, at.ln1_mean, at.ln1_rstd, inp, w.ln1w, w.ln1b)
            product("qkv backward weight", by_weight, dw.qkvw, dqkv, at.ln1, add)
            product("qkv backward", by_input, dbtc, dqkv, w.qkvw)
            self.layernorm_back(dw.ln1w, dw.ln1b, g.fcprojb[l - 1] if l else None, dbtc, inp, w.ln1w, at.ln1_mean,
                                at.ln1_rstd, add)
        width, maxT = self.block[1], self.config.max_seq_len
        self.gpu.launch(k.wpe_backward, -(-maxT // width), self.block, g.wpe, dresidual, acts.B, acts.T, C, add)
        self.gpu.launch(k.wte_backward, acts.tokens.size, self.block, g.wte, dresidual, acts.order, acts.starts,
                        acts.tokens, C, shared=4 * width * C)

    # the update

    def grad_norm(self):
        self.check_order("grad_norm")
        norm = self.norm()
        if not math.isfinite(norm) and self.attention_of(self.shape[1]) == "cudnn":
            norm = self.repeat(norm)
        return norm

    def repeat(self, norm):
        """The step's norm, after its passes once more with our own attention: cuDNN's backward pass was seen to make
        NaN of sound numbers. Then cuDNN goes on."""
        batches, self.attention_name = list(self.batches), "own"
        try:
            self.free_activations()
            self.forget()
            for inputs, targets, loss in batches:
                loss.value = float(self.forward(inputs, targets))
                self.backward()
            repeated = self.norm()
            self.free_activations()
        finally:
            self.attention_name = "cudnn"
        self.processes.print(f"the gradient's norm is {norm} with cuDNN's attention and {repeated:.4g} with our own, "
                             "with which this step was repeated; --attention own does without cuDNN")
        return repeated

    def norm(self):
        squares = self.state.squares
        self.gpu.launch(k.sum_of_squares, squares.size, 512, squares, self.tensors["grads"].memory)
        self.gpu.fetch(squares, self.host_partial)
        self.gpu.synchronize()
        return math.sqrt(self.host_partial.sum(dtype=np.float64)) / self.micro_batches

    def update(self, step, learning_rate, *, norm=None, grad_clip=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.0):
        self.check_order("update")
        norm = self.grad_norm() if norm is None else norm
        clip, t = grad_clip / norm if 0 < grad_clip < norm else 1.0, step + 1
        self.gpu.send(self.state.hyper, np.float32([learning_rate, beta1, beta2, 1 / (1 - beta1**t), 1 / (1 - beta2**t),
                                                    eps, weight_decay, clip / self.micro_batches]))
        self.gpu.replay("update", self.queue_update)
        self.micro_batches = 0

    def queue_update(self):
        for name, _ in self.table:
            p, w, g, m, v = (getattr(self.tensors[what], name) for what in ("read", "params", "grads", "m", "v"))
            self.gpu.launch(k.adamw_update, -(-p.size // 2048), 256, p, w, g, m, v, self.state.hyper, name in DECAYED)

    # evaluation, text

    def losses(self):
        self.check_scored()
        losses = self.gpu.read(self.acts.losses).reshape(self.acts.B, self.acts.T)
        return losses[:, :self.scored[1]]

    def logits(self, row):
        self.check_row(row)
        b, t = divmod(row, self.shape[1])
        return self.row_logits(b * self.acts.T + t)

    def row_logits(self, row):
        out = self.acts.logits[:1]
        self.product("logits forward", self.products.forward, out, self.acts.lnf[row:row + 1], self.tensors["read"].wte)
        found = self.gpu.read(out)[0, :self.config.vocab_size]
        return found if self.dtype == F32 else (found.astype(np.uint32) << 16).view(np.float32)

    def read(self, tokens):
        self.check_order("read")
        self.check_reading(len(tokens))
        start, count, maxT = self.tokens_read, len(tokens), self.config.max_seq_len
        inputs = self.check_tokens([tokens])
        if self.cache is None:
            self.cache = place(SimpleNamespace(), self.cache_table, self.gpu.allocate(bytes_of(self.cache_table)))
        T = 1 if start else min(-(-count // EVALUATED) * EVALUATED, maxT)
        acts = self.activations(1, T, train=False)
        filled = np.zeros((1, T), np.int32)
        filled[0, :count] = inputs
        self.send_batch(acts, filled, filled, 1, start, train=False)
        self.gpu.replay(("read", T, start > 0), lambda: self.queue_read(start > 0))
        self.tokens_read, self.rows, self.scored, self.shape = start + count, count, None, (1, T)
        return self.row_logits(count - 1)

    def queue_read(self, decoding):
        acts, C, NH, launch, cache = self.acts, self.config.channels, self.config.num_heads, self.gpu.launch, self.cache
        hs, width = C // NH, self.block[1]
        shared = 4 * (self.config.max_seq_len + self.decoding[1] * hs)

        def attention(l, at):
            keys, values = cache.keys[l], cache.values[l]
            launch(k.keep_keys, -(-acts.T // width), self.block, keys, values, at.qkv, acts.place, C)
            if decoding:
                launch(k.attention_decode, NH, self.decoding, at.atty, at.qkv, keys, values, acts.place, C, hs,
                       np.float32(1 / math.sqrt(hs)), shared=shared)
            else:
                acts.attention().forward(at.atty, at.lse, at.qkv)
        self.queue_blocks(attention)

    # what a checkpoint holds, and what a profile shows

    def views(self, what):
        if what in ("grads", "m", "v") and what not in self.tensors:
            raise ValueError(f"{what} does not exist before a step for training\n---> HINT: call prepare(B, T) first")
        return self.tensors[what]

    def host(self, what):
        memory = aligned(self.num_parameters)
        self.gpu.fetch(self.views(what).memory, memory)
        self.gpu.synchronize()
        return Tensors(memory, self.table)

    def load(self, what, file):
        for piece in self.gpu.upload(self.views(what).memory):
            if file.readinto(piece) != piece.nbytes:
                raise ValueError(f"{file.name}: truncated: it has fewer than {self.num_parameters:,} numbers for "
                                 f"{what}")
        if what == "params":
            self.round()

    def kernel_times(self, record):
        return self.gpu.timing(record)
