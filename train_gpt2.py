"""
Trains GPT-2 in Python with Numba: every layer's forward and backward pass is a JIT-compiled kernel in this file.

It is llm.c's train_gpt2.c for people who read Python: the same file formats, batches, initial weights and printed
lines, in one flat module without PyTorch. Read it from top to bottom: the matrix product, the layers in the order of
the model with each backward pass below its forward pass, the optimiser, the model, the data, the training loop.

The loop is the same for every device. It drives an engine, which is what dev/run/engine.py says it is; the class GPT2
here is the one for CPUs. What surrounds a run and would be the same for any model, such as text, checkpoints and every
line that is printed, is plain Python in dev/run/.

What it deliberately is not: a framework. There is no autograd (the backward pass is written out) and no other model.

    make train                                       the first run: data, weights, 40 steps
    python train_gpt2.py --help                      the flags
    OMP_NUM_THREADS=8 python train_gpt2.py -b 8      threads, batch size
"""
import dev.run  # isort: skip  # noqa: F401  first: it says which package is missing, and answers Ctrl-C meanwhile
import functools
import importlib
import math
import platform
import sys
import time
from types import SimpleNamespace

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from dev.run.blas import blas_backward, blas_forward, name_of_blas
from dev.run.checkpoints import Run, newest_checkpoint, part_of, read_run_checkpoint
from dev.run.compiling import CPU_FEATURES, PRANGE, cached, load_kernels, start_threads
from dev.run.config import GPT2Config, is_checkpoint, model_config, parameter_table
from dev.run.console import BAD_INPUT, complaint, open_console
from dev.run.data import NO_DATA, choose_data, find_shards, largest_batches, tokens_in, validate
from dev.run.engine import DECAYED, NO_LAYERS, Engine, Tensors, aligned, size_of
from dev.run.files import MODEL_MAGIC, read_header, require_numbers
from dev.run.flags import parse_flags
from dev.run.folder import Output, own_folder
from dev.run.found import model_file
from dev.run.machine import allow_amx, peak_memory, require_memory, shortest, threads_of
from dev.run.multiple_choice import HELLASWAG, read_examples, score
from dev.run.processes import ALONE, processes_of
from dev.run.random_weights import draw, init_random
from dev.run.report import Report
from dev.run.schedule import Outliers, require_finite, scheduled_learning_rate
from dev.run.shard import DamagedBatch, Shard, check_state, samples_of, shuffle
from dev.run.step import micro_batches, rescued
from dev.run.stop import Stop
from dev.run.text import Sampler, generate
from dev.run.vocabulary import tokenizer_of

# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of compiled function, and the constants they share
#
# Kernels must give the same bits on any number of threads. So no two threads ever add to the same number, sums over
# many rows go through partial sums that are added up in a fixed order, and a product's sums are never split.

# `fastmath=True` would assume that there are no NaNs; without "reassoc" no sum becomes vector code.
FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}
# Threads share what `prange` says and nothing else. Kernels run without Python's lock: a thread may sum gradients over
# MPI meanwhile.
kernel = cached(parallel=PRANGE, nogil=True, error_model="numpy", fastmath=FASTMATH)
inner = cached(error_model="numpy", fastmath=FASTMATH)
exact = cached(error_model="numpy", fastmath=FASTMATH - {"reassoc"})  # where the order of a sum matters

# A float32 times a Python float is a float64: in kernels every constant is a float32.
ZERO, HALF, ONE, TWO, THREE = (np.float32(x) for x in (0, 0.5, 1, 2, 3))
LAYERNORM_EPS = np.float32(1e-5)
GELU_SCALE, GELU_CUBIC = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)
GELU_ZERO = np.float32(-20)  # x < -7.2: what is below 1e-15 there is 0, since subnormal numbers take six times as long
LOG2E, LN2_HIGH, LN2_LOW = np.float32(np.log2(np.e)), np.float32(0.693359375), np.float32(-2.12194440e-4)
E2, E3, E4, E5, E6 = (np.float32(1 / math.factorial(n)) for n in range(2, 7))
EXP_MIN, EXP_MAX = np.float32(-87), np.float32(88)
INT_MIN, SIGN_SHIFT, MAGNITUDE = np.int32(-2**31), np.int32(31), np.int32(2**31 - 1)

NOTHING = np.empty((1, 0), np.float32)  # for a kernel's optional matrices; for its optional vectors, NOTHING[0]


@exact
def exp(x):
    """exp(x) to 3e-7, written so that a loop over it becomes vector code: 0.4 ns an element, math.exp takes 3.3."""
    x = min(max(x, EXP_MIN), EXP_MAX)
    n = np.floor(x * LOG2E + HALF)
    r = (x - n * LN2_HIGH) - n * LN2_LOW  # x = n ln 2 + r with |r| <= ln 2 / 2
    p = ONE + r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * E6)))))
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # 2^n, by its exponent bits


@inner
def maximum(x):
    """max(x). Only maxima of integers become vector code: floats are ordered like integers once the negative ones'
    magnitude bits are flipped (0.1 ns an element, 1.3 without the trick). A NaN is the largest of all."""
    largest = INT_MIN
    for i in range(x.size):
        bits = np.float32(x[i]).view(np.int32)
        largest = max(largest, np.int32(bits ^ ((bits >> SIGN_SHIFT) & MAGNITUDE)))
    return np.int32(largest ^ ((largest >> SIGN_SHIFT) & MAGNITUDE)).view(np.float32)


@inner
def exponentials(x, scale):
    """Replaces x by exp(scale * x - their maximum), the numerators of its softmax. Returns that maximum and the sum."""
    largest = maximum(x) * scale
    total = ZERO
    for i in range(x.size):
        x[i] = exp(x[i] * scale - largest)
        total += x[i]
    return largest, total


# ---------------------------------------------------------------------------------------------------------------------
# Matrix product: C (+)= A @ B for one tile of the output, on one thread
#
# A core multiplies far faster than it fetches, so a fast product is about reusing what was fetched:
#   registers   micro() keeps a block of sums in registers during a whole loop over k: each step loads NR numbers of B
#               and a few of A, and uses every one of them many times
#   L1 cache    a panel of B, KC words x NR, is packed: copied to where micro() reads it in order
#   L2, L3      a block of A, MC x KC words, is multiplied with all panels of B before the next is; it is packed too,
#               but for float32 rows, which micro() can read in order where they are
#   DRAM        AMX waits for little else: it packs panels by the dozen, in long runs, or once for many tiles
# Each sum adds its products in the order of k, however the output is cut into tiles: bits don't depend on threads.
#
# Panels are 32-bit words, whose type is the precision, so that Numba compiles each kernel once for each: float32 is a
# number; uint32 two bfloat16, at k and k + 1, which AVX512-BF16 or AMX multiply and add up in float32; int32 a number
# that was rounded to bfloat16, the same product for processors that have neither.

VL = 16 if "+avx512f" in CPU_FEATURES else 8 if "+avx" in CPU_FEATURES else 4  # floats in a vector register
# MR * NV sums, NV vectors of B and one of A fit into the registers: AVX-512 and ARM's NEON have 32, the others 16.
MR, NV = (8, 2) if VL == 16 else (4, 4) if platform.machine().lower() in ("arm64", "aarch64") else (4, 3)
NR = NV * VL                       # a multiple of MR, and a divisor of GPT-2's sizes
AMX = "+amx-bf16" in CPU_FEATURES and VL == 16
PAIRS = AMX or "+avx512bf16" in CPU_FEATURES and VL == 16
KC, AMX_KC = 256, 192              # the panel of B has 12 to 32 kB: it stays in the L1 cache
MC, NC, AMX_NC = 512, 384, 768     # the largest tile: its packed blocks fill half of the L2 cache
PANELS = max((MC + NR) * KC, (MC + AMX_NC) * AMX_KC if AMX else 0)  # words of a thread's packed block of A, panels of B
TILE, AMX_ROWS = 16, 32            # AMX's registers hold 16 rows of 16 words; four of them make 32 x 32 sums
LATE = 0.25                        # of a tile: what one thread, which others disturb, takes longer than the rest
i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
i8, i8p = ir.IntType(8), ir.IntType(8).as_pointer()


class BFloat(ir.Type):
    """LLVM's type, which llvmlite doesn't have"""
    _to_string = lambda self: "bfloat"
    __eq__ = lambda self, other: isinstance(other, BFloat)
    __hash__ = lambda self: hash(BFloat)


def constant(value_of):
    """A function of panels that is value_of(their dtype), known when its caller is compiled"""
    @intrinsic
    def constant(typingctx, panels):
        value = int(value_of(panels.dtype))
        return types.intp(panels), lambda context, builder, sig, args: ir.Constant(i64, value)
    return constant


reads_rows = constant(lambda dtype: dtype == types.float32)                                 # of A where they are
numbers = constant(lambda dtype: 2 if dtype == types.uint32 else 1)                         # in a word
panel_rows = constant(lambda dtype: AMX_ROWS if AMX and dtype == types.uint32 else MR)      # of A, that micro() takes
panel_depth = constant(lambda dtype: AMX_KC if AMX and dtype == types.uint32 else KC)       # words
tile_columns = constant(lambda dtype: AMX_NC if AMX and dtype == types.uint32 else NC)      # the most
packing = constant(lambda dtype: 24 if AMX and dtype == types.uint32 else 8)                # sums while one is packed
shared = constant(lambda dtype: AMX and dtype == types.uint32)                              # all pack for all tiles
panel_step = constant(lambda dtype: TILE if AMX and dtype == types.uint32 else 4)           # words, that micro() takes


def element_pointer(context, builder, array_type, array, *index):
    """LLVM code for the address of array[index], of 32-bit elements, and for the array's strides"""
    array = context.make_array(array_type)(context, builder, array)
    strides = cgutils.unpack_tuple(builder, array.strides, len(index))
    offset = ir.Constant(i64, 0)
    for i, stride in zip(index, strides):
        offset = builder.add(offset, builder.mul(i, stride))
    return builder.bitcast(builder.gep(builder.bitcast(array.data, i8p), [offset]), f32.as_pointer()), strides


