"""
Attention by cuDNN's fused kernels, on q, k, v as they lie in the output of the qkv product.

The deterministic backward pass has B*NH*T*T bfloat16 of workspace, 1.6 GB at B=64, T=1024. Where that would be more
than two, it goes over slices of the batch; slices of a quarter took 1.53 ms instead of 1.40.
"""
import math

import cudnn

BF16, F32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
SLICE = 2 << 30  # bytes of the backward pass's workspace, at most, if one sequence does not need more


def sequences(B, NH, T):
    """How many sequences the backward pass takes at a time: a divisor of B"""
    most = max(1, SLICE // (2 * NH * T * T))
    return max(n for n in range(1, B + 1) if B % n == 0 and n <= most)


def workspace_bytes(B, NH, T):
    """About what the backward pass's workspace takes, before a plan is made"""
    return 2 * sequences(B, NH, T) * NH * T * T + (64 << 20)


class Attention:
    """For B sequences of T tokens in NH heads of hs channels. Raises ValueError where cuDNN has no kernel for them."""

    def __init__(self, gpu, B, NH, T, hs, train):
        self.gpu, self.B, self.slice, C = gpu, B, sequences(B, NH, T), NH * hs
        self.handle = cudnn.create_handle()
        cudnn.set_stream(handle=self.handle, stream=int(gpu.stream))
        self.strides, self.head_bytes = {"packed": [T * 3 * C, hs, 3 * C, 1], "plain": [T * C, hs, C, 1]}, 2 * C
        self.shape, self.scale, self.address = (NH, T, hs), 1 / math.sqrt(hs), None
        try:
            self.forward_graph, self.forward_tensors = self.forward_plan(B)
            self.backward_graph, self.backward_tensors = self.backward_plan(self.slice) if train else (None, None)
        except cudnn.cudnnGraphNotSupportedError as error:
            raise ValueError(f"cuDNN {cudnn.backend_version_string()} has no attention for {B} sequences of {T} "
                             f"tokens, {NH} heads of {hs} on {gpu.name}: {error}\n"
                             "---> HINT: --attention own needs no cuDNN") from error
        graphs = [graph for graph in (self.forward_graph, self.backward_graph) if graph]
        self.address = gpu.allocate(max(graph.get_workspace_size() for graph in graphs))

    def graph(self):
        return cudnn.pygraph(io_data_type=BF16, intermediate_data_type=F32, compute_data_type=F32, handle=self.handle)

    def inputs(self, graph, B, stride, *names):
        dim = [B, *self.shape]
        return [graph.tensor(name=name, dim=dim, stride=self.strides[stride], data_type=BF16) for name in names]

    def build(self, graph):
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()

    def forward_plan(self, B):
        graph = self.graph()
        q, k, v = self.inputs(graph, B, "packed", "q", "k", "v")
        out, lse = graph.sdpa(name="sdpa", q=q, k=k, v=v, attn_scale=self.scale, generate_stats=True,
                              use_causal_mask=True)
        out.set_output(True).set_dim([B, *self.shape]).set_stride(self.strides["plain"])
        lse.set_output(True).set_data_type(F32)
        self.build(graph)
        return graph, (q, k, v, out, lse)

    def backward_plan(self, B):
        graph, (NH, T, _) = self.graph(), self.shape
        q, k, v = self.inputs(graph, B, "packed", "q", "k", "v")
        out, dout = self.inputs(graph, B, "plain", "out", "dout")
        lse = graph.tensor(name="lse", dim=[B, NH, T, 1], stride=[NH * T, T, 1, 1], data_type=F32)
        gradients = graph.sdpa_backward(name="sdpa_backward", q=q, k=k, v=v, o=out, dO=dout, stats=lse,
                                        attn_scale=self.scale, use_causal_mask=True, use_deterministic_algorithm=True)
        for gradient in gradients:
            gradient.set_output(True).set_dim([B, *self.shape]).set_stride(self.strides["packed"])
        self.build(graph)
        return graph, (q, k, v, out, dout, lse, *gradients)

    def parts(self, qkv):
        """The addresses of q, k and v"""
        return [qkv.ptr + n * self.head_bytes for n in range(3)]

    def free(self):
        self.gpu.free(self.address)

    def forward(self, out, lse, qkv):
        values = *self.parts(qkv), out.ptr, lse.ptr
        self.forward_graph.execute(dict(zip(self.forward_tensors, values)), self.address, handle=self.handle)

    def backward(self, dqkv, dout, out, lse, qkv):
        T, n = self.shape[1], self.slice
        for b in range(0, self.B, n):
            first = slice(b * T, (b + n) * T)
            values = (*self.parts(qkv[first]), out[first].ptr, dout[first].ptr, lse[b:b + n].ptr,
                      *self.parts(dqkv[first]))
            self.backward_graph.execute(dict(zip(self.backward_tensors, values)), self.address, handle=self.handle)
