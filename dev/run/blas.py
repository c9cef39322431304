"""
The linear layer by NumPy's BLAS, in float32, for machines where that is faster than our own products, or with
--matmul blas. The arguments are those of train_gpt2.py's matmul_forward and matmul_backward; panels are not used.
"""
import numpy as np


def name_of_blas(matmul, precision):
    """NumPy's BLAS if the products are its: `blas`, or `auto` where it has matrix units that LLVM hasn't. Else None.
    ValueError where it can't be"""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if matmul == "blas" and precision == "bf16":
        raise ValueError("--matmul blas multiplies float32\n---> HINT: --precision fp32, or --matmul numba")
    better = "accelerate" in blas.lower() and precision == "fp32"
    return blas if matmul == "blas" or matmul == "auto" and better else None


def blas_forward(gelu_forward, out, act, inp, weight, bias, residual, panels):
    np.matmul(inp, weight.T, out=out)
    for more in bias, residual:
        if more.size:
            out += more
    if act.size:
        gelu_forward(act, out)


def blas_backward(dinp, dweight, dbias, dout, inp, weight, add, panels):
    np.matmul(dout, weight, out=dinp)
    if add:
        dweight += dout.T @ inp
    else:
        np.matmul(dout.T, inp, out=dweight)
    if dbias.size:
        np.add(dbias if add else np.float32(0), dout.sum(0), out=dbias)