def call(builder, name, result, *args):
    """LLVM code that calls one of LLVM's own functions"""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def vector_load(builder, pointer, length):
    return builder.load(builder.bitcast(pointer, ir.VectorType(f32, length).as_pointer()), align=4)


def vector_store(builder, vector, pointer, align=4):
    return builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align)


def row_pointers(builder, first, row_bytes, rows):
    """Pointers to rows that are row_bytes apart"""
    first = builder.bitcast(first, i8p)
    offsets = [builder.mul(row_bytes, ir.Constant(i64, r)) for r in range(rows)]
    return [builder.bitcast(builder.gep(first, [offset]), f32.as_pointer()) for offset in offsets]


def prefetch_line(builder, pointer, write):
    call(builder, "llvm.prefetch.p0", ir.VoidType(), builder.bitcast(pointer, i8p), *map(i32, (write, 2 + write, 1)))


def pick_lanes(builder, x, y, lanes):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(i32, len(lanes)), lanes))


def at(builder, pointer, n):
    return builder.gep(pointer, [n if isinstance(n, ir.Value) else ir.Constant(i64, n)])


def multiply_add(builder, x, y, total, paired):
    """total + x * y for vectors of words; of pairs both products are added"""
    if not paired:
        return call(builder, f"llvm.fmuladd.v{VL}f32", total.type, x, y, total)
    x, y = (builder.bitcast(v, ir.VectorType(BFloat(), 2 * VL)) for v in (x, y))
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, x, y)


def vector_sums(builder, row, a, step, b, kc, add, paired):
    """micro() with MR x NV vectors of sums. a: pointers to MR rows of A, whose words are `step` words apart"""
    for pointer in row:  # the sums' places come from memory while they are computed
        for column in range(15, NR, 16):
            prefetch_line(builder, at(builder, pointer, column), 1)
    zero = ir.Constant(ir.VectorType(f32, VL), [0.0] * VL)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(NV)] for _ in range(MR)]
    with cgutils.for_range(builder, builder.lshr(kc, ir.Constant(i64, 2)), intp=i64) as loop:
        *ak, bk = (at(builder, p, builder.mul(loop.index, ir.Constant(i64, 4 * n))) for p, n in
                   (*((p, step) for p in a), (b, NR)))
        for k in range(4):
            bs = [vector_load(builder, at(builder, bk, k * NR + v * VL), VL) for v in range(NV)]
            for r in range(MR):
                x = pick_lanes(builder, vector_load(builder, at(builder, ak[r], k * step), 1),
                               ir.Constant(ir.VectorType(f32, 1), ir.Undefined), [0] * VL)
                for y, s in zip(bs, sums[r]):
                    builder.store(multiply_add(builder, x, y, builder.load(s), paired), s)
    for r in range(MR):
        for v in range(NV):
            p = at(builder, row[r], v * VL)
            before = builder.select(add, vector_load(builder, p, VL), zero)
            vector_store(builder, builder.fadd(before, builder.load(sums[r][v])), p)


def tile_sums(builder, row, a, b, kc, add, past, row_bytes):
    """micro() with AMX: 2 x 2 registers of 16 x 16 sums; registers 4, 5 take A, 6, 7 B"""
    number, line, void = [ir.Constant(i8, n) for n in range(8)], ir.Constant(i64, 64), ir.VoidType()
    tile = lambda name, n, p, by: call(builder, f"llvm.x86.tile{name}64", void, number[n], builder.bitcast(p, i8p), by)
    corners = lambda row: [(2 * r + c, at(builder, row[TILE * r], TILE * c)) for r in range(2) for c in range(2)]
    with builder.if_else(add) as (adding, writing):
        with adding:
            for n, p in corners(row):
                tile("loadd", n, p, row_bytes)
        with writing:
            for n in range(4):
                call(builder, "llvm.x86.tilezero", void, number[n])
    with cgutils.for_range(builder, builder.lshr(kc, ir.Constant(i64, 4)), intp=i64) as loop:
        ak, bk = (at(builder, p, builder.mul(loop.index, ir.Constant(i64, TILE * 32))) for p in (a, b))
        with builder.if_then(builder.not_(past)):  # the next rows' places come from memory meanwhile, three in a step
            n = builder.add(builder.mul(loop.index, ir.Constant(i64, 3)), ir.Constant(i64, AMX_ROWS))
            following = builder.gep(builder.bitcast(row[0], i8p), [builder.mul(n, row_bytes)])
            for p in row_pointers(builder, following, row_bytes, 3):
                for half in p, at(builder, p, TILE):
                    prefetch_line(builder, half, 1)
        for n in range(2):
            tile("loadd", 4 + n, at(builder, ak, TILE * TILE * n), line)
            tile("loadd", 6 + n, at(builder, bk, TILE * n), ir.Constant(i64, 4 * NR))
        for n in range(4):
            call(builder, "llvm.x86.tdpbf16ps", void, number[n], number[4 + n // 2], number[6 + n % 2])
    block, block_bytes = cgutils.alloca_once(builder, f32, AMX_ROWS * NR), ir.Constant(i64, 4 * NR)
    block.align, block_row = 64, row_pointers(builder, block, block_bytes, AMX_ROWS)
    by = builder.select(past, block_bytes, row_bytes)
    for n, p in corners([builder.select(past, x, y) for x, y in zip(block_row, row)]):
        tile("stored", n, p, by)
    with builder.if_then(past):  # tiles have no such store
        for x, y in zip(block_row, row):
            for v in range(0, NR, VL):
                store = vector_store(builder, vector_load(builder, at(builder, x, v), VL), at(builder, y, v), 64)
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(i32, 1)]))


@intrinsic
def micro(typingctx, C, A, b, kc, add, past):
    """C[:panel_rows, :NR] (+)= A's first rows times the panel of B at b[0], kc words deep: a multiple of panel_step.
    A: packed, or (M, K) of float32, whose last row stands for rows that it lacks. past: AMX stores past the caches,
    which spares reading C. Its rows begin at cache lines"""
    def codegen(context, builder, sig, args):
        C, A, b, kc, add, past = args
        start, dtype, amx = ir.Constant(i64, 0), sig.args[2].dtype, AMX and sig.args[2].dtype == types.uint32
        c, (row_bytes, _) = element_pointer(context, builder, sig.args[0], C, start, start)
        b, _ = element_pointer(context, builder, sig.args[2], b, start)
        rows = row_pointers(builder, c, row_bytes, AMX_ROWS if amx else MR)
        place = lambda r: element_pointer(context, builder, sig.args[1], A, r)[0]
        packed, shape = sig.args[1].ndim == 1, context.make_array(sig.args[1])(context, builder, A).shape
        last = builder.sub(builder.extract_value(shape, 0), i64(1))
        a = [at(builder, place(start), r) if packed else
             place(builder.select(builder.icmp_signed("<", i64(r), last), i64(r), last)) for r in range(MR)]
        if amx:
            tile_sums(builder, rows, a[0], b, kc, add, past, row_bytes)
        else:
            vector_sums(builder, rows, a, MR if packed else 1, b, kc, add, dtype == types.uint32)
        return context.get_dummy_value()
    return types.void(C, A, b, types.intp, *[types.boolean] * 2), codegen


@intrinsic
def use_tiles(typingctx, panels, use):
    """Before a thread's first micro() with AMX its tile registers get their shape; after its last they are released."""
    def codegen(context, builder, sig, args):
        if AMX and sig.args[0].dtype == types.uint32:
            shape = bytearray(64)  # palette 1; bytes in a row, 16 bits for each of 8 registers; rows, 8 bits for each
            shape[0], shape[16:32:2], shape[48:56] = 1, bytes([64] * 8), bytes([16] * 8)
            with builder.if_else(args[1]) as (before, after):
                with before:
                    data = cgutils.global_constant(builder, "tile_shape", cgutils.make_bytearray(shape))
                    call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(data, i8p))
                with after:
                    call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()
    return types.void(panels, types.boolean), codegen


def rounded(builder, x):
    """A vector of float32 rounded to bfloat16, to nearest, ties to even; NaN stays NaN"""
    vector = ir.VectorType(i32, x.type.count)
    word = lambda n: ir.Constant(vector, [n] * vector.count)
    bits = builder.bitcast(x, vector)
    up = builder.add(builder.and_(builder.lshr(bits, word(16)), word(1)), word(0x7FFF))
    result = builder.and_(builder.add(bits, up), word(-65536))
    nan = builder.fcmp_unordered("uno", x, x)
    return builder.bitcast(builder.select(nan, builder.or_(bits, word(1 << 22)), result), x.type)


