"""
The kernels of the engine for NVIDIA GPUs, by Numba's CUDA target: all of a training step but its matrix products and
cuDNN's attention. Layers stand in the order of the model, each backward pass below its forward pass.

Each kernel does its sums in float32 and in a fixed order, without atomics: the same bits in every run. Arrays are flat
and either float32 or bfloat16; a bfloat16 array is one of uint16 here, since Numba has no such type for arrays. Sizes
are int64, and all that is a number of channels is a multiple of 8: a thread moves 16 bytes at a time.
"""
import math
import operator

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic, models, overload, register_model

F32, BF16 = np.dtype(np.float32), np.dtype(np.uint16)
ZERO, HALF, ONE, TWO = (np.float32(x) for x in (0, 0.5, 1, 2))
LOG2E, LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
LOWEST, INFINITY, LAYERNORM_EPS = np.float32(-3e38), np.float32(np.inf), np.float32(1e-5)
GELU_SCALE, GELU_CUBIC = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)

# ---------------------------------------------------------------------------------------------------------------------
# Vec8: eight float32 numbers in registers, from one or two 16-byte loads. It is LLVM's <8 x float>.

f32, i32 = ir.FloatType(), ir.IntType(32)
v8f32, v4f32, v4i32, v8i32 = ir.VectorType(f32, 8), ir.VectorType(f32, 4), ir.VectorType(i32, 4), ir.VectorType(i32, 8)
LANES = ir.Constant(v8i32, list(range(8)))
TF32 = "{.reg .b32 x; cvt.rna.tf32.f32 x, $1; mov.b32 $0, x;}"  # rounds to the 10 bits that the tensor cores read


class Vec8(types.Type):
    def __init__(self):
        super().__init__(name="Vec8")


vec8 = Vec8()


@register_model(Vec8)
class Vec8Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, v8f32)


def pointer(context, builder, array_type, array, index, vector, n=0):
    """The address of array[index], as that of the nth of several vectors"""
    data = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    return builder.gep(builder.bitcast(data, vector.as_pointer()), [ir.Constant(i32, n)])


def splat(builder, x, n=8):
    vector = builder.insert_element(ir.Constant(ir.VectorType(x.type, n), ir.Undefined), x, ir.Constant(i32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(i32, n), [0] * n))


@intrinsic
def load(typingctx, array, index):
    """array[index:index+8] as float32; index is a multiple of 8"""
    def codegen(context, builder, sig, args):
        at = lambda vector, n=0: builder.load(pointer(context, builder, sig.args[0], *args, vector, n), align=16)
        if sig.args[0].dtype == types.float32:
            return builder.shuffle_vector(at(v4f32), at(v4f32, 1), LANES)
        pairs = at(v4i32)  # a bfloat16 is the upper half of a float32
        low = builder.shl(pairs, ir.Constant(v4i32, [16] * 4))
        high = builder.and_(pairs, ir.Constant(v4i32, [0xffff0000] * 4))
        return builder.bitcast(builder.shuffle_vector(low, high, ir.Constant(v8i32, [0, 4, 1, 5, 2, 6, 3, 7])), v8f32)
    return vec8(array, types.int64), codegen


@intrinsic
def store(typingctx, array, index, x):
    """array[index:index+8] = x, rounded to nearest for a bfloat16 array"""
    def codegen(context, builder, sig, args):
        array, index, x = args
        to = lambda value, n=0: builder.store(
            value, pointer(context, builder, sig.args[0], array, index, value.type, n), align=16)
        lane = lambda k: builder.extract_element(x, ir.Constant(i32, k))
        if sig.args[0].dtype == types.float32:
            for n in range(2):
                to(builder.shuffle_vector(x, x, ir.Constant(v4i32, list(range(4 * n, 4 * n + 4)))), n)
        else:
            convert = ir.InlineAsm(ir.FunctionType(i32, [f32, f32]), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
            pairs = ir.Constant(v4i32, ir.Undefined)
            for k in range(4):
                pair = builder.call(convert, [lane(2 * k), lane(2 * k + 1)])
                pairs = builder.insert_element(pairs, pair, ir.Constant(i32, k))
            to(pairs)
        return context.get_dummy_value()
    return types.void(array, types.int64, vec8), codegen


def vector_operator(op, instruction):
    @intrinsic
    def calculate(typingctx, x, y):
        def codegen(context, builder, sig, args):
            x, y = (value if t == vec8 else splat(builder, context.cast(builder, value, t, types.float32))
                    for value, t in zip(args, sig.args))
            return getattr(builder, instruction)(x, y, flags=("contract",))
        return vec8(x, y), codegen

    @overload(op)
    def vector_op(x, y):
        if vec8 in (x, y):
            return lambda x, y: calculate(x, y)


for op, instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                        (operator.truediv, "fdiv"), (operator.iadd, "fadd")):
    vector_operator(op, instruction)


