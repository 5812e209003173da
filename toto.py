"""Toto's transformer: the LLaMA-style causal model of §3.1 and §3.2, in one file.

    Eq. 1-2   Toto.forward: next-token log-likelihood of a flat sequence of visual tokens
    Eq. 3-4   Block.forward: pre-norm attention, then pre-norm SwiGLU MLP
    Table 1, Table 15   SIZES
    §3.5      Toto.features: H_l, the residual stream after layer l
    A.8       Toto.generate: one token at a time, with a KV cache

    python toto.py                  the sizes and their parameters
    python toto.py --export FOLDER  a trained model as a Hugging Face LlamaForCausalLM

`train.py`, `probe.py` and `sample.py` import it. Files: `load` reads a checkpoint of `train.py`.
Shape letters: B batch, T tokens, D width, H heads, L layers, V vocabulary.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# Token ids (§3.4 fixes 1, 2 and 3). Not in the paper: 0 stays free, and code k of the tokenizer is id 4 + k.
VIDEO_START, END, IMAGE_START, FIRST_CODE = 1, 2, 3, 4


@dataclass(frozen=True)
class Config:
    dim: int  # D
    n_heads: int  # H
    n_layers: int  # L
    hidden: int  # width inside the MLP
    vocab_size: int = FIRST_CODE + 8192  # V: the dVAE's 8,192 codes and the four ids above
    rope_base: float = 10_000.0  # 50,000 when fine-tuning at 32x32 tokens (Table 4, §4.2)
    mup_width: int = 0  # µP's base width (A.5); 0 for the standard parametrisation

    @property
    def mup_ratio(self):
        """A.5: µP (Yang et al., 2022) in one number, base width / width, 1 where µP is off. With it, for AdamW:

                                     initial std    learning rate   in the forward pass
            embedding, norms         as ever        as ever
            matrices of the blocks   · √ratio       · ratio
            logits (tied)                                           · ratio
            attention scores                                        · √ratio: q·k falls with 1/(D/H), not its root

        So the best learning rate of the base width is that of every width with as many heads (Fig. 11, Table 15). At
        the base width nothing changes.
        """
        return self.mup_width / self.dim if self.mup_width else 1.0


# Table 1 (base, large, 1b) and Table 15 (a1 to a6). Not in the paper: the MLP's hidden width. No single ratio gives the
# printed parameter counts of Table 1, so base and large use 4 D and 1b uses LLaMA's 8/3 D rounded up to 256, which
# rounds to all three. Table 15's counts fit no standard block; with 4 D these models come out 11 to 13 % below them.
# `tiny` is ours: what two CPU cores can train in minutes.
SIZES = {
    "tiny": Config(dim=128, n_heads=4, n_layers=6, hidden=384),
    "base": Config(dim=768, n_heads=12, n_layers=12, hidden=3072),
    "large": Config(dim=1024, n_heads=16, n_layers=16, hidden=4096),
    "1b": Config(dim=2048, n_heads=16, n_layers=22, hidden=5632),
    "a1": Config(dim=256, n_heads=16, n_layers=12, hidden=1024),
    "a2": Config(dim=512, n_heads=16, n_layers=16, hidden=2048),
    "a3": Config(dim=768, n_heads=16, n_layers=20, hidden=3072),
    "a4": Config(dim=1024, n_heads=16, n_layers=24, hidden=4096),
    "a5": Config(dim=1536, n_heads=16, n_layers=28, hidden=6144),
    "a6": Config(dim=1792, n_heads=16, n_layers=32, hidden=7168),
}


class Linear(nn.Linear):
    """A bias-free matrix that is stored in float32 and multiplies in the dtype of its input.

    The optimizer sees float32 master weights, the matrix units see bfloat16. Unlike under autocast, everything between
    the embedding and the logits is then in bfloat16, the residual stream too: less memory to move.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """§3.2: x / sqrt(mean(x²) + 1e-5) · weight, over the last axis (Zhang & Sennrich, 2019)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-5)


def rope_table(positions, head_dim, base):
    """§3.2: cosines and sines of RoPE's angles p · base^(-2i / head_dim), i < head_dim / 2: two (T, head_dim/2).

    Not in the paper: the position p is the index in the flat sequence, so a frame's second row lies w positions after
    its first; there is no two- or three-dimensional position.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float()[:, None] * frequencies  # (T, head_dim/2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of x (…, T, head_dim) by the angles of their position.

    Pairing the two halves, not neighbours, is the convention of Hugging Face's Llama.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q, k, v, causal, ratio=1.0):
    """softmax(q kᵀ √ratio / √(D/H)) v for q, k, v (B, H, T, D/H); causal hides later keys from each query.

    ratio is Config.mup_ratio.
    """
    B, _, T, _ = q.shape
    scale = math.sqrt(ratio / q.shape[-1])
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and T > 256):
        # No mask tensor, only the flag: with a mask the fused kernels are not taken.
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    # On a CPU the fused kernel leaves the bfloat16 matrix units mostly idle. Plain products of some 256 queries at a
    # time with the keys that they see are 1.3 to 1.7 times as fast, forward and backward, at 1,024 tokens.
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·H, T, D/H)
    hidden = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    blocks, end = [], 0
    for queries in q.tensor_split(math.ceil(T / 256), dim=1):
        start, end = end, end + queries.shape[1]
        seen = end if causal else T
        scores = torch.baddbmm(hidden[start:end, :seen], queries, k[:, :seen].mT, beta=int(causal), alpha=scale)
        blocks.append(scores.softmax(dim=-1) @ v[:, :seen])
    return torch.cat(blocks, dim=1).unflatten(0, (B, -1))