def pairs(builder, x):
    """A vector of float32 rounded to bfloat16, as half as many words"""
    vector = builder.fptrunc(x, ir.VectorType(BFloat(), x.type.count))
    return builder.bitcast(vector, ir.VectorType(f32, x.type.count // 2))


@intrinsic
def pack_square(typingctx, out, o, width, X, i, j, rowwise):
    """MR rows of MR words, X[i:, j:], where X's rows or its columns are contiguous: out[o + n*width:] is column n of
    the words, or row n if `rowwise`"""
    def codegen(context, builder, sig, args):
        out, o, width, X, i, j, rowwise = args
        dtype, x_type = sig.args[0].dtype, sig.args[3]
        x, strides = element_pointer(context, builder, x_type, X, i, j)
        y, _ = element_pointer(context, builder, sig.args[0], out, o)
        by_rows = builder.icmp_signed("==", strides[1], ir.Constant(i64, 4))
        load = lambda pointers, count: [vector_load(builder, p, count) for p in pointers]
        if dtype != types.uint32:
            vectors = load(row_pointers(builder, x, builder.select(by_rows, *strides), MR), MR)
            vectors = [rounded(builder, v) for v in vectors] if dtype == types.int32 else vectors
        else:
            with builder.if_else(by_rows) as (rows, columns):
                with rows:
                    one = [pairs(builder, v) for v in load(row_pointers(builder, x, strides[0], MR), 2 * MR)]
                    ones_block = builder.block
                with columns:  # two of them side by side make pairs
                    lanes = [lane for r in range(MR) for lane in (r, r + MR)]
                    c = load(row_pointers(builder, x, strides[1], 2 * MR), MR)
                    other = [pairs(builder, pick_lanes(builder, *c[n:n + 2], lanes)) for n in range(0, 2 * MR, 2)]
                    others_block = builder.block
            vectors = [builder.phi(v.type) for v in one]
            for phi, *incoming in zip(vectors, one, other):
                for v, block in zip(incoming, (ones_block, others_block)):
                    phi.add_incoming(v, block)
        half, mixed = MR // 2, [lane for i in range(MR) for lane in (i, i + MR)]  # two vectors' lanes in turns
        turned = vectors
        for _ in range(MR.bit_length() - 1):  # vector i with i + half, log2(MR) times: then rows have become columns
            turned = [pick_lanes(builder, turned[i], turned[i + half], lanes)
                      for i in range(half) for lanes in (mixed[:MR], mixed[MR:])]
        with builder.if_else(builder.icmp_unsigned("==", by_rows, rowwise)) as (copying, turning):
            for block, result in (copying, vectors), (turning, turned):
                with block:
                    for n in range(MR):
                        vector_store(builder, result[n], at(builder, y, builder.mul(width, ir.Constant(i64, n))))
        return context.get_dummy_value()
    return types.void(out, types.intp, types.intp, X, types.intp, types.intp, types.boolean), codegen


@intrinsic
def prefetch(typingctx, X, i, j):
    """Have the cache line of X[i, j] come from memory while something else is computed"""
    def codegen(context, builder, sig, args):
        x, _ = element_pointer(context, builder, sig.args[0], *args)
        prefetch_line(builder, x, 0)
        return context.get_dummy_value()
    return types.void(X, types.intp, types.intp), codegen


@inner
def pack(panels, o, X, width, stride, rowwise):
    """Panels of `width` rows of X (rows, depth), width * stride words apart: word o + n*width + r is X's row r at its
    nth word; zeros stand for what X lacks. rowwise: as AMX wants A, (words / TILE, rows, TILE)"""
    (rows, depth), many, step = X.shape, numbers(panels), panel_step(panels)
    rowwise = rowwise and step == TILE  # known when this is compiled: only AMX's panels are
    word, height = TILE if rowwise else width, (rows + width - 1) // width * width
    total = (depth + many * step - 1) // (many * step) * step
    by_rows = X.strides[1] == 4  # what is contiguous is read in order, so that the processor fetches it ahead
    for outer in range(0, height if by_rows else total, MR):
        for within in range(0, total if by_rows else height, MR):
            r, n = (outer, within) if by_rows else (within, outer)
            place = o + r // width * width * stride
            place += n // TILE * TILE * width + r % width * TILE + n % TILE if rowwise else n * width + r % width
            if r + MR <= rows and (n + MR) * many <= depth:
                pack_square(panels, place, word, X, r, n * many, rowwise)
            else:
                part, square = X[r:r + MR, n * many:(n + MR) * many], np.zeros((MR, many * MR), np.float32)
                square[:part.shape[0], :part.shape[1]] = part
                pack_square(panels, place, word, square, 0, 0, rowwise)


@inner
def prefetch_part(X, part, parts):
    """Have one of `parts` equal parts of X come from memory: of its rows or its columns, whatever is contiguous"""
    X = X if X.strides[1] == 4 else X.T
    for r in range(part * len(X) // parts, (part + 1) * len(X) // parts):
        for k in range(0, X.shape[1], 16):
            prefetch(X, r, k)


SCORES, LOWER, UPPER = 1, 2, 3  # what attention's mask spares a product, see tile_product


@inner
def tile_product(C, A, B, add, panels, triangle=0, d=0, later=False, packed=(0, 0, 0)):
    """C (+)= A @ B. Any strides for A and B if one of the two is 1; at most MC rows; panels (PANELS,): scratch memory.
    triangle: SCORES = nobody needs C[r, c] with c > r + d; LOWER, UPPER = A[r, k] is 0 where k > r + d, k < r + d.
    later: C is only read when it has left the caches. packed: pack_together()'s places for A and B, words of a row."""
    (M, N), K, ready = C.shape, A.shape[1], shared(panels) and packed[2] > 0
    R, depth_max, step, many = panel_rows(panels), panel_depth(panels), panel_step(panels), numbers(panels)
    a, b, stride = packed if ready else (0, MC * depth_max, depth_max)
    wide = N + NR if ready else tile_columns(panels) if step == TILE else NR  # columns of B that are packed at once
    unit, edge = many * step, np.empty((R, 2 * NR), np.float32)[:, :NR]  # edge: the sums where a tile ends in a panel
    past = later and not add and K <= depth_max * many and C.ctypes.data % 64 == C.strides[0] % 64 == 0
    use_tiles(panels, True)
    for k0 in range(0, K, depth_max * many):
        k1 = min(K, k0 + depth_max * many)
        depth, adding = (k1 - k0 + unit - 1) // unit * step, add or k0 > 0
        unpacked = reads_rows(panels) and A.strides[1] == 4 and depth == k1 - k0
        if not (unpacked or ready):
            pack(panels, a, A[:, k0:k1], R, stride, R != MR)
        for j in range(0, N, NR):
            if j % wide == 0 and not ready:
                pack(panels, b, B[k0:k1, j:j + wide].T, NR, stride, False)
            following = (B[k0:k1, j + NR:j + 2 * NR] if j + NR < N else B[k1:k1 + depth_max * many, :NR]).T
            for i in range(0, M, R):
                if step != TILE:  # AMX is so fast that the processor's own prefetching does better
                    prefetch_part(following, i // R, (M + R - 1) // R)
                if triangle == SCORES and j > i + R - 1 + d:
                    continue
                begin = 0 if triangle != UPPER else max(0, min(depth, (i + d - k0) // unit * step))
                end = depth if triangle != LOWER else max(0, min(depth, (i + R + d - k0 + unit - 1) // unit * step))
                whole, part = i + R <= M and j + NR <= N, C[i:i + R, j:j + NR]
                sums, panel = part if whole else edge, panels[b + j % wide * stride + begin * NR:]
                if adding and not whole:
                    edge[:M - i, :N - j] = part
                if unpacked:
                    micro(sums, A[i:, k0 + begin:], panel, end - begin, adding, past and whole)
                else:
                    micro(sums, panels[a + i * stride + begin * R:], panel, end - begin, adding, past and whole)
                if not whole:
                    part[:] = edge[:M - i, :N - j]
        a, b = (a + depth * R, b + depth * NR) if ready else (a, b)
    use_tiles(panels, False)


@intrinsic
def take(typingctx, counter, n):
    """counter[0], to which n is added, in an atomic operation. Threads take their next piece of work with n = 1: no two
    get the same, and one that a neighbour slows down takes fewer. n = 0: how far others are, and all that they wrote"""
    def codegen(context, builder, sig, args):
        pointer, _ = element_pointer(context, builder, sig.args[0], args[0], ir.Constant(i64, 0))
        return builder.atomic_rmw("add", builder.bitcast(pointer, i64.as_pointer()), args[1], "acq_rel")
    return types.intp(counter, types.intp), codegen


@inner
def pack_together(matrices, panels, BT, key, parts):
    """A thread's share in packing matrices (rows, depth), as many for A as for B, once for all tiles. Returns, when the
    others' are packed too, (len, 2): the first word of each in `panels`, the memory of all, and words of a row. Or
    zeros: each tile packs what it needs. parts (2,): those that threads have taken, and packed"""
    places, end = np.zeros((len(matrices), 2), np.int64), 0
    if BT <= MC or not shared(panels):  # a tile may have all rows, or packing takes little
        return places
    many, step, tall, deep = numbers(panels), panel_step(panels), 4 * NR, panel_depth(panels)  # a part: tall x deep
    for n in range(len(matrices)):
        rows, depth = matrices[n].shape
        places[n] = end, (depth + many * step - 1) // (many * step) * step
        end += (rows + NR - 1) // NR * NR * places[n, 1]
    if end > panels.size:
        return np.zeros_like(places)
    # A core writes a tenth as fast what many others have just read: so other weights get another place.
    places[:, 0] += key.ctypes.data // 64 % ((panels.size - end) // 16 + 1) * 16
    part, first = take(parts, 1), 0
    for n in range(len(matrices)):
        down, across = (len(matrices[n]) + tall - 1) // tall, (places[n, 1] + deep - 1) // deep
        while part < first + down * across:
            r, k = (part - first) % down * tall, (part - first) // down * deep
            X, place = matrices[n][r:r + tall, k * many:(k + deep) * many], places[n, 0] + r * places[n, 1] + k * NR
            pack(panels, place, X, NR, places[n, 1], 2 * n < len(matrices))  # A's panels are as wide as B's
            take(parts[1:], 1)
            part = take(parts, 1)
        first += down * across
    while take(parts[1:], 0) < first:
        pass
    return places


if numba.config.DISABLE_JIT:  # the same in Python, for a debugger: intrinsics need the compiler
    def tile_product(C, A, B, add, panels, triangle=0, d=0, later=False, packed=None):
        if panels.dtype != np.float32:  # rounds as rounded() does
            A, B = (np.ascontiguousarray(X).view(np.uint32) for X in (A, B))
            A, B = (((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32) for bits in (A, B))
        C[:] = A @ B + C if add else A @ B

    def take(counter, n):
        counter[0] += n
        return counter[0] - n

    packing, tile_columns, shared = (lambda panels, n=n: n for n in (8, NC, 0))


@inner
def cut(M, N, panels):
    """The tiles of an (M, N) output, [(first row, end, first column, end)], as large as let the busiest thread be done
    first. A tile takes the time of its sums and of packing its rows and columns, by the depth of the product"""
    best, down, across = np.inf, 0, 0
    for rows in range(AMX_ROWS, MC + 1, AMX_ROWS):
        for columns in range(NR, tile_columns(panels) + 1, NR):
            tiles = ((M + rows - 1) // rows) * ((N + columns - 1) // columns)
            busiest = (tiles + len(panels) - 1) // len(panels) + LATE
            time = busiest * (rows * columns + packing(panels) * (rows + columns))
            if time < best:
                best, down, across = time, rows, columns
    return [(i, min(M, i + down), j, min(N, j + across)) for j in range(0, N, across) for i in range(0, M, down)]


# ---------------------------------------------------------------------------------------------------------------------
# encoder: token embedding + position embedding

@kernel
def encoder_forward(out, inp, wte, wpe, start):
    # out (B*T, C); inp (B, T) tokens; wte (Vp, C); wpe (maxT, C); start: the position of the first token
    B, T = inp.shape
    for bt in prange(B * T):
        token, position = wte[inp[bt // T, bt % T]], wpe[start + bt % T]
        for i in range(out.shape[1]):
            out[bt, i] = token[i] + position[i]


@kernel
def encoder_backward(dwte, dwpe, dout, inp, add):
    # dwte already holds the classifier's part, and dwpe is written on the first micro-batch, added to on the others.
    # The same token may come twice, so a thread owns channels, not tokens: 16 of them, a cache line.
    B, T = inp.shape
    C = dout.shape[1]
    for block in prange((C + 15) // 16):
        i0, i1 = block * 16, min(C, block * 16 + 16)
        for b in range(B):
            for t in range(T):
                for i in range(i0, i1):
                    dwte[inp[b, t], i] += dout[b * T + t, i]
        for t in range(len(dwpe)):
            for i in range(i0, i1):
                total = dwpe[t, i] if add else ZERO
                if t < T:
                    for b in range(B):
                        total += dout[b * T + t, i]
                dwpe[t, i] = total


# ---------------------------------------------------------------------------------------------------------------------
# layernorm (Ba et al. 2016): out = (inp - mean) / sqrt(var + eps) * weight + bias, over the channels of each token

@kernel
def layernorm_forward(out, mean, rstd, inp, weight, bias):
    # out, inp (B*T, C); mean, rstd (B*T,), kept for the backward pass; weight, bias (C,)
    C = inp.shape[1]
    scale = ONE / np.float32(C)
    for bt in prange(len(inp)):
        x, y = inp[bt], out[bt]
        total = ZERO
        for i in range(C):
            total += x[i]
        m = total * scale
        variance = ZERO
        for i in range(C):
            variance += (x[i] - m) * (x[i] - m)
        s = ONE / np.sqrt(variance * scale + LAYERNORM_EPS)
        for i in range(C):
            y[i] = (x[i] - m) * s * weight[i] + bias[i]
        mean[bt], rstd[bt] = m, s


LN_ROWS = 32  # rows whose weight gradients are summed in one partial buffer


@kernel
def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, add):
    # dinp, dout, inp (B*T, C); dweight, dbias, weight (C,); mean, rstd (B*T,)
    # dinp is added to: it is the gradient of the residual stream. add: whether dweight and dbias are, too
    BT, C = inp.shape
    scale = ONE / np.float32(C)
    blocks = (BT + LN_ROWS - 1) // LN_ROWS
    partial = np.zeros((blocks, 2, C), np.float32)
    for block in prange(blocks):
        dw, db = partial[block, 0], partial[block, 1]
        for bt in range(block * LN_ROWS, min(BT, (block + 1) * LN_ROWS)):
            x, dy, dx, m, s = inp[bt], dout[bt], dinp[bt], mean[bt], rstd[bt]
            # two reductions over the channels: the means of dnorm and of dnorm * norm
            dnorm_mean = ZERO
            dnorm_norm_mean = ZERO
            for i in range(C):
                dnorm = weight[i] * dy[i]
                dnorm_mean += dnorm
                dnorm_norm_mean += dnorm * ((x[i] - m) * s)
            dnorm_mean *= scale
            dnorm_norm_mean *= scale
            for i in range(C):
                norm = (x[i] - m) * s
                dw[i] += norm * dy[i]
                db[i] += dy[i]
                dx[i] += (weight[i] * dy[i] - dnorm_mean - norm * dnorm_norm_mean) * s
    if not add:
        dweight[:], dbias[:] = ZERO, ZERO
    for block in range(blocks):  # on one thread: to wake the others would take longer
        for i in range(C):
            dweight[i] += partial[block, 0, i]
            dbias[i] += partial[block, 1, i]


# ---------------------------------------------------------------------------------------------------------------------
# matmul: the linear layer, out = inp @ weight.T + bias, where nearly all of the time goes

@inner
def finish_row(out, act, bias, residual, i, o0, o1):
    # out[i, o0:o1] += bias + residual, act = gelu(out); each of the three may be empty, and is left out then
    y = out[i, o0:o1]
    if bias.size:
        b = bias[o0:o1]
        for o in range(y.size):
            y[o] += b[o]
    if residual.size:
        r = residual[i, o0:o1]
        for o in range(y.size):
            y[o] += r[o]
    if act.size:
        a = act[i, o0:o1]
        for o in range(y.size):
            a[o] = gelu(y[o])


@inner
def sum_rows(dbias, dout, o0, o1, add):
    # dbias[o0:o1] (+)= the sum of dout[:, o0:o1] over its rows
    db = dbias[o0:o1]
    if not add:
        db[:] = ZERO
    for bt in range(len(dout)):
        dy = dout[bt, o0:o1]
        for o in range(db.size):
            db[o] += dy[o]


@kernel
def matmul_forward(out, act, inp, weight, bias, residual, panels):
    # out (B*T, OC) = inp (B*T, C) @ weight (OC, C).T + bias (OC,) + residual (B*T, OC); act (B*T, OC) = gelu(out)
    # bias, residual and act may be empty: then they are left out. panels (threads, PANELS)
    BT, OC = out.shape
    if BT == 1:  # a matrix times a vector uses each weight once: all that counts is to read them in order, as they are
        for block in prange((OC + 15) // 16):
            o0, o1 = block * 16, min(OC, block * 16 + 16)
            for o in range(o0, o1):
                x, w = inp[0], weight[o]
                total = ZERO
                for i in range(x.size):
                    total += w[i] * x[i]
                out[0, o] = total
            finish_row(out, act, bias, residual, 0, o0, o1)
        return
    tiles, counter, parts = cut(BT, OC, panels), np.zeros(1, np.int64), np.zeros(2, np.int64)
    matrices, memory = (inp[:, :], weight[:, :]), panels.reshape(-1)
    for thread in prange(len(panels)):
        places = pack_together(matrices, memory, BT, weight, parts)
        mine, tile = memory if places[0, 1] else panels[thread], take(counter, 1)
        while tile < len(tiles):
            i0, i1, o0, o1 = tiles[tile]
            x, w = inp[i0:i1, :], weight[o0:o1, :].T
            packed = places[0, 0] + i0 * places[0, 1], places[1, 0] + o0 * places[1, 1], places[1, 1]
            tile_product(out[i0:i1, o0:o1], x, w, False, mine, 0, 0, False, packed)
            for i in range(i0, i1):  # while the tile is in the cache
                finish_row(out, act, bias, residual, i, o0, o1)
            tile = take(counter, 1)


@kernel
def matmul_backward(dinp, dweight, dbias, dout, inp, weight, add, panels):
    # dinp (B*T, C) = dout @ weight; dweight (OC, C) (+)= dout.T @ inp; dbias (OC,) (+)= dout's sums over the rows
    # dout (B*T, OC), inp (B*T, C), weight (OC, C); dbias may be empty; add: whether dweight and dbias are added to
    BT, C = inp.shape
    OC = dout.shape[1]
    dinp_tiles, dweight_tiles = cut(BT, C, panels), cut(OC, C, panels)
    counter, parts, large = np.zeros(1, np.int64), np.zeros(2, np.int64), dweight.size >= 1 << 19  # too much for caches
    matrices, memory = (dout[:, :], dout.T[:, :], weight.T[:, :], inp.T[:, :]), panels.reshape(-1)
    for thread in prange(len(panels)):
        places = pack_together(matrices, memory, BT, weight, parts)
        mine, tile = memory if places[0, 1] else panels[thread], take(counter, 1)
        while tile < len(dinp_tiles) + len(dweight_tiles):
            if tile < len(dinp_tiles):
                i0, i1, j0, j1 = dinp_tiles[tile]
                dy, w = dout[i0:i1, :], weight[:, j0:j1]
                packed = places[0, 0] + i0 * places[0, 1], places[2, 0] + j0 * places[2, 1], places[2, 1]
                tile_product(dinp[i0:i1, j0:j1], dy, w, False, mine, 0, 0, False, packed)
            else:
                o0, o1, j0, j1 = dweight_tiles[tile - len(dinp_tiles)]
                dy, x = dout[:, o0:o1].T, inp[:, j0:j1]
                packed = places[1, 0] + o0 * places[1, 1], places[3, 0] + j0 * places[3, 1], places[3, 1]
                tile_product(dweight[o0:o1, j0:j1], dy, x, add, mine, 0, 0, large, packed)
                if dbias.size and j0 == 0:
                    sum_rows(dbias, dout, o0, o1, add)
            tile = take(counter, 1)


# ---------------------------------------------------------------------------------------------------------------------
# attention (Vaswani et al. 2017), causal, several heads: out = softmax(q k^T / sqrt(hs)) v for each head
#
# No (T, T) matrix is ever stored. A thread takes a strip of STRIP queries at a time and holds its probabilities,
# (STRIP, T), in scratch memory that stays in the cache, its part of strips (threads, 2, STRIP, T + STRIP_GAP); a row's
# log-sum-exp is all that the backward pass needs to compute them again.

STRIP = 128
STRIP_GAP = 16  # floats between a strip's rows: at multiples of 4 kB, a column's cache lines would drive each other out


@inner
def heads(qkv, b, h, T, hs):
    """Views of head h of sequence b: q, k, v (T, hs), from qkv (B*T, 3*C)"""
    C = qkv.shape[1] // 3
    x = qkv[b * T:(b + 1) * T]
    return x[:, h * hs:(h + 1) * hs], x[:, C + h * hs:C + (h + 1) * hs], x[:, 2 * C + h * hs:2 * C + (h + 1) * hs]


@kernel
def attention_forward(out, lse, qkv, panels, strips):
    # out (B*T, C); lse (B, NH, T) log-sum-exp of each row of scores, kept for the backward pass; qkv (B*T, 3*C)
    B, NH, T = lse.shape
    hs = out.shape[1] // NH
    scale = ONE / np.sqrt(np.float32(hs))
    parts, counter = (T + STRIP - 1) // STRIP, np.zeros(1, np.int64)  # parts: strips of a head
    for thread in prange(len(panels)):
        scores = strips[thread, 0]
        item = take(counter, 1)
        while item < parts * B * NH:
            b, h, t0 = item // NH % B, item % NH, (parts - 1 - item // (B * NH)) * STRIP
            t1 = min(T, t0 + STRIP)
            q, k, v = heads(qkv, b, h, T, hs)
            y = out[b * T + t0:b * T + t1, h * hs:(h + 1) * hs]
            att, sums = scores[:t1 - t0, :t1], np.empty(STRIP, np.float32)
            # pass 1: scores = q @ k.T
            tile_product(att, q[t0:t1], k[:t1].T, False, panels[thread], SCORES, t0)
            for t in range(t0, t1):
                row = scores[t - t0]
                # passes 2 and 3: the maximum, exponentials and their sum; 0 for what lies in the future
                largest, total = exponentials(row[:t + 1], scale)
                row[t + 1:t1] = ZERO
                lse[b, h, t], sums[t - t0] = largest + np.log(total), total
            # pass 4: out = probabilities @ v, where the division by the sum comes last
            tile_product(y, att, v[:t1], False, panels[thread], LOWER, t0)
            for t in range(t0, t1):
                for i in range(hs):
                    y[t - t0, i] /= sums[t - t0]
            item = take(counter, 1)


@kernel
def attention_decode(out, qkv, k, v, NH):
    # The forward pass of one token more, for drawing text, with the keys and values of those before it at hand:
    # out (C,); qkv (3*C,), of which only q is read; k, v (T, C), this token's included
    T, C = k.shape
    hs = C // NH
    scale = ONE / np.sqrt(np.float32(hs))
    for h in prange(NH):
        q, y, row = qkv[h * hs:(h + 1) * hs], out[h * hs:(h + 1) * hs], np.empty(T, np.float32)
        for t in range(T):
            key = k[t, h * hs:(h + 1) * hs]
            score = ZERO
            for i in range(hs):
                score += q[i] * key[i]
            row[t] = score
        _, total = exponentials(row, scale)
        y[:] = ZERO
        for t in range(T):
            value, p = v[t, h * hs:(h + 1) * hs], row[t] / total
            for i in range(hs):
                y[i] += p * value[i]


@kernel
def attention_backward(dqkv, dout, out, lse, qkv, panels, strips):
    # dqkv (B*T, 3*C), written; dout, out (B*T, C); lse (B, NH, T); qkv (B*T, 3*C)
    # A head's strips add to its dk and dv in turn: first the last one, which writes all of both. Threads work on as
    # many heads as there are threads, strip by strip, so that they seldom wait for each other.
    (B, NH, T), hs = lse.shape, out.shape[1] // lse.shape[1]
    scale, parts = ONE / np.sqrt(np.float32(hs)), (T + STRIP - 1) // STRIP  # parts: strips of a head
    counter, finished = np.zeros(1, np.int64), np.zeros(B * NH, np.int64)
    for thread in prange(len(panels)):
        probs, dprobs = strips[thread, 0], strips[thread, 1]
        item = take(counter, 1)
        while item < parts * B * NH:
            first = item // (parts * len(panels)) * len(panels)
            part, head = divmod(item - parts * first, min(len(panels), B * NH - first))
            (b, h), t0, t1 = divmod(first + head, NH), (parts - 1 - part) * STRIP, min(T, (parts - part) * STRIP)
            (q, k, v), (dq, dk, dv) = heads(qkv, b, h, T, hs), heads(dqkv, b, h, T, hs)
            y = out[b * T + t0:b * T + t1, h * hs:(h + 1) * hs]
            dy = dout[b * T + t0:b * T + t1, h * hs:(h + 1) * hs]
            att, datt = probs[:t1 - t0, :t1], dprobs[:t1 - t0, :t1]
            # pass 3 and 2 again: the probabilities, from the scores and the log-sum-exp; and backward pass 4
            tile_product(att, q[t0:t1], k[:t1].T, False, panels[thread], SCORES, t0)
            tile_product(datt, dy, v[:t1].T, False, panels[thread], SCORES, t0)
            for t in range(t0, t1):
                p, dp, log_sum = probs[t - t0], dprobs[t - t0], lse[b, h, t]
                total = ZERO
                for i in range(hs):
                    total += dy[t - t0, i] * y[t - t0, i]  # = the sum of p * dp over the row
                for t2 in range(t + 1):
                    p[t2] = exp(p[t2] * scale - log_sum)
                    dp[t2] = p[t2] * (dp[t2] - total) * scale  # backward passes 3 and 2: dscores
                p[t + 1:t1], dp[t + 1:t1] = ZERO, ZERO
            # backward pass 1, and the values' part of pass 4
            tile_product(dq[t0:t1], datt, k[:t1], False, panels[thread], LOWER, t0)
            while take(finished[first + head:], 0) < part:
                pass
            for t2 in range(0, t1, MC):
                rows = slice(t2, min(t1, t2 + MC))
                tile_product(dk[rows], datt[:, rows].T, q[t0:t1], t1 < T, panels[thread], UPPER, t2 - t0)
                tile_product(dv[rows], att[:, rows].T, dy, t1 < T, panels[thread], UPPER, t2 - t0)
            take(finished[first + head:], 1)
            item = take(counter, 1)


# ---------------------------------------------------------------------------------------------------------------------
# gelu (Hendrycks & Gimpel 2016), the tanh approximation: x * (1 + tanh(u)) / 2 = x / (1 + exp(-2u))

@inner
def gelu(x):
    u = GELU_SCALE * (x + GELU_CUBIC * x * x * x)
    return ZERO if u < GELU_ZERO else x / (ONE + exp(-TWO * u))


@kernel
def gelu_forward(out, inp):
    # out, inp (B*T, 4*C). The forward pass has this fused into matmul_forward; the backward pass computes it again.
    for bt in prange(len(inp)):
        x, y = inp[bt], out[bt]
        for i in range(x.size):
            y[i] = gelu(x[i])


@kernel
def gelu_backward(dinp, inp):
    # dinp, inp (B*T, 4*C); dinp holds the gradient of the output and becomes that of the input
    for bt in prange(len(inp)):
        x, dx = inp[bt], dinp[bt]
        for i in range(x.size):
            u = GELU_SCALE * (x[i] + GELU_CUBIC * x[i] * x[i] * x[i])
            du = GELU_SCALE * (ONE + THREE * GELU_CUBIC * x[i] * x[i])
            s = ZERO if u < GELU_ZERO else ONE / (ONE + exp(-TWO * u))
            dx[i] *= s + x[i] * TWO * s * (ONE - s) * du  # gelu = x s, and the derivative of s is 2 s (1 - s) du


# ---------------------------------------------------------------------------------------------------------------------
# classifier: softmax and cross-entropy in one pass over a chunk of rows, so that logits are never kept whole

CLASSIFIER_ROWS = 1024


@kernel
def fused_classifier(logits, losses, targets, dloss, V):
    # logits (R, Vp), replaced by their gradients; losses, targets (R,); dloss: the gradient of each loss
    # Columns V ... Vp are padding: no token has their number, so they take no part and their gradient is 0.
    for r in prange(len(logits)):
        x = logits[r, :V]
        target = x[targets[r]]
        largest, total = exponentials(x, ONE)
        losses[r] = np.log(total) - (target - largest)
        scale = dloss / total
        for i in range(V):
            x[i] *= scale
        x[targets[r]] -= dloss
        logits[r, V:] = ZERO


# ---------------------------------------------------------------------------------------------------------------------
# AdamW (Loshchilov & Hutter 2019) and the norm of the gradients

BLOCK = 1 << 14  # parameters that a thread takes at a time: 64 kB of each of the four arrays


@kernel
def sum_of_squares(x):
    blocks = (x.size + BLOCK - 1) // BLOCK
    partial = np.empty(blocks, np.float64)
    for block in prange(blocks):
        total = ZERO
        y = x[block * BLOCK:(block + 1) * BLOCK]
        for i in range(y.size):
            total += y[i] * y[i]
        partial[block] = total
    return partial


@kernel
def adamw_update(params, grads, m, v, lr, beta1, beta2, correction1, correction2, eps, weight_decay, grad_scale):
    # params, grads, m, v: flat arrays of the same size; all the others, such as the learning rate lr, are float32
    for block in prange((params.size + BLOCK - 1) // BLOCK):
        i0, i1 = block * BLOCK, min(params.size, (block + 1) * BLOCK)
        p, g, m1, v1 = params[i0:i1], grads[i0:i1], m[i0:i1], v[i0:i1]
        for i in range(p.size):
            grad = g[i] * grad_scale
            m1[i] = beta1 * m1[i] + (ONE - beta1) * grad
            v1[i] = beta2 * v1[i] + (ONE - beta2) * grad * grad
            step = m1[i] * correction1 / (np.sqrt(v1[i] * correction2) + eps)
            p[i] -= lr * (step + weight_decay * p[i])


# ---------------------------------------------------------------------------------------------------------------------
# the model: its shape, its tensors, its weights, forward, backward, update

LAYER_TENSORS = ("ln1", "ln1_mean", "ln1_rstd", "qkv", "atty", "lse", "residual2",
                 "ln2", "ln2_mean", "ln2_rstd", "fch", "fch_gelu", "residual3")


def activation_table(config, B, T, recompute=1, train=True):
    """(name, shape) of what a forward pass leaves for the backward pass, and of the gradients that layers share.

    recompute: 0 keeps all activations; the backward pass computes with 1 GELU's output again, with 2 LayerNorm's too.
    """
    Vp, L, NH, C, BT = config.padded_vocab_size, config.num_layers, config.num_heads, config.channels, B * T
    L = L if train else 1  # evaluation and sampling need one layer's activations at a time
    gelus, norms = L if recompute < 1 else 1, L if recompute < 2 else 1
    table = [
        ("encoded", (BT, C)),
        ("ln1", (norms, BT, C)), ("ln1_mean", (L, BT)), ("ln1_rstd", (L, BT)),
        ("qkv", (L, BT, 3 * C)), ("atty", (L, BT, C)), ("lse", (L, B, NH, T)), ("residual2", (L, BT, C)),
        ("ln2", (norms, BT, C)), ("ln2_mean", (L, BT)), ("ln2_rstd", (L, BT)),
        ("fch", (L, BT, 4 * C)), ("fch_gelu", (gelus, BT, 4 * C)), ("residual3", (L, BT, C)),
        ("lnf", (BT, C)), ("lnf_mean", (BT,)), ("lnf_rstd", (BT,)),
        ("logits", (min(BT, CLASSIFIER_ROWS), Vp)), ("losses", (BT,)),
    ]
    if train:  # gradients of activations: of the residual stream, and of one layer's insides
        table += [("dresidual", (BT, C)), ("dbtc", (BT, C)), ("dqkv", (BT, 3 * C)), ("dfch", (BT, 4 * C))]
    return table


def scratch_table(config, B, T, panel_type):
    """(name, shape) of the kernels' scratch memory. A thread's part is a multiple of a cache line."""
    threads, C, words = numba.get_num_threads(), config.channels, 0
    if AMX and panel_type == np.uint32 and B * T > MC:  # what the largest layer packs in its backward pass, padded
        words = (B * T + 64) * (9 * C + 128) // 2 + (4 * C + 64) * (C + 64) // 2
        words = max(words, min(4 * words, 1 << 24))  # 64 MB are room for changing places
    each = max(PANELS, words // threads // 16 * 16 + 16)
    return [("panels", (threads, each)), ("strips", (threads, 2, STRIP, T + STRIP_GAP))]


def memory_plan(config, B, T, recompute=1, train=True, panel_type=np.float32):
    """The bytes that a run needs besides those of Python, before anything is allocated: {what: bytes}"""
    copies = 4 if train else 1  # parameters, gradients, m, v
    return {
        "parameters": 4 * size_of(parameter_table(config)) * copies,
        "activations": 4 * size_of(activation_table(config, B, T, recompute, train)),
        "scratch": 4 * size_of(scratch_table(config, B, T, panel_type)),
        "keys and values": 8 * config.num_layers * config.max_seq_len * config.channels,
    }


def read_checkpoint(path, params):
    """Read all parameters from a checkpoint, version 3 (float32) or 5 (bfloat16), that model_config has checked."""
    with open(path, "rb") as file:
        if read_header(file, path, MODEL_MAGIC, (3, 5))[1] == 3:
            file.readinto(params.memory.view(np.uint8))
        else:
            for chunk in np.array_split(params.memory.view(np.uint32), 1 + (params.memory.size >> 22)):
                chunk[:] = np.fromfile(file, np.uint16, chunk.size).astype(np.uint32) << 16  # a float32's upper half
    require_numbers(path, "the model", params.memory)


def build(name, device="cpu", precision=None, processes=ALONE, **options):
    """An engine, see dev/run/engine.py, that holds the model of a checkpoint file, or random weights for a descriptor.

    device: cpu, or another engine by the name of its module in dev/engine. precision: fp32, bf16; None = the engine's
    own choice. options: the engine's. Nothing is read, drawn or allocated before it is needed; errors: model_config's.
    """
    name = model_file(name)
    config = model_config(name)
    weights = functools.partial(*(read_checkpoint, name) if is_checkpoint(name) else (init_random, config))
    engine = GPT2 if device == "cpu" else importlib.import_module(f"dev.engine.{device}").GPT2
    return engine(config, parameter_table(config), weights, precision, processes, **options)


class GPT2(Engine):
    """The engine for CPUs: a GPT-2 and everything it needs to train, in NumPy arrays. See dev/run/engine.py.

    Train with `loss = model.forward(inputs, targets)`, `model.backward()`, `model.update(step, learning_rate)`; call
    the first two several times before the third to accumulate the gradients of several micro-batches.

    weights: fills the parameters, see build(). matmul: who multiplies: `numba`, `blas`, or `auto`, what is faster here.
    """

    def __init__(self, config, table=None, weights=None, precision=None, processes=ALONE, matmul="auto"):
        super().__init__(config, table or parameter_table(config), processes)
        self.precision = precision or "fp32"
        bf16 = np.uint32 if PAIRS and (not AMX or allow_amx()) else np.int32  # what this machine multiplies
        self.panel_type = np.dtype(bf16 if self.precision == "bf16" else np.float32)
        start_threads(threads_of(processes))
        self.moments = processes.moments(self.table)
        self.weights, self.recompute = weights, 1
        self.grads = self.m = self.v = self.acts = self.acts_key = None
        self.keys = self.values = None  # of the tokens that read() has read
        self.blas = name_of_blas(matmul, self.precision)
        by_blas = functools.partial(blas_forward, gelu_forward), blas_backward
        forward, backward = by_blas if self.blas else (matmul_forward, matmul_backward)
        self.kernels = SimpleNamespace(**OTHER_KERNELS, matmul_forward=forward, matmul_backward=backward)

    @classmethod
    def build(cls, name):
        """A model from a checkpoint file, or with random weights from a descriptor: build() for notebooks"""
        return build(name)

    @functools.cached_property
    def params(self):
        """The parameters, read or drawn when something first asks for them: a mistake costs no time"""
        params = Tensors(aligned(self.num_parameters), self.table)
        if self.weights:
            self.weights(params)
        return params

    def describe(self):
        ours = f"Numba, {MR} x {NR} micro-kernel, {VL * 32}-bit vectors"
        if self.precision == "bf16":
            unit = "float32 products" if self.panel_type == np.int32 else "AMX" if AMX else "AVX512-BF16"
            ours = f"Numba, bfloat16 by {unit}"
        product = f"NumPy's BLAS ({self.blas})" if self.blas else ours
        threads = numba.get_num_threads()  # starts them, which settles the threading layer
        return [f"threads: {threads} ({numba.threading_layer()}) | matrix product: {product}"]

    def prepare(self, B, T, recompute=1, train=True):
        self.check_order("prepare")
        self.check_shape(B, T)
        plan = memory_plan(self.config, B, T, recompute, train, self.panel_type)
        plan["parameters"] -= 8 * (self.num_parameters - size_of(self.moments)) if train else 0
        require_memory(sum(plan.values()))
        start = time.perf_counter()
        load_kernels(run_kernels, self.precision, self.processes)
        self.processes.print(f"kernels: ready after {time.perf_counter() - start:.1f} s")
        plan["Python and kernels"] = peak_memory()
        self.recompute, self.num_activations = recompute, plan["activations"] // 4
        self.host("params")  # which are read or drawn now, and in no step
        self.allocate(B, T, train)
        return plan

    def peak(self):
        if self.acts is None:
            raise ValueError("nothing can be measured before prepare()")
        self.acts.panels.fill(0)
        return measure_peak(self.acts.panels)

    def allocate(self, B, T, train):
        """Have room for a batch of (B, T) tokens. What was allocated before is used again if it is large enough."""
        key = B, T, train, self.recompute, numba.get_num_threads()
        if self.acts_key == key:
            return
        table = scratch_table(self.config, B, T, self.panel_type)
        table += activation_table(self.config, B, T, self.recompute, train)
        if self.acts is None or size_of(table) > self.acts.memory.size:
            self.acts = None
            self.acts = Tensors(aligned(size_of(table)), table)
        self.acts, self.acts_key = Tensors(self.acts.memory, table), key
        self.acts.panels = self.acts.panels.view(self.panel_type)
        if train and self.grads is None:
            self.grads = Tensors(aligned(self.num_parameters), self.table)
            self.m, self.v = (Tensors(aligned(size_of(self.moments), np.zeros), self.moments) for _ in range(2))

    def layer(self, l):
        """Layer l's activations: its part of the tensors in LAYER_TENSORS, some of which all layers share"""
        tensors = ((name, getattr(self.acts, name)) for name in LAYER_TENSORS)
        return SimpleNamespace(**{name: x[l % len(x)] for name, x in tensors})

    def forward(self, inputs, targets=None, train=True):
        self.check_order("forward")
        inputs, targets = self.check_batch(inputs, targets)
        train = train and targets is not None
        self.allocate(*inputs.shape, train)
        acts, self.inputs, self.rows = self.acts, inputs, inputs.size
        self.scored = None if targets is None else inputs.shape

        def attention(l, at):
            self.kernels.attention_forward(at.atty, at.lse, at.qkv, acts.panels, acts.strips)
        self.blocks(inputs, 0, attention)
        self.pending = train
        return None if targets is None else self.classify(targets.ravel(), train)

    def blocks(self, inputs, start, attention):
        """From tokens (B, T), the first of which are at position `start`, to the final LayerNorm's output, acts.lnf.
        attention(l, at) has layer l's at.qkv and leaves its at.atty."""
        p, acts, k, panels = self.params, self.acts, self.kernels, self.acts.panels
        k.encoder_forward(acts.encoded, inputs, p.wte, p.wpe, start)
        residual = acts.encoded
        for l in range(self.config.num_layers):
            at = self.layer(l)
            k.layernorm_forward(at.ln1, at.ln1_mean, at.ln1_rstd, residual, p.ln1w[l], p.ln1b[l])
            k.matmul_forward(at.qkv, NOTHING, at.ln1, p.qkvw[l], p.qkvb[l], NOTHING, panels)
            attention(l, at)
            k.matmul_forward(at.residual2, NOTHING, at.atty, p.attprojw[l], p.attprojb[l], residual, panels)
            k.layernorm_forward(at.ln2, at.ln2_mean, at.ln2_rstd, at.residual2, p.ln2w[l], p.ln2b[l])
            k.matmul_forward(at.fch, at.fch_gelu, at.ln2, p.fcw[l], p.fcb[l], NOTHING, panels)
            k.matmul_forward(at.residual3, NOTHING, at.fch_gelu, p.fcprojw[l], p.fcprojb[l], at.residual2, panels)
            residual = at.residual3
        k.layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, residual, p.lnfw, p.lnfb)

    def classify(self, targets, train):
        """The mean cross-entropy of all rows of acts.lnf; if `train`, its gradients dlnf and dwte. Chunk by chunk"""
        p, g, acts, k = self.params, self.grads, self.acts, self.kernels
        BT = len(acts.lnf)
        for start in range(0, BT, CLASSIFIER_ROWS):
            rows = slice(start, min(BT, start + CLASSIFIER_ROWS))
            logits, lnf = acts.logits[:rows.stop - start], acts.lnf[rows]
            k.matmul_forward(logits, NOTHING, lnf, p.wte, NOTHING[0], NOTHING, acts.panels)
            k.fused_classifier(logits, acts.losses[rows], targets[rows], np.float32(1 / BT), self.config.vocab_size)
            if train:
                adding = self.micro_batches > 0 or start > 0
                k.matmul_backward(acts.dbtc[rows], g.wte, NOTHING[0], logits, lnf, p.wte, adding, acts.panels)
        return float(acts.losses.mean(dtype=np.float64))

    def losses(self):
        self.check_scored()
        return self.acts.losses.reshape(self.scored)

    def logits(self, row):
        self.check_row(row)
        out, lnf, panels = self.acts.logits[:1], self.acts.lnf[row:row + 1], self.acts.panels
        self.kernels.matmul_forward(out, NOTHING, lnf, self.params.wte, NOTHING[0], NOTHING, panels)
        return out[0, :self.config.vocab_size]

    def read(self, tokens):
        self.check_order("read")
        self.check_reading(len(tokens))
        L, maxT, C, NH = (getattr(self.config, name) for name in ("num_layers", "max_seq_len", "channels", "num_heads"))
        start, end, inputs = self.tokens_read, self.tokens_read + len(tokens), self.check_tokens([tokens])
        self.allocate(1, len(tokens), train=False)
        if self.keys is None:
            self.keys, self.values = (aligned(L * maxT * C).reshape(L, maxT, C) for _ in range(2))
        acts, k = self.acts, self.kernels

        def attention(l, at):
            _, self.keys[l, start:end], self.values[l, start:end] = np.split(at.qkv, 3, axis=1)
            if start:
                k.attention_decode(at.atty[0], at.qkv[0], self.keys[l, :end], self.values[l, :end], NH)
            else:
                k.attention_forward(at.atty, at.lse, at.qkv, acts.panels, acts.strips)
        self.blocks(inputs, start, attention)
        self.tokens_read, self.rows, self.scored = end, len(tokens), None
        return self.logits(len(tokens) - 1)

    def backward(self, last=True):
        self.check_order("backward")
        p, g, acts, k, panels = self.params, self.grads, self.acts, self.kernels, self.acts.panels
        add = self.micro_batches > 0  # on the first micro-batch gradients are written, so nothing need be zeroed
        dresidual, dbtc, dqkv, dfch = acts.dresidual, acts.dbtc, acts.dqkv, acts.dfch
        dresidual.fill(0)
        inp = acts.residual3[-1]
        k.layernorm_backward(dresidual, g.lnfw, g.lnfb, dbtc, inp, p.lnfw, acts.lnf_mean, acts.lnf_rstd, add)
        # wte has the classifier's part, which is summed meanwhile. The encoder's part follows as the rows of all
        # processes, where they are fewer than those of wte: 124M's wte is a third of the model, and final at the end.
        rows = self.processes.size * len(dresidual) <= len(g.wte)
        early = [g.wte, g.wpe][:1 + add] if rows else []
        if last:
            self.processes.reduce([g.lnfw, g.lnfb, *early])
        for l in reversed(range(self.config.num_layers)):
            at = self.layer(l)
            inp, middle = acts.residual3[l - 1] if l > 0 else acts.encoded, at.residual2  # what LayerNorm 1 and 2 read
            if self.recompute >= 1:
                k.gelu_forward(at.fch_gelu, at.fch)
            k.matmul_backward(dfch, g.fcprojw[l], g.fcprojb[l], dresidual, at.fch_gelu, p.fcprojw[l], add, panels)
            k.gelu_backward(dfch, at.fch)
            if self.recompute >= 2:
                k.layernorm_forward(at.ln2, at.ln2_mean, at.ln2_rstd, middle, p.ln2w[l], p.ln2b[l])
            k.matmul_backward(dbtc, g.fcw[l], g.fcb[l], dfch, at.ln2, p.fcw[l], add, panels)
            stats = at.ln2_mean, at.ln2_rstd
            k.layernorm_backward(dresidual, g.ln2w[l], g.ln2b[l], dbtc, middle, p.ln2w[l], *stats, add)
            k.matmul_backward(dbtc, g.attprojw[l], g.attprojb[l], dresidual, at.atty, p.attprojw[l], add, panels)
            k.attention_backward(dqkv, dbtc, at.atty, at.lse, at.qkv, panels, acts.strips)
            if self.recompute >= 2:
                k.layernorm_forward(at.ln1, at.ln1_mean, at.ln1_rstd, inp, p.ln1w[l], p.ln1b[l])
            k.matmul_backward(dbtc, g.qkvw[l], g.qkvb[l], dqkv, at.ln1, p.qkvw[l], add, panels)
            stats = at.ln1_mean, at.ln1_rstd
            k.layernorm_backward(dresidual, g.ln1w[l], g.ln1b[l], dbtc, inp, p.ln1w[l], *stats, add)
            if last:
                self.processes.reduce([getattr(g, name)[l] for name, _ in self.table if name not in NO_LAYERS])
        parts = dresidual, self.inputs
        if last and rows:
            parts = map(self.processes.together, parts)
        k.encoder_backward(g.wte, g.wpe, *parts, add)
        if last and not rows:
            self.processes.reduce([g.wte, g.wpe])
        self.micro_batches += 1
        self.pending = False

    def grad_norm(self):
        self.check_order("grad_norm")
        self.processes.wait()
        total = self.kernels.sum_of_squares(self.grads.memory).sum()
        return math.sqrt(total) / (self.micro_batches * self.processes.size)

    def update(self, step, learning_rate, *, norm=None, grad_clip=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
               weight_decay=0.0):
        self.check_order("update")
        norm = self.grad_norm() if norm is None else norm
        clip = grad_clip / norm if 0 < grad_clip < norm else 1.0
        t = step + 1
        for name, _ in self.table:
            scalars = [np.float32(x) for x in (
                learning_rate, beta1, beta2, 1 / (1 - beta1**t), 1 / (1 - beta2**t), eps,
                weight_decay if name in DECAYED else 0, clip / (self.micro_batches * self.processes.size))]
            p, g, m, v = (getattr(tensors, name) for tensors in (self.params, self.grads, self.m, self.v))
            p, g = (x[None] if name in NO_LAYERS else x for x in (p, g))
            shares = (list(m), list(v)) if self.processes.zero_stage else ([m], [v])
            for piece in zip(self.processes.pieces(p), self.processes.pieces(g), *shares):
                self.kernels.adamw_update(*(x.ravel() for x in piece), *scalars)
            self.processes.gather(p)
        self.processes.wait()
        self.micro_batches = 0

    def host(self, what):
        if what != "params" and self.grads is None:
            raise ValueError(f"{what} does not exist before a step for training\n---> HINT: call prepare(B, T) first")
        return getattr(self, what)


# ---------------------------------------------------------------------------------------------------------------------
# all kernels together: the peak that they are measured by, their threads, and compiling them before a run

OTHER_KERNELS = {function.__name__: function for function in (
    encoder_forward, encoder_backward, layernorm_forward, layernorm_backward, attention_forward, attention_decode,
    attention_backward, gelu_forward, gelu_backward, fused_classifier, sum_of_squares, adamw_update)}


@kernel
def multiply_in_cache(panels, repeats):
    # the micro-kernel on panels that stay in the L1 cache: what MFU calls 100 %
    for thread in prange(len(panels)):
        C, depth = np.empty((panel_rows(panels), NR), np.float32), panel_depth(panels)
        use_tiles(panels, True)
        for _ in range(repeats):
            micro(C, panels[thread], panels[thread, MC * depth:], depth, False, False)
        use_tiles(panels, False)


def measure_peak(panels):
    """This machine's FLOP/s on all threads, in the precision of panels (threads, PANELS), scratch memory: the best of
    many short loops, since neighbours may disturb some of them. NaN in plain Python"""
    if numba.config.DISABLE_JIT:
        return math.nan
    pairs, repeats = panels.dtype == np.uint32, 4000
    rows, depth = (AMX_ROWS, AMX_KC) if AMX and pairs else (MR, KC)
    return len(panels) * repeats * 2 * rows * NR * depth * (1 + pairs) / shortest(multiply_in_cache, panels, repeats)


def run_kernels(precision, attention_first=False):
    """Run every kernel once, on a model that is as small as can be: then it has been compiled or found in the cache.
    attention_first: begin with the attention, else with the products, for two processes that share the compiling"""
    draw(precision)
    model = GPT2(GPT2Config(4, 5, 128, 1, 1, 16), precision=precision, matmul="numba")
    model.params.memory.fill(0)
    model.allocate(1, 3, True)
    tokens, acts, at = np.array([[1, 2, 3]], np.int32), model.acts, model.layer(0)
    acts.memory.fill(0)
    if attention_first:
        attention_forward(at.atty, at.lse, at.qkv, acts.panels, acts.strips)
        attention_backward(acts.dqkv, acts.dbtc, at.atty, at.lse, at.qkv, acts.panels, acts.strips)
    else:
        model.classify(tokens[0], True)
    model.read([1, 2])
    model.read([3])
    model.forward(tokens, tokens)
    model.backward()
    model.update(0, 1e-4)
    multiply_in_cache(acts.panels, 1)


# ---------------------------------------------------------------------------------------------------------------------
# data loader: batches of tokens from shards

class DataLoader:
    """Batches of (B, T) tokens from one or several shards, in llm.c's order.

    A shard is cut into samples of B*T tokens. Shuffled, each epoch visits the shards in a random order and the samples
    of each shard in a random order. Shards may have any size; one that is too small for a sample is passed over. What
    cannot be trained on is a DamagedBatch, after which the next one can be had. A loader that goes on where another was
    keeps its samples: batches of another size take the same tokens in the same order.

    pattern: a file name, or a glob pattern; what exists is taken literally. vocab_size: a token beyond it is an error.
    Raises FileNotFoundError where nothing matches, ValueError for a damaged file or too little data for one batch.
    """

    def __init__(self, pattern, B, T, should_shuffle=False, vocab_size=None):
        if B < 1 or T < 1:
            raise ValueError(f"batch size and sequence length must be at least 1, not {B} and {T}")
        self.B, self.T, self.vocab_size, self.sample_tokens = B, T, vocab_size, B * T
        self.files = find_shards(pattern)
        self.shard_tokens, self.shard = [tokens_in(path, vocab_size) for path in self.files], None
        self.num_tokens = sum(self.shard_tokens)
        self.samples = samples_of(B * T, self.shard_tokens)
        self.num_batches = sum(self.samples)
        if not self.num_batches:
            raise ValueError(f"{pattern}: no shard has the {B * T + 1:,} tokens of a batch; the largest has "
                             f"{max(self.shard_tokens):,}\n---> HINT: use a smaller -b or -t")
        self.random = np.random.RandomState(42) if should_shuffle else None
        self.shard_order = np.arange(len(self.files), dtype=np.int32)
        self.reset()

    def reset(self):
        """Begin an epoch"""
        if self.random:
            shuffle(self.shard_order, self.random)
        self.open_shard(0)

    def open_shard(self, index, order=None):
        """Go to the start of the shard that is number `index` in this epoch. order: of its samples; None: a new one"""
        self.shard_index, self.taken = index, 0  # taken: tokens of this shard that were in batches
        number = self.shard_order[index]
        if self.shard:
            self.shard.close()
        self.shard = Shard(self.files[number], self.shard_tokens[number], self.vocab_size)
        self.sample_order = range(self.samples[number]) if order is None else order
        if self.random and order is None:
            self.sample_order = shuffle(np.arange(len(self.sample_order), dtype=np.int32), self.random)
            self.generator = self.random.get_state()[1:3]  # key and position, until the next shard

    def pieces(self, left):
        """Go on by so many tokens. Yields (the first one's position, how many) for each sample that they are of."""
        while left:
            while self.taken >= len(self.sample_order) * self.sample_tokens:
                if self.shard_index + 1 < len(self.files):
                    self.open_shard(self.shard_index + 1)
                else:
                    self.reset()
            sample, offset = divmod(self.taken, self.sample_tokens)
            count = min(left, self.sample_tokens - offset)
            self.taken, left = self.taken + count, left - count
            yield int(self.sample_order[sample]) * self.sample_tokens + offset, count

    def next_batch(self, read=True):
        """The next (inputs, targets), (B, T) int32; targets are inputs one token later. read: False passes it over."""
        parts, damage = [], None
        for start, count in self.pieces(self.B * self.T):  # one, where a batch is a sample
            try:
                parts += [self.shard.read(start, count + 1)] if read else []
            except DamagedBatch as error:  # the batch's other pieces are passed over
                damage = error
        if damage:
            raise damage
        if read:
            inputs, targets = np.concatenate([(part[:-1], part[1:]) for part in parts], axis=1, dtype=np.int32)
            return inputs.reshape(self.B, self.T), targets.reshape(self.B, self.T)

    def state(self):
        """Where this loader is, for restore(): numbers, and where it shuffles the present orders and its generator"""
        state = {"shard_index": self.shard_index, "taken": self.taken, "sample_tokens": self.sample_tokens}
        if self.random:
            state |= {"shard_order": self.shard_order.copy(), "sample_order": self.sample_order,
                      "generator": self.generator}
        return state

    def restore(self, state):
        """Go to where state() was called, perhaps in batches of another size. ValueError where it is not a state of
        these shards, or where the T tokens of a sequence would come from two samples"""
        check_state(state, self.shard_tokens, self.T, self.random is not None)
        self.sample_tokens = state["sample_tokens"]
        self.samples = samples_of(self.sample_tokens, self.shard_tokens)
        self.shard_order = np.array(state.get("shard_order", self.shard_order))
        self.open_shard(state["shard_index"], state.get("sample_order"))
        self.taken = state["taken"]
        if self.random:
            self.generator = state["generator"]
            self.random.set_state(("MT19937", *self.generator))


# ---------------------------------------------------------------------------------------------------------------------
# the training loop

def train(flags, processes=ALONE):
    """Train a model as the flags say: once in a while estimate how good it is, let it write, save it; then a step."""
    B, T, folder, report = flags.batch_size, flags.sequence_length, flags.output_dir, Report(flags, processes)
    resume_step, checkpoint = newest_checkpoint(folder) if flags.resume else (None, None)
    with part_of(folder, checkpoint):
        model = choose_data(flags, checkpoint or flags.model)
        engine = build(model, flags.device, flags.precision, processes, **flags.options)
    report.program(engine)

    # the data, and what else can be wrong, before anything takes time or memory
    overfit, V = bool(flags.overfit_single_batch), engine.config.vocab_size
    val_loader = largest_batches(DataLoader, flags.input_val_bin, B, T, V) if flags.val_loss_every else NO_DATA
    loader = DataLoader((flags.input_bin, flags.input_val_bin)[overfit], B, T, should_shuffle=not overfit, vocab_size=V)
    steps = loader.num_tokens // flags.total_batch_size if flags.num_iterations == -1 else flags.num_iterations
    val_batches = min(val_loader.num_batches, math.inf if flags.val_max_steps == -1 else flags.val_max_steps)
    examples = read_examples(HELLASWAG, V)[:flags.eval_examples or None] if flags.hellaswag_eval else []
    tokenizer, sampler = tokenizer_of(model, V), Sampler(flags.seed, flags.temperature, flags.top_k, flags.top_p)
    prompt = tokenizer.encode(flags.prompt) or [min(tokenizer.eot_token, V - 1)]  # after another text's end
    processes.agree(checkpoint=resume_step or 0, training_tokens=loader.num_tokens,
                    validation_tokens=val_loader.num_tokens, examples=len(examples))

    # the model, and where it left off
    with part_of(folder, checkpoint):  # which are read when they are first needed
        report.model(engine, engine.prepare(B, T, flags.recompute), loader, val_loader)
        run = Run(engine, loader, sampler, Outliers(flags.skip_update_lossz, flags.skip_update_gradz), flags.settings)
        if resume_step is not None:
            read_run_checkpoint(folder, resume_step, run)
    report.begin(run, steps, tokenizer, output := Output(flags, run))

    def checkpoint(stopping, saving, due=False):  # if it is due or has been asked for. Has a stop been asked for?
        if folder and ((stopping or saving) and output.wanted() or due):
            report.checkpoint(run.step, output.save())
            stopping = processes.any(stop.requested or stopping)
        return stopping
    stop = Stop(checkpoint, folder, processes)

    def due(every):  # at the step of a checkpoint that is resumed, all but training was done before it was written
        return every and (run.step % every == 0 or run.step >= steps) and run.resumed != (run.step, True)

    with report.profile(engine), rescued(run, output, report):
        for step in range(run.step, max(steps, run.step) + 1):
            run.begin(step)
            begun = step > 0 or steps == 0

            # once in a while estimate the validation loss, and HellaSwag's accuracy; draw a text from the model
            with run.look():
                if due(flags.val_loss_every):
                    report.validation(step, validate(engine, val_loader, stop.during(range(val_batches))))
                    if examples:
                        report.hellaswag(step, *score(engine, stop.during(examples)))
                if due(flags.sample_every) and begun:
                    report.sample(tokenizer, stop.alone(generate(engine, sampler, prompt, flags.gen_tokens - 1)))

            # once in a while write a checkpoint
            if checkpoint(*stop.asked(), due(flags.checkpoint_every) and begun) or step >= steps:
                break

            # a training step
            report.start_step()
            if overfit:
                loader.reset()
            losses = []
            for micro_batch, batch in enumerate(micro_batches(flags, loader, stop)):
                losses.append(engine.forward(*batch))
                engine.backward(last=micro_batch == flags.micro_batches - 1)
            norm = engine.grad_norm()
            loss = processes.sum(sum(map(float, losses))) / (flags.micro_batches * processes.size)
            require_finite(step, loss, norm)
            learning_rate = scheduled_learning_rate(flags, step, steps)
            run.place = None  # from here on the weights, and what is known of losses, may be those of no step
            if skip := run.outliers.far(loss, norm):
                engine.forget()
            else:
                engine.update(step, learning_rate, norm=norm, grad_clip=flags.grad_clip, beta1=flags.beta1,
                              beta2=flags.beta2, eps=flags.eps, weight_decay=flags.weight_decay)
            output.begin()
            report.step(step, loss, norm, learning_rate, run.outliers if skip else None)
    if run.step >= steps:
        output.begin()  # where there was no step
    report.end()


def main(argv=None):
    """The command line: see --help. Returns the exit status."""
    open_console()
    processes = ALONE
    try:
        flags = parse_flags(argv)
        processes = processes_of(flags)
        with own_folder(flags, processes):
            train(flags, processes)
        processes.close()
    except BAD_INPUT as error:
        return processes.fail(complaint(error), 1)
    except KeyboardInterrupt:
        return processes.fail("stopped", 130)
    return 0


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # the name by which cached kernels know this module
    sys.exit(main())
