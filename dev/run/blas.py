"""
The linear layer by NumPy's BLAS, in float32, for machines where that is faster than our own products, or with
--matmul blas. The arguments are those of train_gpt2.py's matmul_forward and matmul_backward; panels are not used.
"""
import numpy as np


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