class Attention(nn.Module):
    """MHSA of Eq. 3 (§3.2): multi-head self-attention with RoPE on queries and keys, no biases."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.ratio = config.n_heads, config.mup_ratio
        self.qkv = Linear(config.dim, 3 * config.dim)  # one product for the three projections
        self.out = Linear(config.dim, config.dim)

    def forward(self, x, rope, causal=True):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D/H)
        (q, k), v = apply_rope(qkv[:2], *rope), qkv[2]
        x = attend(q, k, v, causal, self.ratio)
        return self.out(x.transpose(1, 2).reshape(B, T, D))  # (B, H, T, D/H) -> (B, T, D)


class MLP(nn.Module):
    """MLP of Eq. 4 (§3.2): SwiGLU (Shazeer, 2020), out(SiLU(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.hidden)  # one product for both
        self.out = Linear(config.hidden, config.dim)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """One layer of §3.2: attention, then an MLP, each normalised before and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.dim), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.dim), MLP(config)

    def forward(self, x, rope, causal=True):
        # Eq. 3: Ĥ_{l+1} = H_l + MHSA(RMS-norm(H_l))
        x = x + self.attention(self.attention_norm(x), rope, causal)
        # Eq. 4: H_{l+1} = Ĥ_{l+1} + MLP(RMS-norm(Ĥ_{l+1}))
        return x + self.mlp(self.mlp_norm(x))


# Logits that exist at a time: on a CPU few enough to stay in the cache, on a GPU enough to fill it.
CHUNK = {"cpu": 2**22, "cuda": 2**25}


class CrossEntropy(torch.autograd.Function):
    """Eq. 2 of x (N, D), the output matrix (V padded, D) and targets (N,), without ever holding all logits at once.

    The logits of 4,097 ids over 8,196 choices are the largest tensor of a step by far. Here they live for some rows at
    a time, and their gradient is taken at once: the same products in the same number. On a CPU, where a chunk then
    stays in the cache, 2.4 times as fast as F.cross_entropy on all of them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        w = weight.to(x.dtype)
        rows = max(CHUNK["cpu" if x.device.type == "cpu" else "cuda"] // len(w), 1)
        loss, grad_x, grad_w = 0, torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for x_part, y, grad_part in zip(x.split(rows), targets[:, None].split(rows), grad_x.split(rows)):
            logits = (x_part @ w.t()).float()  # (rows, V padded)
            logits[:, vocab_size:] = -math.inf
            p = logits.log_softmax(dim=-1)
            loss -= p.gather(1, y).sum()
            # ∂L/∂logits = (softmax - one-hot) / N
            p = p.exp_().scatter_add_(1, y, p.new_full(y.shape, -1.0)).div_(len(x)).to(x.dtype)
            torch.mm(p, w, out=grad_part)
            grad_w += p.t() @ x_part
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad), grad_w.mul_(grad).to(ctx.weight_dtype), None, None


class Toto(nn.Module):
    """The causal transformer of §3.2 over visual token ids.

    `compute_dtype` is the dtype of activations and matrix products; parameters stay in float32. `recompute` keeps only
    each block's input for the backward pass, which runs the block again: less memory, a third more products.
    """

    recompute = False

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        # A number of rows that 128 divides (8,320 for 8,196) suits matrix units; no loss or sample sees the rest.
        # Not in the paper: input and output embeddings are tied, as the parameter counts of Table 1 ask for.
        self.embedding = nn.Embedding(math.ceil(config.vocab_size / 128) * 128, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim)
        self.init_weights()

    def init_weights(self):
        """Not in the paper: N(0, 0.02), and the projections that write into the residual stream smaller by √(2L)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if name.endswith("out.weight") else 0.02
                is_embedding = name == "embedding.weight"
                nn.init.normal_(parameter, std=std if is_embedding else std * math.sqrt(self.config.mup_ratio))

    def count_parameters(self):
        """Parameters that do something: the embedding's padding rows are left out."""
        padding_rows = self.embedding.num_embeddings - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding_rows * self.config.dim

    def flops_per_token(self, n_tokens):
        """Training FLOPs per token of sequences of n_tokens: 6 N + 12 L D T, N without the input embedding.

        The tied matrix counts once, as the output layer. Attention is counted in full, as is the custom, although the
        causal kernel skips half of it.
        """
        return 6 * self.count_parameters() + 12 * self.config.n_layers * self.config.dim * n_tokens

    def residual_stream(self, ids, causal=True):
        """Yield H_0, H_1, … H_L, each (B, T, D): the embedding, then the residual stream after every block."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_base)
        rope = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        x = F.embedding(ids, self.embedding.weight).to(self.compute_dtype)  # (B, T) -> (B, T, D)
        yield x
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, rope, causal, use_reentrant=False)
            else:
                x = block(x, rope, causal)
            yield x

    def logits(self, x):
        """H_L (B, T, D) -> float32 logits (B, T, V). The float32 copy leaves out the embedding's padding rows."""
        x = self.norm(x) * self.config.mup_ratio
        return F.linear(x, self.embedding.weight.to(x.dtype))[..., : self.config.vocab_size].float()

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T), the negative log-likelihood in nats per token.

        §3.1, Eq. 1: log p(x) = Σ_i log p(x_i | x_{i-1} … x_1), one term a position, all in one causal pass.
        Eq. 2: L = E[-log p(x)]. Not in the paper: averaged per token, so that it can be read at any length.
        """
        for x in self.residual_stream(ids):
            pass
        return self.logits(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """Eq. 2 from H_L (B, T, D) and targets (B, T): nats per token."""
        x = self.norm(x) * self.config.mup_ratio
        return CrossEntropy.apply(x.flatten(0, 1), self.embedding.weight, targets.flatten(), self.config.vocab_size)

    def features(self, ids, layers, causal=True):
        """{l: H_l (B, T, D)} for the asked layers, 0 … L (§3.2, §3.5); nothing beyond the deepest is computed.

        causal=False is A.2's full attention: every token sees every other.
        """
        wanted = {}
        for l, x in enumerate(self.residual_stream(ids, causal)):
            if l in layers:
                wanted[l] = x
            if l == max(layers):
                return wanted
        raise ValueError(f"layer {max(layers)} does not exist: this model has layers 0 to {self.config.n_layers}")

    @torch.no_grad()
    def generate(self, ids, n_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, progress=None, decoder=None):
        """Continue ids (B, T) by n_tokens codes (A.8) -> (B, T + n_tokens).

        Only codes are drawn, never a start, end or padding id. temperature 0 takes the most probable code, top_k > 0
        keeps the k most probable, top_p < 1 the fewest that together have that probability. `progress`, if given, is
        called after each token. `decoder`: this model's, for B sequences of T + n_tokens ids or more, to use it again.
        """
        B, T = ids.shape
        out = torch.cat((ids, ids.new_zeros(B, n_tokens)), dim=1)
        decoder = decoder or Decoder(self, B, T + n_tokens)
        if decoder.batch_size != B or len(decoder.positions) < T + n_tokens:
            raise ValueError(
                f"the decoder takes {decoder.batch_size} sequences of up to {len(decoder.positions)} ids, not {B} of "
                f"{T + n_tokens}"
            )
        decoder.length = 0
        with torch.inference_mode():  # a sixth faster than no_grad alone
            for i in range(T, T + n_tokens):
                new = ids if i == T else out[:, i - 1 : i]  # the prompt in one pass, then one token at a time
                code_logits = decoder(new)[:, FIRST_CODE:]  # (B, V - 4)
                out[:, i] = FIRST_CODE + sample_from(code_logits, temperature, top_k, top_p, generator)
                if progress:
                    progress()
        return out


class Decoder:
    """The model as a function of new ids only: the logits after them, with keys and values of all before in a cache.

    For A.8: Eq. 3 and 4 once more, on plain tensors. A step of one token is so little work that most of the time goes
    into calling it: without modules, with the angles and the weights' dtype prepared, and with rotation, residual sums
    and cache writes in as few calls as can be, `tiny` draws about twice as many tokens a second on a CPU. Its products
    are in float32 there, below 20 M parameters: bfloat16 costs more per call than it saves.

    compile=True makes the step one compiled graph, on CUDA recorded and replayed, before it returns. For `tiny` on a
    CPU that takes 5 to 13 seconds, and the graph is 1.2 to 1.6 times as fast. Its shapes must not change, so it reads
    the whole cache and hides what is not there yet. Fused, bfloat16 pays for small models too, unless they draw one
    sequence alone.

    The weights are those of the time when the Decoder is made.
    """

    def __init__(self, model, batch_size, n_tokens, compile=False):
        c, device = model.config, model.embedding.weight.device
        self.config, self.batch_size, self.length, self.graph = c, batch_size, 0, None
        is_small = device.type == "cpu" and model.count_parameters() < 20e6 and not (compile and batch_size > 1)
        self.dtype = dtype = torch.float32 if is_small else model.compute_dtype
        prepare = lambda module: module.weight.detach().to(dtype)
        self.layers = [
            (prepare(b.attention_norm), prepare(b.attention.qkv), prepare(b.attention.out).t(),
             prepare(b.mlp_norm), prepare(b.mlp.gate_up), prepare(b.mlp.out).t())
            for b in model.blocks
        ]  # fmt: skip
        self.embedding, self.norm = prepare(model.embedding), prepare(model.norm)
        # RoPE of q, k and v at once, (n_tokens, 3, 1, D/H): v turns by no angle.
        head_dim = c.dim // c.n_heads
        self.positions = torch.arange(n_tokens, device=device)
        cos, sin = rope_table(self.positions, head_dim, c.rope_base)
        still, nothing = torch.ones(n_tokens, head_dim, device=device), torch.zeros(n_tokens, head_dim, device=device)
        self.cos = torch.stack(2 * [torch.cat((cos, cos), dim=-1)] + [still], dim=1)[:, :, None].to(dtype)
        self.sin = torch.stack(2 * [torch.cat((-sin, sin), dim=-1)] + [nothing], dim=1)[:, :, None].to(dtype)
        shape = 2, batch_size, c.n_heads, n_tokens, head_dim
        # Zeros: what is hidden has weight 0, and 0 times an uninitialised NaN would be NaN.
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers]
        self.compiled_step = None
        if compile:
            self.compiled_step = torch.compile(self.step, dynamic=False, fullgraph=True)
            # Its inputs stay in one place, as a recorded graph needs it, and with one layout, or it would recompile.
            self.inputs = torch.zeros(batch_size, 1, dtype=torch.long, device=device), self.positions[:1].clone()
            with torch.inference_mode():
                self(self.inputs[0].clone())

    def __call__(self, ids):
        """ids (B, T), the prompt, or one token after what has been given -> float32 logits (B, V) after the last."""
        positions = self.positions[self.length : self.length + ids.shape[1]]
        self.length += ids.shape[1]
        if ids.shape[1] > 1 or not self.compiled_step:
            return self.step(ids, positions, self.length)
        self.inputs[0].copy_(ids)
        self.inputs[1].copy_(positions)
        if ids.device.type != "cuda":
            return self.compiled_step(*self.inputs)
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.logits.clone()

    def step(self, ids, positions, n_seen=None):
        """The logits after ids (B, T) at `positions` (T,), which look at the first n_seen of the cache.

        Without n_seen, for one token, at all of it but what lies behind their position.
        """
        c, (B, T), D = self.config, ids.shape, self.config.dim
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        scale = math.sqrt(c.mup_ratio * c.n_heads / D)
        x = F.embedding(ids, self.embedding).view(B * T, D)
        for (attention_norm, to_qkv, to_out, mlp_norm, to_gate_up, from_hidden), kv in zip(self.layers, self.kv):
            qkv = F.linear(F.rms_norm(x, (D,), attention_norm, eps=1e-5), to_qkv).view(B, T, 3, c.n_heads, -1)
            rotated = torch.addcmul(qkv * cos, qkv.roll(qkv.shape[-1] // 2, dims=-1), sin).permute(2, 0, 3, 1, 4)
            kv.index_copy_(3, positions, rotated[1:])  # (2, B, H, T, D/H)
            k, v = kv[:, :, :, :n_seen]
            if n_seen is None:  # fused, 1.2 (B = 1) to 3.7 times (8) as fast as SDPA with a mask
                weights = (rotated[0] @ k.mT * scale).masked_fill(self.positions > positions, -math.inf)
                pooled = weights.softmax(dim=-1) @ v
            else:  # the prompt sees its past only; a single new token may look at everything before it
                pooled = F.scaled_dot_product_attention(rotated[0], k, v, is_causal=T > 1, scale=scale)
            x = torch.addmm(x, pooled.transpose(1, 2).reshape(B * T, D), to_out)
            gate, up = F.linear(F.rms_norm(x, (D,), mlp_norm, eps=1e-5), to_gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), from_hidden)
        last = F.rms_norm(x.view(B, T, D)[:, -1], (D,), self.norm, eps=1e-5) * c.mup_ratio
        return F.linear(last, self.embedding)[:, : c.vocab_size].float()

    def record(self):
        """The compiled step as a CUDA graph: replayed, its kernels start without Python."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and allocates first; the same step once more changes nothing
            for _ in range(3):
                self.compiled_step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.compiled_step(*self.inputs)


