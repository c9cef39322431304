"""
Attention of our own in one kernel each way, as FlashAttention has it (Dao et al. 2022): scores and probabilities are
never in memory, only 64 queries by 64 keys of them at a time in registers, and the backward pass computes them again.

It is for float32 arrays. The tensor cores multiply TF32 numbers and add up in float32; all between the products is
float32. There are no atomics: dq has one kernel, dk and dv another, each with a fixed order of sums.
"""
import functools
import math
import operator

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic, models, overload, register_model

from dev.engine.cuda_kernels import (
    INFINITY,
    LN2,
    LOG2E,
    TF32,
    ZERO,
    device,
    f32,
    i32,
    kernel,
    load,
    store,
    tf32,
    vector,
)

TILE, WARP, PAD = 64, 32, 4  # rows of a tile; PAD: a shared row's further numbers, by which columns lie in other banks
THREADS = TILE // 16 * WARP  # a warp has 16 rows

# ---------------------------------------------------------------------------------------------------------------------
# Fragment: a warp's part of a matrix, in registers as the tensor cores want it. Lane 4g + t has of rows g and g + 8
#     a tile     (16, 8n): columns 2t and 2t + 1 of every eight; as a left factor, columns t and t + 4: n times 2 x 2
#     rows       (16,):    a number for each of its rows
#     columns    (8n,):    a number for each of its columns


class Fragment(types.Type):
    def __init__(self, kind, n=1):
        super().__init__(name=f"{kind}({n})")
        self.kind, self.n, self.size = kind, n, {"tile": 4, "rows": 2, "columns": 2}[kind] * n


@register_model(Fragment)
class FragmentModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(f32, fe_type.size))


def numbers(builder, fragment):
    return [builder.extract_element(fragment, ir.Constant(i32, k)) for k in range(fragment.type.count)]


def fragment(builder, numbers):
    x = ir.Constant(ir.VectorType(f32, len(numbers)), ir.Undefined)
    for k, number in enumerate(numbers):
        x = builder.insert_element(x, number, ir.Constant(i32, k))
    return x