def elementwise(instruction):
    """A PTX instruction for each of the eight numbers"""
    @intrinsic
    def calculate(typingctx, x):
        def codegen(context, builder, sig, args):
            out, asm = ir.Constant(v8f32, ir.Undefined), ir.InlineAsm(ir.FunctionType(f32, [f32]), instruction, "=f,f")
            for k in range(8):
                y = builder.call(asm, [builder.extract_element(args[0], ir.Constant(i32, k))])
                out = builder.insert_element(out, y, ir.Constant(i32, k))
            return out
        return vec8(vec8), codegen
    return calculate


def reduction(combine):
    """Eight numbers to one, by pairs"""
    @intrinsic
    def calculate(typingctx, x):
        def codegen(context, builder, sig, args):
            x = [builder.extract_element(args[0], ir.Constant(i32, k)) for k in range(8)]
            while len(x) > 1:
                x = [combine(builder, a, b) for a, b in zip(x[::2], x[1::2])]
            return x[0]
        return types.float32(vec8), codegen
    return calculate


exp2, sqrt = elementwise("ex2.approx.ftz.f32 $0, $1;"), elementwise("sqrt.rn.f32 $0, $1;")
tf32 = elementwise(TF32)
total = reduction(lambda builder, a, b: builder.fadd(a, b))
largest = reduction(lambda builder, a, b: builder.call(
    ir.InlineAsm(ir.FunctionType(f32, [f32, f32]), "max.NaN.f32 $0, $1, $2;", "=f,f,f"), [a, b]))


@intrinsic
def keep(typingctx, x, begin, end, other):
    """x where begin <= lane < end, else `other`"""
    def codegen(context, builder, sig, args):
        begin, end = (splat(builder, builder.trunc(value, i32)) for value in args[1:3])
        inside = builder.and_(builder.icmp_signed(">=", LANES, begin), builder.icmp_signed("<", LANES, end))
        return builder.select(inside, args[0], splat(builder, args[3]))
    return vec8(vec8, types.int64, types.int64, types.float32), codegen


@intrinsic
def vector(typingctx, x):
    """Eight times the same number"""
    return vec8(types.float32), lambda context, builder, sig, args: splat(builder, args[0])


# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of compiled function, and sums over a warp and a block

kernel = cuda.jit(cache=True)
device = cuda.jit(device=True, cache=True)


@device
def warp_sum(x):
    for distance in (16, 8, 4, 2, 1):
        x += cuda.shfl_xor_sync(0xffffffff, x, distance)
    return x


@device
def warp_max(x):
    for distance in (16, 8, 4, 2, 1):
        x = max(x, cuda.shfl_xor_sync(0xffffffff, x, distance))
    return x