def sample_from(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one index from each row of logits (B, V) -> (B,).

    By one uniform number a row and the cumulated probabilities: torch.multinomial draws one a choice, and takes a tenth
    of a small model's time.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    order = None
    if top_k or top_p < 1:  # most probable first
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = (logits if temperature == 1 else logits / temperature).softmax(dim=-1)
    cumulated = p.cumsum(dim=-1)
    # What counts is a prefix: a choice is out when those before it have top_p already.
    last = (cumulated - p < top_p).sum(dim=-1, keepdim=True) - 1 if top_p < 1 else cumulated.shape[-1] - 1
    total = cumulated.gather(1, last) if top_p < 1 else cumulated[:, -1:]
    u = torch.rand(len(p), 1, device=p.device, generator=generator) * total
    index = torch.searchsorted(cumulated, u, right=True).clamp(max=last)
    return (index if order is None else order.gather(1, index))[:, 0]


def load_checkpoint(path, device="cpu"):
    """The dictionary that train.py saved: model, optimizer, step, config (of the model), tokenizer (its hash) and more.

    Nothing in the file is executed (weights_only=True). Raises OSError where there is no such file and ValueError, in
    one line, where it is something else.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)  # read as it is needed
        checkpoint["config"] = Config(**checkpoint["config"])
        checkpoint["model"], checkpoint["step"], checkpoint["tokenizer"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint written by train.py") from error
    return checkpoint


def load(path, device="cpu", compute_dtype=torch.float32):
    """The model of a checkpoint written by train.py, ready for features and samples."""
    return from_checkpoint(load_checkpoint(path), device, compute_dtype)


def from_checkpoint(checkpoint, device="cpu", compute_dtype=torch.float32):
    model = Toto(checkpoint["config"], compute_dtype)
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval().requires_grad_(False)


def export_hf(model, folder):
    """Write the model as a folder that transformers' LlamaForCausalLM.from_pretrained reads: the same logits.

    config.json and model.safetensors, in float32, without the embedding's padding rows. The safetensors format is the
    length of a JSON header (8 bytes, little-endian), the header (dtype, shape and place of each tensor), the bytes.
    """
    c, folder = model.config, Path(folder)
    embedding = model.embedding.weight[: c.vocab_size]
    tensors = {"model.embed_tokens.weight": embedding}
    if c.mup_width:  # LLaMA has no µP: its two multipliers go into the weights, and the embeddings are untied
        tensors["lm_head.weight"] = embedding * c.mup_ratio
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        q = q * math.sqrt(c.mup_ratio)
        gate, up = block.mlp.gate_up.weight.chunk(2)
        layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
        layer |= {"self_attn.o_proj": block.attention.out.weight}
        layer |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.mlp.out.weight}
        layer |= {"input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.mlp_norm.weight}
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    tensors["model.norm.weight"] = model.norm.weight
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "vocab_size": c.vocab_size, "hidden_size": c.dim, "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_heads,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": c.rope_base, "max_position_embeddings": 4098,
        "tie_word_embeddings": not c.mup_width, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": VIDEO_START, "eos_token_id": END, "pad_token_id": 0,
    }  # fmt: skip
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors.tmp", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main():
    parser = argparse.ArgumentParser(description="List the sizes, or export a trained model to Hugging Face's format.")
    add = parser.add_argument
    add("--export", metavar="FOLDER", help="write a LlamaForCausalLM folder here")
    add("--checkpoint", default="out/toto.pt", help="a model trained by train.py (default: out/toto.pt)")
    args = parser.parse_args()
    if args.export:
        export_hf(load(args.checkpoint), args.export)
        print(f"wrote {args.export}: AutoModelForCausalLM.from_pretrained({args.export!r}) reads it")
        return
    print("size    width  heads  layers   MLP  parameters, with 8,192 codes")
    for name, c in SIZES.items():
        with torch.device("meta"):
            n = Toto(c).count_parameters()
        print(f"{name:<6} {c.dim:>6} {c.n_heads:>6} {c.n_layers:>7} {c.hidden:>5}  {n / 1e6:,.2f} M")


if __name__ == "__main__":
    import data

    data.run(main)
