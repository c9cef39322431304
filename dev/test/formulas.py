"""
The formulas that every engine and every kernel is compared with, in float64 NumPy, written to be read and not to be
fast; llm.c's random numbers, from the definition of MT19937; and what it means to be close to one of them.
"""
import numpy as np

F32 = np.float32


def close(actual, expected, rtol=1e-5):
    """Assert that the norm of the error is at most rtol of that of what is expected, and that no element is far off.
    One that is zeroed, or a row that is missing, fails."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape and np.isfinite(expected).all()
    error, norm = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert norm > 0 and error <= rtol * norm, f"relative error {error / norm:.1e}"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=20 * rtol * np.abs(expected).max())


def normal(rng, *shape, std=1.0):
    """A float32 array of normal numbers"""
    return rng.normal(0, std, shape).astype(F32)


# ---------------------------------------------------------------------------------------------------------------------
# the layers and their gradients

def layernorm(x, weight, bias):
    """out, mean, rstd"""
    x = np.float64(x)
    mean, rstd = x.mean(-1), 1 / np.sqrt(x.var(-1) + 1e-5)
    return (x - mean[..., None]) * rstd[..., None] * weight + bias, mean, rstd


def layernorm_gradient(dout, x, weight):
    """dx, dweight, dbias"""
    norm, _, rstd = layernorm(x, 1, 0)
    dnorm = np.float64(dout) * weight
    mean = lambda a: a.mean(-1, keepdims=True)
    dx = (dnorm - mean(dnorm) - norm * mean(dnorm * norm)) * rstd[..., None]
    return dx, (dout * norm).sum(0), np.float64(dout).sum(0)


def gelu(x):
    x = np.float64(x)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_gradient(x):
    x = np.float64(x)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def split_heads(qkv, NH):
    """q, k, v, each (B, NH, T, hs), from qkv (B, T, 3*C)"""
    B, T, width = qkv.shape
    return np.float64(qkv).reshape(B, T, 3, NH, width // 3 // NH).transpose(2, 0, 3, 1, 4)


def attention(qkv, NH):
    """out (B, T, C), lse (B, NH, T), probabilities (B, NH, T, T)"""
    q, k, v = split_heads(qkv, NH)
    T, hs = q.shape[2:]
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(hs), -np.inf)
    largest = scores.max(-1, keepdims=True)
    lse = largest + np.log(np.exp(scores - largest).sum(-1, keepdims=True))
    probs = np.exp(scores - lse)
    return (probs @ v).swapaxes(1, 2).reshape(*qkv.shape[:2], -1), lse[..., 0], probs


def attention_gradient(dout, qkv, NH):
    """dqkv (B, T, 3*C)"""
    q, k, v = split_heads(qkv, NH)
    B, _, T, hs = q.shape
    probs, dy = attention(qkv, NH)[2], np.float64(dout).reshape(B, T, NH, hs).swapaxes(1, 2)
    dprobs = dy @ v.swapaxes(2, 3)
    dscores = probs * (dprobs - (dprobs * probs).sum(-1, keepdims=True)) / np.sqrt(hs)
    gradients = np.stack([dscores @ k, dscores.swapaxes(2, 3) @ q, probs.swapaxes(2, 3) @ dy])
    return gradients.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def cross_entropy(logits, targets):
    """losses (R,) and probabilities (R, V)"""
    logits = np.float64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_probs[np.arange(len(logits)), targets], np.exp(log_probs)


def cross_entropy_gradient(logits, targets):
    """of the losses' sum: (R, V)"""
    gradient = cross_entropy(logits, targets)[1]
    gradient[np.arange(len(logits)), targets] -= 1
    return gradient


def numeric_gradient(function, x, dout, h=1e-6):
    """d(sum of dout * function(x)) / dx, element by element"""
    x, gradient = np.float64(x), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = h
        gradient[i] = (dout * (function(x + step) - function(x - step))).sum() / (2 * h)
    return gradient


# ---------------------------------------------------------------------------------------------------------------------
# the whole model