def spread(context, builder, x, kind, n):
    """The 4n numbers that x, a Fragment or one number, stands for in a tile; 2 of rows"""
    if not isinstance(kind, Fragment):
        return [context.cast(builder, x, kind, types.float32)] * n
    found = numbers(builder, x)
    if kind.kind == "rows":
        return [found[k % 4 // 2] for k in range(n)] if n > 2 else found
    return [found[k // 4 * 2 + k % 2] for k in range(n)] if kind.kind == "columns" else found


def asm(builder, result, code, constraints, *args, volatile=False):
    kinds = ir.FunctionType(result, [x.type for x in args])
    return builder.call(ir.InlineAsm(kinds, code, constraints, side_effect=volatile), args)


def lane(builder):
    """(g, t) of this thread"""
    n = asm(builder, i32, "mov.u32 $0, %laneid;", "=r")
    return builder.lshr(n, ir.Constant(i32, 2)), builder.and_(n, ir.Constant(i32, 3))


def elementwise(calculate):
    """A function of tiles, rows and numbers, for each number of the largest"""
    @intrinsic
    def function(typingctx, x, y):
        largest = max((t for t in (x, y) if isinstance(t, Fragment)), key=lambda t: (t.kind == "tile", t.size))

        def codegen(context, builder, sig, args):
            xs, ys = (spread(context, builder, value, kind, largest.size) for value, kind in zip(args, sig.args))
            return fragment(builder, [calculate(builder, a, b) for a, b in zip(xs, ys)])
        return largest(x, y), codegen
    return function


def fragment_operator(op, instruction):
    calculate = elementwise(lambda builder, x, y: getattr(builder, instruction)(x, y, flags=("contract",)))

    @overload(op)
    def fragment_op(x, y):
        if isinstance(x, Fragment) or isinstance(y, Fragment):
            return lambda x, y: calculate(x, y)


for op, instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                        (operator.truediv, "fdiv")):
    fragment_operator(op, instruction)


def larger(builder, x, y):
    return asm(builder, f32, "max.NaN.f32 $0, $1, $2;", "=f,f,f", x, y)


maximum = elementwise(larger)


def function(code):
    """A PTX instruction for each number"""
    @intrinsic
    def calculate(typingctx, x):
        def codegen(context, builder, sig, args):
            return fragment(builder, [asm(builder, f32, code, "=f,f", a) for a in numbers(builder, args[0])])
        return x(x), codegen
    return calculate


exp2, log2 = function("ex2.approx.ftz.f32 $0, $1;"), function("lg2.approx.f32 $0, $1;")
rounded = function(TF32)


def row_reduction(combine):
    """rows from a tile: over all of a row's columns, which four lanes have"""
    @intrinsic
    def calculate(typingctx, x):
        def codegen(context, builder, sig, args):
            found, rows = numbers(builder, args[0]), []
            for row in range(2):
                some = [number for k, number in enumerate(found) if k % 4 // 2 == row]
                y = functools.reduce(functools.partial(combine, builder), some)
                for distance in 1, 2:
                    other = asm(builder, f32, f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", "=f,f", y,
                                volatile=True)
                    y = combine(builder, y, other)
                rows.append(y)
            return fragment(builder, rows)
        return Fragment("rows")(x), codegen
    return calculate


row_sum, row_max = row_reduction(lambda builder, x, y: builder.fadd(x, y)), row_reduction(larger)


def mask(predicate):
    """keep(x, offset, other): a tile's numbers where column `predicate` row + offset, else `other`"""
    @intrinsic
    def keep(typingctx, x, offset, other):
        def codegen(context, builder, sig, args):
            (g, t), out = lane(builder), []
            first = builder.sub(builder.mul(t, ir.Constant(i32, 2)), builder.add(g, builder.trunc(args[1], i32)))
            for k, number in enumerate(numbers(builder, args[0])):  # column - row - offset, of its first number: first
                place = builder.add(first, ir.Constant(i32, k // 4 * 8 + k % 2 - k % 4 // 2 * 8))
                out.append(builder.select(builder.icmp_signed(predicate, place, ir.Constant(i32, 0)), number, args[2]))
            return fragment(builder, out)
        return x(x, types.int64, types.float32), codegen
    return keep


keep_left, keep_right = mask("<="), mask(">=")


def places(context, builder, array_type, array, index, stride, rows=None):
    """Addresses of array[index + row * stride] for this lane's two rows, and the rows; at most the last of `rows`"""
    data, (g, _) = context.make_array(array_type)(context, builder, array).data, lane(builder)
    found = []
    for half in range(2):
        row = builder.zext(builder.add(g, ir.Constant(i32, 8 * half)), ir.IntType(64))
        inside = row
        if rows is not None:
            last = builder.sub(rows, ir.Constant(rows.type, 1))
            inside = builder.select(builder.icmp_signed("<", row, last), row, last)
        found.append((builder.gep(data, [builder.add(index, builder.mul(inside, stride))]), row))
    return found


@intrinsic
def left_factor(typingctx, array, index, stride, rows, n):
    """A tile (16, 8n) of array[index + row * stride + column] as a left factor; rows beyond the last are that again"""
    if not isinstance(n, types.Literal):
        return None  # it is asked again with the number
    kind = Fragment("tile", n.literal_value)

    def codegen(context, builder, sig, args):
        _, t = lane(builder)
        parts = places(context, builder, sig.args[0], *args[:3], rows=args[3])
        at = lambda k: builder.add(t, ir.Constant(i32, k // 4 * 8 + k % 2 * 4))
        return fragment(builder, [builder.load(builder.gep(parts[k % 4 // 2][0], [at(k)])) for k in range(kind.size)])
    return kind(array, types.int64, types.int64, types.int64, n), codegen


@intrinsic
def row_numbers(typingctx, array, index, rows):
    """rows (16,) of array[index + row]; those beyond the last are that again"""
    def codegen(context, builder, sig, args):
        one = ir.Constant(ir.IntType(64), 1)
        parts = places(context, builder, sig.args[0], args[0], args[1], one, rows=args[2])
        return fragment(builder, [builder.load(place) for place, _ in parts])
    return Fragment("rows")(array, types.int64, types.int64), codegen


@intrinsic
def same(typingctx, x):
    """rows (16,) of the same number"""
    return Fragment("rows")(types.float32), lambda context, builder, sig, args: fragment(builder, 2 * list(args))


@intrinsic
def put(typingctx, array, index, stride, rows, x):
    """array[index + row * stride + column] = a tile's numbers; array[index + row * stride] = those of rows"""
    def codegen(context, builder, sig, args):
        _, t = lane(builder)
        found = numbers(builder, args[4])
        for half, (place, row) in enumerate(places(context, builder, sig.args[0], *args[:3])):
            inside = builder.icmp_signed("<", row, args[3])
            if x.kind == "rows":
                inside = builder.and_(inside, builder.icmp_signed("==", t, ir.Constant(i32, 0)))
            with builder.if_then(inside):
                if x.kind == "rows":
                    builder.store(found[half], place)
                    continue
                for n in range(x.n):
                    column = builder.add(builder.mul(t, ir.Constant(i32, 2)), ir.Constant(i32, 8 * n))
                    pair = fragment(builder, found[4 * n + 2 * half:4 * n + 2 * half + 2])
                    to = builder.bitcast(builder.gep(place, [column]), pair.type.as_pointer())
                    builder.store(pair, to, align=8)
        return context.get_dummy_value()
    return types.void(array, types.int64, types.int64, types.int64, x), codegen


def shared_pointer(context, builder, array_type, array):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.addrspacecast(data, ir.PointerType(f32, addrspace=3))


@intrinsic
def columns(typingctx, shared, n):
    """columns (8n,) from a shared array"""
    if not isinstance(n, types.Literal):
        return None  # it is asked again with the number
    kind = Fragment("columns", n.literal_value)

    def codegen(context, builder, sig, args):
        data, (_, t) = shared_pointer(context, builder, sig.args[0], args[0]), lane(builder)
        at = lambda k: builder.add(builder.mul(t, ir.Constant(i32, 2)), ir.Constant(i32, k // 2 * 8 + k % 2))
        return fragment(builder, [builder.load(builder.gep(data, [at(k)])) for k in range(kind.size)])
    return kind(shared, n), codegen


@intrinsic
def zeros(typingctx, n):
    """A tile (16, 8n)"""
    if not isinstance(n, types.Literal):
        return None  # it is asked again with the number
    kind = Fragment("tile", n.literal_value)
    return kind(n), lambda context, builder, sig, args: ir.Constant(ir.VectorType(f32, kind.size), [0.0] * kind.size)


# products: mma multiplies (16, 8) by (8, 8), of which lane 4g + t has rows t and t + 4 of column g

def mma(builder, sums, left, right):
    bits = [builder.bitcast(x, i32) for x in (left[0], left[2], left[1], left[3])] + list(right)
    out = asm(builder, ir.LiteralStructType([f32] * 4),
              "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
              "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
              "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *bits, *sums)
    return [builder.extract_value(out, k) for k in range(4)]


@intrinsic
def add_product_transposed(typingctx, out, left, shared):
    """out (16, 8n) + left (16, 8k) @ shared (8n, 8k).T; left is a left factor, shared has rows of 8k + PAD numbers"""
    def codegen(context, builder, sig, args):
        sums, factors = numbers(builder, args[0]), numbers(builder, args[1])
        data, stride = shared_pointer(context, builder, sig.args[2], args[2]), 8 * left.n + PAD
        n = asm(builder, i32, "mov.u32 $0, %laneid;", "=r")  # lane 8j + i has the address of row i, columns from 4j
        row, column = builder.and_(n, ir.Constant(i32, 7)), builder.lshr(n, ir.Constant(i32, 3))
        place = builder.add(builder.mul(row, ir.Constant(i32, stride)), builder.mul(column, ir.Constant(i32, 4)))
        base = builder.ptrtoint(builder.gep(data, [place]), i32)
        four = ir.LiteralStructType([i32] * 4)
        for i in range(out.n):
            for k in range(0, left.n, 2):
                address = builder.add(base, ir.Constant(i32, 4 * (8 * i * stride + 8 * k)))
                found = asm(builder, four, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
                            "=r,=r,=r,=r,r,~{memory}", address, volatile=True)
                right = [builder.extract_value(found, j) for j in range(4)]
                for half in range(2):
                    part = factors[4 * (k + half):4 * (k + half + 1)]
                    sums[4 * i:4 * i + 4] = mma(builder, sums[4 * i:4 * i + 4], part, right[2 * half:2 * half + 2])
        return fragment(builder, sums)
    return out(out, left, shared), codegen


@intrinsic
def add_product(typingctx, out, left, shared):
    """out (16, 8n) + left (16, 8k) @ shared (8k, 8n); left is a tile that was calculated, whose columns 2t and 2t + 1
    take the place of a left factor's: so do rows of shared, which has 8n + PAD numbers in each"""
    def codegen(context, builder, sig, args):
        sums, factors, (g, t) = numbers(builder, args[0]), numbers(builder, args[1]), lane(builder)
        data, stride = shared_pointer(context, builder, sig.args[2], args[2]), 8 * out.n + PAD
        base = builder.gep(data, [builder.add(builder.mul(t, ir.Constant(i32, 2 * stride)), g)])
        for k in range(left.n):
            for i in range(out.n):
                at = [builder.gep(base, [ir.Constant(i32, (8 * k + half) * stride + 8 * i)]) for half in range(2)]
                right = [builder.bitcast(builder.load(place), i32) for place in at]
                sums[4 * i:4 * i + 4] = mma(builder, sums[4 * i:4 * i + 4], factors[4 * k:4 * k + 4], right)
        return fragment(builder, sums)
    return out(out, left, shared), codegen


# ---------------------------------------------------------------------------------------------------------------------
# kernels: T/64 x NH x B blocks of four warps

@device
def fill(shared, array, index, stride, rows, hs):
    # shared (64, hs + PAD) = array[index + row * stride + column], rounded to TF32; zeros in rows beyond the last
    for i in range(cuda.threadIdx.x * np.int64(8), TILE * hs, THREADS * 8):
        row, column = i // hs, i % hs
        x = tf32(load(array, index + row * stride + column)) if row < rows else vector(ZERO)
        store(shared, row * (hs + PAD) + column, x)


@functools.cache
def kernels(hs):
    """(forward, dq, dkv) for heads of hs channels: the sizes of fragments are known when kernels are compiled"""
    N, K, SIZE = TILE // 8, hs // 8, TILE * (hs + PAD)

    @cuda.jit(max_registers=128, cache=True)  # for four blocks on a multiprocessor: 57 TFLOP/s, without 48
    def flash_forward(out, lse, qkv, T, C, scale):
        # out (B*T, C), lse (B, NH, T): the log-sum-exp of scores; qkv (B*T, 3*C)
        keys, values = cuda.shared.array(SIZE, np.float32), cuda.shared.array(SIZE, np.float32)
        b, h, warp = np.int64(cuda.blockIdx.z), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x) // 32
        first = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * np.int64(TILE)  # the longest rows begin
        row, stride, scale2 = first + 16 * warp, 3 * C, scale * LOG2E
        head, token, h = b * cuda.gridDim.y + h, b * T, h * hs
        q = rounded(left_factor(qkv, (token + row) * stride + h, stride, T - row, K))
        y, top, norm = zeros(K), same(-INFINITY), same(ZERO)
        for start in range(0, first + 1, TILE):
            cuda.syncthreads()
            at = (token + start) * stride + h
            fill(keys, qkv, at + C, stride, T - start, hs)
            fill(values, qkv, at + 2 * C, stride, T - start, hs)
            cuda.syncthreads()
            scores = add_product_transposed(zeros(N), q, keys)
            if start == first:
                scores = keep_left(scores, row - start, -INFINITY)
            new = maximum(top, row_max(scores) * scale2)
            probs, fade = exp2(scores * scale2 - new), exp2(top - new)
            y, norm, top = add_product(y * fade, rounded(probs), values), norm * fade + row_sum(probs), new
        put(out, (token + row) * C + h, C, T - row, y / norm)
        put(lse, head * T + row, 1, T - row, (log2(norm) + top) * LN2)

    @cuda.jit(max_registers=128, cache=True)  # 69 TFLOP/s, without 49; flash_dkv has 79 with all registers, with 168 73
    def flash_dq(dqkv, delta, dout, out, lse, qkv, T, C, scale):
        # dqkv's dq; delta (B, NH, T): the sums of dout * out over a head, which flash_dkv needs, too
        keys, values = cuda.shared.array(SIZE, np.float32), cuda.shared.array(SIZE, np.float32)
        b, h, warp = np.int64(cuda.blockIdx.z), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x) // 32
        first = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * np.int64(TILE)
        row, stride, scale2 = first + 16 * warp, 3 * C, scale * LOG2E
        head, token, h = b * cuda.gridDim.y + h, b * T, h * hs
        q = rounded(left_factor(qkv, (token + row) * stride + h, stride, T - row, K))
        dy = left_factor(dout, (token + row) * C + h, C, T - row, K)
        sums = row_sum(dy * left_factor(out, (token + row) * C + h, C, T - row, K))
        put(delta, head * T + row, 1, T - row, sums)
        l = row_numbers(lse, head * T + row, T - row) * LOG2E
        dy, dq = rounded(dy), zeros(K)
        for start in range(0, first + 1, TILE):
            cuda.syncthreads()
            at = (token + start) * stride + h
            fill(keys, qkv, at + C, stride, T - start, hs)
            fill(values, qkv, at + 2 * C, stride, T - start, hs)
            cuda.syncthreads()
            scores = add_product_transposed(zeros(N), q, keys)
            if start == first:
                scores = keep_left(scores, row - start, -INFINITY)
            dprobs = add_product_transposed(zeros(N), dy, values)
            dq = add_product(dq, rounded(exp2(scores * scale2 - l) * (dprobs - sums)), keys)
        put(dqkv, (token + row) * stride + h, stride, T - row, dq * scale)

    @kernel
    def flash_dkv(dqkv, delta, dout, lse, qkv, T, C, scale):
        # dqkv's dk and dv: the same with keys as rows and queries as columns
        queries, dys = cuda.shared.array(SIZE, np.float32), cuda.shared.array(SIZE, np.float32)
        ls, sums = cuda.shared.array(TILE, np.float32), cuda.shared.array(TILE, np.float32)
        b, h, warp = np.int64(cuda.blockIdx.z), np.int64(cuda.blockIdx.y), np.int64(cuda.threadIdx.x) // 32
        first = cuda.blockIdx.x * np.int64(TILE)
        row, stride, scale2 = first + 16 * warp, 3 * C, scale * LOG2E
        head, token, h = b * cuda.gridDim.y + h, b * T, h * hs
        at = (token + row) * stride + h
        keys = rounded(left_factor(qkv, at + C, stride, T - row, K))
        values = rounded(left_factor(qkv, at + 2 * C, stride, T - row, K))
        dk, dv = zeros(K), zeros(K)
        for start in range(first, T, TILE):
            cuda.syncthreads()
            fill(queries, qkv, (token + start) * stride + h, stride, T - start, hs)
            fill(dys, dout, (token + start) * C + h, C, T - start, hs)
            if cuda.threadIdx.x < TILE:
                t = start + cuda.threadIdx.x
                ls[cuda.threadIdx.x] = lse[head * T + t] * LOG2E if t < T else INFINITY
                sums[cuda.threadIdx.x] = delta[head * T + t] if t < T else ZERO
            cuda.syncthreads()
            scores = add_product_transposed(zeros(N), keys, queries)
            if start == first:
                scores = keep_right(scores, row - start, -INFINITY)
            probs = exp2(scores * scale2 - columns(ls, N))
            dv = add_product(dv, rounded(probs), dys)
            dprobs = add_product_transposed(zeros(N), values, dys)
            dk = add_product(dk, rounded(probs * (dprobs - columns(sums, N))), queries)
        put(dqkv, at + C, stride, T - row, dk * scale)
        put(dqkv, at + 2 * C, stride, T - row, dv)

    return flash_forward, flash_dq, flash_dkv


class Attention:
    """For B sequences of T tokens in NH heads of 16, 32, 48 or 64 channels: wider ones do not fit into registers.
    delta: a Buffer (B, NH, T), None without training"""

    def __init__(self, gpu, B, NH, T, hs, delta):
        self.gpu, self.grid, self.delta = gpu, (-(-T // TILE), NH, B), delta
        self.sizes, self.kernels = (T, NH * hs, np.float32(1 / math.sqrt(hs))), kernels(hs)

    def free(self):
        """Its scratch memory is a part of the batch's."""

    def forward(self, out, lse, qkv):
        self.gpu.launch(self.kernels[0], self.grid, THREADS, out, lse, qkv, *self.sizes)

    def backward(self, dqkv, dout, out, lse, qkv):
        _, dq, dkv = self.kernels
        self.gpu.launch(dq, self.grid, THREADS, dqkv, self.delta, dout, out, lse, qkv, *self.sizes)
        self.gpu.launch(dkv, self.grid, THREADS, dqkv, self.delta, dout, lse, qkv, *self.sizes)