@device
def block_sum(x, shared, thread, threads):
    # the sum over the block's threads (whole warps), in all of them. shared: (32,), not used since the last barrier
    x = warp_sum(x)
    if thread % 32 == 0:
        shared[thread // 32] = x
    cuda.syncthreads()
    return warp_sum(shared[thread % 32] if thread % 32 < threads // 32 else ZERO)


@device
def block_max(x, shared, thread, threads):
    x = warp_max(x)
    if thread % 32 == 0:
        shared[thread // 32] = x
    cuda.syncthreads()
    return warp_max(shared[thread % 32] if thread % 32 < threads // 32 else LOWEST)


# ---------------------------------------------------------------------------------------------------------------------
# encoder: token embedding plus position embedding

@kernel
def encoder_forward(out, inp, wte, wpe, place, T, C):
    # out (B*T, C) = wte[inp] + wpe[place[0] + t]; a row of threads for a token, 8 channels each
    bt, c = np.int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    if c < C and bt < inp.size:
        token, position = np.int64(inp[bt]), bt % T + place[0]
        store(out, bt * C + c, load(wte, token * C + c) + load(wpe, position * C + c))


@kernel
def wpe_backward(dwpe, dout, B, T, C, add):
    # dwpe (maxT, C) (+)= the sum of dout (B*T, C) over sequences; zeros where positions are longer than sequences
    t, c = np.int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    if c < C and t * C < dwpe.size:
        x = load(dwpe, t * C + c) if add else vector(ZERO)
        if t < T:
            for b in range(B):
                x += load(dout, (b * T + t) * C + c)
        store(dwpe, t * C + c, x)


@kernel
def wte_backward(dwte, dout, order, starts, tokens, C):
    # dwte[tokens[s]] += dout[order[starts[s]:starts[s+1]]], a block for each token that occurs; several rows at a time
    shared = cuda.shared.array(0, np.float32)  # (rows, C)
    s, y, c = cuda.blockIdx.x, cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    begin, end = starts[s], starts[s + 1]
    if begin == end:
        return
    x = vector(ZERO)
    if c < C:
        for i in range(begin + y, end, cuda.blockDim.y):
            x += load(dout, np.int64(order[i]) * C + c)
        store(shared, y * np.int64(C) + c, x)
    cuda.syncthreads()
    if y == 0 and c < C:
        for k in range(1, min(np.int64(cuda.blockDim.y), np.int64(end - begin))):
            x += load(shared, k * C + c)
        i = np.int64(tokens[s]) * C + c
        store(dwte, i, load(dwte, i) + x)


# ---------------------------------------------------------------------------------------------------------------------
# layernorm (Ba et al. 2016)

@kernel
def layernorm_forward(out, mean, rstd, inp, weight, bias, C):
    # a warp for each row; the row is read from memory once, then from the L1 cache
    row, lane = np.int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    if row >= mean.size:
        return
    base, scale = row * C, ONE / np.float32(C)
    s = vector(ZERO)
    for i in range(lane, C, 256):
        s += load(inp, base + i)
    m = warp_sum(total(s)) * scale
    s = vector(ZERO)
    for i in range(lane, C, 256):
        x = load(inp, base + i) - m
        s += x * x
    r = cuda.libdevice.rsqrtf(warp_sum(total(s)) * scale + LAYERNORM_EPS)
    for i in range(lane, C, 256):
        store(out, base + i, (load(inp, base + i) - m) * r * load(weight, i) + load(bias, i))
    if lane == 0:
        mean[row], rstd[row] = m, r


LN_ROWS = 2  # rows of inp that a block has at a time: 2800 GB/s, with 8 rows 2500


@kernel
def layernorm_backward(dinp, partial, dout, inp, weight, mean, rstd, C, add):
    # dinp (+)= the gradient of inp; partial (blocks, 3, C): a block's sums for dweight, dbias, and those of dinp
    # a thread has 8 channels, a row of threads (whole warps) a row of inp, a block LN_ROWS of them at a time
    sums, shared = cuda.shared.array((2, LN_ROWS, 32, 2), np.float32), cuda.shared.array(0, np.float32)  # shared (3, C)
    y, c, BT = cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8, np.int64(mean.size)
    warp, warps, scale, inside, turn = cuda.threadIdx.x // 32, cuda.blockDim.x // 32, ONE / np.float32(C), c < C, 0
    dw, db, dx, w = vector(ZERO), vector(ZERO), vector(ZERO), load(weight, c) if inside else vector(ZERO)
    for first in range(cuda.blockIdx.x * np.int64(LN_ROWS), BT, cuda.gridDim.x * np.int64(LN_ROWS)):
        row, i = first + y, (first + y) * C + c
        x, dy, old, r = vector(ZERO), vector(ZERO), vector(ZERO), ZERO
        if inside and row < BT:
            r, dy = rstd[row], load(dout, i)
            x = (load(inp, i) - mean[row]) * r
            if add:
                old = load(dinp, i)
        db += dy
        dw += dy * x
        dy = dy * w
        s1, s2 = warp_sum(total(dy)), warp_sum(total(dy * x))
        if cuda.threadIdx.x % 32 == 0:
            sums[turn, y, warp, 0], sums[turn, y, warp, 1] = s1, s2
        cuda.syncthreads()
        s1, s2 = ZERO, ZERO
        for k in range(warps):
            s1, s2 = s1 + sums[turn, y, k, 0], s2 + sums[turn, y, k, 1]
        turn = 1 - turn
        if inside and row < BT:
            x = old + (dy - s1 * scale - x * (s2 * scale)) * r
            dx += x
            store(dinp, i, x)
    for k in range(LN_ROWS):
        if y == k and inside:
            store(shared, c, dw + load(shared, c) if k else dw)
            store(shared, C + c, db + load(shared, C + c) if k else db)
            store(shared, 2 * C + c, dx + load(shared, 2 * C + c) if k else dx)
        cuda.syncthreads()
    for k in range(3 if y == 0 and inside else 0):
        store(partial, (np.int64(cuda.blockIdx.x) * 3 + k) * C + c, load(shared, k * C + c))


@kernel
def finish_sums(out1, out2, out3, partial, blocks, C, columns, add):
    # out1, out2, out3 (C,) (+)= the sums of partial (blocks, columns): a block for 64 columns, 64 rows at a time
    shared = cuda.shared.array(64 * 64, np.float32)
    y, lane = cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    i = np.int64(cuda.blockIdx.x) * 64 + lane
    x = vector(ZERO)
    if i < columns:
        for block in range(y, blocks, 64):
            x += load(partial, np.int64(block) * columns + i)
        store(shared, y * np.int64(64) + lane, x)
    cuda.syncthreads()
    if y == 0 and i < columns:
        for k in range(1, 64):
            x += load(shared, np.int64(k * 64) + lane)
        if i < C:
            store(out1, i, load(out1, i) + x if add else x)
        elif i < 2 * C:
            store(out2, i - C, load(out2, i - C) + x if add else x)
        else:
            store(out3, i - 2 * C, load(out3, i - 2 * C) + x if add else x)


# ---------------------------------------------------------------------------------------------------------------------
# matmul: what is not done by the products themselves

@kernel
def bias_backward(partial, dout, BT, OC):
    # partial (blocks, OC): a block's sums of the rows of dout (BT, OC), for the bias gradient; a block has 256 columns
    shared = cuda.shared.array(8 * 256, np.float32)
    y, lane = cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    c, x = np.int64(cuda.blockIdx.x) * 256 + lane, vector(ZERO)
    if c < OC:
        for row in range(cuda.blockIdx.y * np.int64(8) + y, BT, cuda.gridDim.y * np.int64(8)):
            x += load(dout, row * OC + c)
        store(shared, y * np.int64(256) + lane, x)
    cuda.syncthreads()
    if y == 0 and c < OC:
        for k in range(1, 8):
            x += load(shared, np.int64(k * 256) + lane)
        store(partial, cuda.blockIdx.y * np.int64(OC) + c, x)


# ---------------------------------------------------------------------------------------------------------------------
# attention from batched products: the softmax between them. One block for each row of scores

@kernel
def softmax_forward(probs, lse, scores, scale, T, width):
    # probs (n, T, width) = the causal softmax of scale * scores (n, T, width), 0 to the right; lse (n, T): log-sum-exp
    # width: T, up to the next multiple of 8. probs may be scores
    shared, shared2 = cuda.shared.array(32, np.float32), cuda.shared.array(32, np.float32)
    row, thread, stride = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x) * 8
    base, end, scale2 = row * width, row % T + 1, scale * LOG2E
    top, s = LOWEST, ZERO
    for i in range(thread * 8, end, stride):
        x = keep(load(scores, base + i) * scale2, 0, end - i, -INFINITY)
        m = max(top, largest(x))
        s = s * cuda.libdevice.exp2f(top - m) + total(exp2(x - m))
        top = m
    m = block_max(top, shared, thread, cuda.blockDim.x)
    s = block_sum(s * cuda.libdevice.exp2f(top - m), shared2, thread, cuda.blockDim.x)
    for i in range(thread * 8, width, stride):
        x = vector(ZERO)
        if i < end:
            x = keep(exp2(load(scores, base + i) * scale2 - m) / s, 0, end - i, ZERO)
        store(probs, base + i, x)
    if thread == 0:
        lse[row] = (cuda.libdevice.log2f(s) + m) * LN2


@kernel
def softmax_backward(probs, dscores, scores, dprobs, lse, scale, T, width):
    # probs (n, T, width) again from scores and lse; dscores = the gradient of scores from dprobs, that of probs
    # probs may be scores, dscores may be dprobs
    shared = cuda.shared.array(32, np.float32)
    row, thread, stride = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x) * 8
    base, end, scale2, l = row * width, row % T + 1, scale * LOG2E, lse[row] * LOG2E
    s = ZERO
    for i in range(thread * 8, end, stride):
        p = keep(exp2(load(scores, base + i) * scale2 - l), 0, end - i, ZERO)
        s += total(keep(p * load(dprobs, base + i), 0, end - i, ZERO))
    s = block_sum(s, shared, thread, cuda.blockDim.x)
    for i in range(thread * 8, width, stride):
        p, d = vector(ZERO), vector(ZERO)
        if i < end:
            p = keep(exp2(load(scores, base + i) * scale2 - l), 0, end - i, ZERO)
            d = keep(p * (load(dprobs, base + i) - s) * scale, 0, end - i, ZERO)
        store(probs, base + i, p)
        store(dscores, base + i, d)


# ---------------------------------------------------------------------------------------------------------------------
# attention of one token over the keys and values of those before it

@kernel
def keep_keys(keys, values, qkv, place, C):
    # keys, values (maxT, C) [place[0] + t] = those of qkv (T, 3*C); a row of threads for a token, 8 channels each
    t, c = np.int64(cuda.blockIdx.x) * cuda.blockDim.y + cuda.threadIdx.y, np.int64(cuda.threadIdx.x) * 8
    if c < C and t * C * 3 < qkv.size:
        i = (place[0] + t) * C + c
        store(keys, i, load(qkv, t * 3 * C + C + c))
        store(values, i, load(qkv, t * 3 * C + 2 * C + c))


@kernel
def attention_decode(out, qkv, keys, values, place, C, hs, scale):
    # out (C,): the attention of qkv (3*C,) over the first place[0] + 1 of keys, values (maxT, C)
    # a block for a head: (hs/8, rows) threads, whole warps. In the end a row has the sum over every rows-th token
    shared, shared2 = cuda.shared.array(32, np.float32), cuda.shared.array(32, np.float32)
    memory = cuda.shared.array(0, np.float32)  # the sums (rows, hs), then the scores (maxT,)
    x, y, h = np.int64(cuda.threadIdx.x) * 8, np.int64(cuda.threadIdx.y), cuda.blockIdx.x * np.int64(hs)
    rows, n = np.int64(cuda.blockDim.y), np.int64(place[0]) + 1
    thread, threads = y * cuda.blockDim.x + cuda.threadIdx.x, rows * cuda.blockDim.x
    m, scores = LOWEST, rows * hs
    for t in range(thread, n, threads):
        s = vector(ZERO)
        for i in range(0, hs, 8):
            s += load(qkv, h + i) * load(keys, t * C + h + i)
        score = total(s) * (scale * LOG2E)
        memory[scores + t] = score
        m = max(m, score)
    m = block_max(m, shared, thread, threads)
    s = ZERO
    for t in range(thread, n, threads):
        p = cuda.libdevice.exp2f(memory[scores + t] - m)
        memory[scores + t] = p
        s += p
    s = block_sum(s, shared2, thread, threads)  # a barrier: all can read the scores now
    v = vector(ZERO)
    for t in range(y, n, rows):
        v += load(values, t * C + h + x) * memory[scores + t]
    store(memory, y * hs + x, v)
    cuda.syncthreads()
    if y == 0:
        for k in range(1, rows):
            v += load(memory, k * hs + x)
        store(out, h + x, v / s)


# ---------------------------------------------------------------------------------------------------------------------
# gelu, by tanh as in GPT-2: x * (1 + tanh(u)) / 2 = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3)

@kernel
def gelu_forward(out, inp):
    i = cuda.grid(1) * np.int64(8)
    if i < inp.size:
        x = load(inp, i)
        store(out, i, x / (exp2((x + x * x * x * GELU_CUBIC) * (-TWO * LOG2E * GELU_SCALE)) + ONE))


@kernel
def gelu_backward(dinp, inp):
    # dinp, the gradient of gelu(inp), becomes that of inp
    i = cuda.grid(1) * np.int64(8)
    if i < inp.size:
        x = load(inp, i)
        s = vector(ONE) / (exp2((x + x * x * x * GELU_CUBIC) * (-TWO * LOG2E * GELU_SCALE)) + ONE)
        slope = (x * x * (np.float32(3) * GELU_CUBIC) + ONE) * (TWO * GELU_SCALE)
        store(dinp, i, load(dinp, i) * (s + x * s * (vector(ONE) - s) * slope))


# ---------------------------------------------------------------------------------------------------------------------
# the classifier's softmax and cross-entropy, and their gradient, in one go

@cuda.jit(max_registers=32, cache=True)  # two blocks of 1024 threads on a multiprocessor: 5.3 ms, without 6.4
def fused_classifier(logits, losses, targets, dloss, V, Vp, train):
    # logits (R, Vp), replaced by their gradients if train; losses, targets (R,), -1: no loss. A block for each row
    shared, shared2 = cuda.shared.array(32, np.float32), cuda.shared.array(32, np.float32)
    row, thread = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
    base, target = row * Vp, np.int64(targets[row])
    if target < 0:  # in evaluation only, where sequences are filled up
        if thread == 0:
            losses[row] = ZERO
        return
    place, top, s = target // 8 * 8, LOWEST, ZERO
    stride = np.int64(cuda.blockDim.x) * 8
    for i in range(thread * 8, V - 7, stride):
        x = load(logits, base + i)
        m = max(top, largest(x))
        s = s * cuda.libdevice.exp2f((top - m) * LOG2E) + total(exp2((x - m) * LOG2E))
        top = m
    if thread == 0 and V % 8:
        x = keep(load(logits, base + V // 8 * 8), 0, V % 8, -INFINITY)
        m = max(top, largest(x))
        s = s * cuda.libdevice.exp2f((top - m) * LOG2E) + total(exp2((x - m) * LOG2E))
        top = m
    hit = total(keep(load(logits, base + place), target - place, target - place + 1, ZERO))
    m = block_max(top, shared, thread, cuda.blockDim.x)
    s = block_sum(s * cuda.libdevice.exp2f((top - m) * LOG2E), shared2, thread, cuda.blockDim.x)
    if thread == 0:
        losses[row] = cuda.libdevice.log2f(s) * LN2 + m - hit
    if not train:
        return
    scale = dloss / s
    for i in range((Vp - 8) // stride * stride + thread * 8, -1, -stride):  # backwards: what was read last is cached
        if i >= Vp:
            continue
        x = exp2((load(logits, base + i) - m) * LOG2E) * scale
        if i == place:
            x = x - keep(vector(dloss), target - i, target - i + 1, ZERO)
        if i + 8 > V:
            x = keep(x, 0, V - i, ZERO)
        store(logits, base + i, x)


@kernel
def mean_loss(mean, losses, count):
    # mean[0] = the sum of losses / count[0]; one block
    shared = cuda.shared.array(32, np.float32)
    s = ZERO
    for i in range(cuda.threadIdx.x, losses.size, cuda.blockDim.x):
        s += losses[i]
    s = block_sum(s, shared, cuda.threadIdx.x, cuda.blockDim.x)
    if cuda.threadIdx.x == 0:
        mean[0] = s / np.float32(count[0])


# ---------------------------------------------------------------------------------------------------------------------
# AdamW (Loshchilov & Hutter 2019) and the norm of the gradients

@kernel
def sum_of_squares(partial, x):
    # partial (blocks,): each block's part of the sum of x's squares
    shared = cuda.shared.array(32, np.float32)
    s = vector(ZERO)
    for i in range(cuda.grid(1) * np.int64(8), x.size, np.int64(cuda.gridsize(1)) * 8):
        v = load(x, i)
        s += v * v
    t = block_sum(total(s), shared, cuda.threadIdx.x, cuda.blockDim.x)
    if cuda.threadIdx.x == 0:
        partial[cuda.blockIdx.x] = t


@kernel
def adamw_update(params, master, grads, m, v, hyper, decayed):
    # params: what products read; master: the same in float32; all flat and of the same size
    # hyper (8,): learning rate, beta1, beta2, the two bias corrections, eps, weight decay, factor of the gradients
    i = cuda.grid(1) * np.int64(8)
    if i < params.size:
        lr, beta1, beta2, correction1, correction2, eps = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5]
        decay = hyper[6] if decayed else ZERO
        grad = load(grads, i) * hyper[7]
        m1 = load(m, i) * beta1 + grad * (ONE - beta1)
        v1 = load(v, i) * beta2 + grad * grad * (ONE - beta2)
        p = load(master, i)
        p = p - (m1 * correction1 / (sqrt(v1 * correction2) + eps) + p * decay) * lr
        store(m, i, m1)
        store(v, i, v1)
        store(master, i, p)
        store(params, i, p)


@kernel
def convert(out, inp):
    # out = inp, rounded where out is of another type
    i = cuda.grid(1) * np.int64(8)
    if i < inp.size:
        store(out, i, load(inp, i))