def formula_logits(config, w, inputs):
    """The logits (B, T, V) in float64, from a dictionary of parameters"""
    x = w["wte"][inputs] + w["wpe"][:inputs.shape[1]]
    for l in range(config.num_layers):
        norm = layernorm(x, w["ln1w"][l], w["ln1b"][l])[0]
        atty = attention(norm @ w["qkvw"][l].T + w["qkvb"][l], config.num_heads)[0]
        x = x + atty @ w["attprojw"][l].T + w["attprojb"][l]
        norm = layernorm(x, w["ln2w"][l], w["ln2b"][l])[0]
        x = x + gelu(norm @ w["fcw"][l].T + w["fcb"][l]) @ w["fcprojw"][l].T + w["fcprojb"][l]
    return layernorm(x, w["lnfw"], w["lnfb"])[0] @ w["wte"][:config.vocab_size].T


def formula_loss(config, w, inputs, targets):
    """The mean cross-entropy of all (B, T) targets"""
    return cross_entropy(formula_logits(config, w, inputs).reshape(targets.size, -1), targets.ravel())[0].mean()


def adamw(p, grad, m, v, step, learning_rate, beta1, beta2, eps, weight_decay):
    """What becomes of parameters p and moments m, v in a step that is counted from 1: p, m, v"""
    grad = np.float64(grad)
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    change = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)
    return p - learning_rate * (change + weight_decay * p), m, v


# ---------------------------------------------------------------------------------------------------------------------
# llm.c's random numbers

class MT19937:
    """The generator of Matsumoto & Nishimura (1998), seeded with one 32-bit number. It keeps the words that llm.c
    keeps: `left` draws until a new round, one less; `next` in this round"""

    def __init__(self, seed):
        self.state, self.left, self.next = [seed], 1, 0
        for i in range(1, 624):
            self.state.append(1812433253 * (self.state[-1] ^ self.state[-1] >> 30) + i & 0xFFFFFFFF)

    def draw(self):
        self.left -= 1
        if self.left == 0:
            s, self.left, self.next = self.state, 624, 0
            for i in range(624):
                y = s[i] & 0x80000000 | s[(i + 1) % 624] & 0x7FFFFFFF
                s[i] = s[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
        y = self.state[self.next]
        self.next += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18

    def permute(self, items):
        """Shuffle a list in place, with the draws that llm.c makes; returns it"""
        for i in range(len(items) - 1, 0, -1):
            j = self.draw() % (i + 1)
            items[i], items[j] = items[j], items[i]
        return items


class Order:
    """llm.c's loader, shuffled: which (shard, sample) comes next. samples: of each shard, how many"""

    def __init__(self, samples):
        self.samples, self.random, self.shards = samples, MT19937(42), list(range(len(samples)))
        self.begin_epoch()

    def begin_epoch(self):
        self.random.permute(self.shards)
        self.open(0)

    def open(self, shard):
        self.shard, self.sample = shard, 0
        self.order = self.random.permute(list(range(self.samples[self.shards[shard]])))

    def draw(self):
        while self.sample == len(self.order):
            if self.shard + 1 < len(self.shards):
                self.open(self.shard + 1)
            else:
                self.begin_epoch()
        self.sample += 1
        return self.shards[self.shard], self.order[self.sample - 1]


def box_muller(u):
    """16 normal numbers from 16 uniform ones: eight radii and eight angles"""
    radius, angle = np.sqrt(-2 * np.log(np.minimum(1, 1 - u[:8] + 1e-12))), 2 * np.pi * u[8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def normal_numbers(random, n, std):
    """FACTS of llm.c's and PyTorch's normal draws: Box-Muller in blocks of 16, the last 16 anew where n % 16"""
    def uniforms(n):
        return (random.randint(0, 2**32, n, np.uint32) & 0xFFFFFF) / 2**24
    out, u = np.empty(n), uniforms(n)
    for i in range(0, n - 15, 16):
        out[i:i + 16] = box_muller(u[i:i + 16])
    if n % 16:
        out[-16:] = box_muller(uniforms(16))
    return std * out
