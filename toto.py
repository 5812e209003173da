"""Toto's transformer: the LLaMA-style causal model of §3.1 and §3.2, in one file.

    Eq. 1-2   Toto.forward, Toto.loss: next-token log-likelihood of a flat sequence of visual tokens
    Eq. 3-4   Block.forward: pre-norm attention, then pre-norm SwiGLU MLP
    Table 1, Table 15   SIZES
    §3.5      Toto.features: H_l, the residual stream after layer l
    A.8       Toto.generate: one token at a time, with a cache of keys and values

It imports nothing of ours and is no program; `train.py`, `probe.py` and `sample.py` build on it. `load` reads a
checkpoint of `train.py`. The file ends with the fast forms of two functions.
Shape letters: B batch, T tokens, D width, H heads, L layers, V vocabulary, N places in a cache.
"""

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
            embedding, norms         unchanged      unchanged
            matrices of the blocks   · √ratio       · ratio         (weight decay / ratio: rate · decay stays)
            logits (tied)                                           · ratio
            attention scores                                        · √ratio: they shrink with D/H, not its root

        A learning rate tuned at the base width should then suit every width, at the same numbers of heads and layers:
        Fig. 11 says so at the paper's scale, and paper/figure9_scaling.py tries it at a laptop's.
        """
        return self.mup_width / self.dim if self.mup_width else 1.0


# Table 1 (base, large, 1b) and Table 15 (a1 to a6). Not in the paper: the MLP's hidden width. No single ratio gives the
# printed parameter counts of Table 1, so base and large use 4 D and 1b uses LLaMA's 8/3 D rounded up to 256, which
# rounds to all three. Table 15's counts fit no standard block; with 4 D and 8,192 codes, a1 to a6 come out 1 to 13 %
# below them. A.5's text has widths of 64 to 1,536 and 12 to 48 layers, where the table has 256 to 1,792 and 12 to 32;
# these are the table's. `tiny` is ours: what two CPU cores can train in minutes. With a small base all frequencies of
# RoPE turn fast, so that "a row above" and "a frame ago" are soon told from their neighbours. Beside each, its number
# of parameters.
SIZES = {
    "tiny": Config(dim=128, n_heads=4, n_layers=4, hidden=384, rope_base=20.0),  # 1.90 M
    "base": Config(dim=768, n_heads=12, n_layers=12, hidden=3072),          # 119.56 M
    "large": Config(dim=1024, n_heads=16, n_layers=16, hidden=4096),        # 276.86 M
    "1b": Config(dim=2048, n_heads=16, n_layers=22, hidden=5632),           # 1,147.24 M
    "a1": Config(dim=256, n_heads=16, n_layers=12, hidden=1024),            # 14.69 M
    "a2": Config(dim=512, n_heads=16, n_layers=16, hidden=2048),            # 71.32 M
    "a3": Config(dim=768, n_heads=16, n_layers=20, hidden=3072),            # 195.07 M
    "a4": Config(dim=1024, n_heads=16, n_layers=24, hidden=4096),           # 411.10 M
    "a5": Config(dim=1536, n_heads=16, n_layers=28, hidden=6144),           # 1,069.64 M
    "a6": Config(dim=1792, n_heads=16, n_layers=32, hidden=7168),           # 1,658.97 M
}


def is_tiny(config):
    """Whether a model is `tiny`, whatever its vocabulary and its RoPE's base: its defaults are a laptop's."""
    return (config.dim, config.n_layers) == (SIZES["tiny"].dim, SIZES["tiny"].n_layers)


class Linear(nn.Linear):
    """A bias-free matrix, stored in float32 for the optimizer, that multiplies in the dtype of its input.

    Unlike under autocast, all activations are then in bfloat16, the residual stream too: less memory to move.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """§3.2: x / sqrt(mean(x²) + ε) · weight (Zhang & Sennrich, 2019). Not in the paper: ε = 1e-5, as in Llama 2."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-5)


def rope_table(positions, head_dim, base):
    """§3.2: RoPE (Su et al., 2024) as two tables (T, head_dim) that `apply_rope` multiplies with.

    The angle of pair i at position p is p · base^(-2i / head_dim), i < head_dim / 2. Not in the paper: p is the index
    in the flat sequence, so a frame's second row lies w positions after its first; there is no two- or
    three-dimensional position.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float()[:, None] * frequencies  # (T, head_dim/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """Turn the pairs (x_i, x_{i + head_dim/2}) of x (…, T, head_dim) by the angles of their position.

    (a, b) becomes (a cos - b sin, b cos + a sin). Pairing the two halves, not neighbours, is the convention of Hugging
    Face's Llama; rolling x by half its width puts each number where its partner was.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def attend(q, k, v, causal, ratio=1.0, future=None):
    """softmax(q kᵀ √ratio / √(D/H)) v for q, k, v (B, H, T, D/H); causal hides later keys from each query.

    `ratio` is Config.mup_ratio. `future` (N,), for one token that looks into a cache, is True where nothing is yet.
    """
    scale = math.sqrt(ratio / q.shape[-1])
    if future is not None:  # torch.compile fuses this: at batch 8 on a CPU 3.7 times as fast as SDPA with a mask
        return (q @ k.mT * scale).masked_fill(future, -math.inf).softmax(dim=-1) @ v
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] > 256:
        return attend_in_blocks(q, k, v, causal, scale)  # the same, faster: at the end of this file
    # No mask tensor, only the flag: with a mask the fused kernels are not taken.
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


class Attention(nn.Module):
    """MHSA of Eq. 3 (§3.2): multi-head self-attention with RoPE on queries and keys, no biases."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.ratio = config.n_heads, config.mup_ratio
        self.qkv = Linear(config.dim, 3 * config.dim)  # one product for the three projections
        self.out = Linear(config.dim, config.dim)

    def forward(self, x, rope, causal=True, past=None):
        """x (B, T, D) -> (B, T, D). `past` is this layer's part of a Cache, when tokens come one by one (A.8)."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D/H)
        (q, k), v, future = apply_rope(qkv[:2], *rope), qkv[2], None
        if past is not None:  # remember the new keys and values, and look at all that came before as well
            (keys, values), positions, future = past
            k, v = keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)  # (B, H, N, D/H)
        x = attend(q, k, v, causal, self.ratio, future)
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

    def forward(self, x, rope, causal=True, past=None):
        # Eq. 3: Ĥ_{l+1} = H_l + MHSA(RMS-norm(H_l))
        x = x + self.attention(self.attention_norm(x), rope, causal, past)
        # Eq. 4: H_{l+1} = Ĥ_{l+1} + MLP(RMS-norm(Ĥ_{l+1}))
        return x + self.mlp(self.mlp_norm(x))


class Toto(nn.Module):
    """The causal transformer of §3.2 over visual token ids.

    `compute_dtype` is the dtype of activations and matrix products; parameters stay in float32. `recompute` keeps only
    each block's input for the backward pass, which runs the block again: less memory, a third more products.

    For §4.1's comparisons: a sequence may also be given as embeddings, a floating-point (B, T, D) in place of ids
    (B, T), and `block` and `norm` may be those of another architecture.
    """

    recompute = False

    def __init__(self, config, compute_dtype=torch.float32, block=Block, norm=RMSNorm):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        # 8,196 rows are padded to 8,320, a multiple of 128, which suits matrix units; the padding enters no loss and no
        # sample. Not in the paper: input and output embeddings are tied, as the counts of Table 1 ask for.
        self.embedding = nn.Embedding(math.ceil(config.vocab_size / 128) * 128, config.dim)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = norm(config.dim)
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
        """Training FLOPs per token of sequences of n_tokens: 6 N + 12 L D T.

        The tied matrix counts once, as the output layer; attention in full, though the causal kernel skips half of it.
        """
        return 6 * self.count_parameters() + 12 * self.config.n_layers * self.config.dim * n_tokens

    def residual_stream(self, ids, causal=True, rope=None, pasts=None):
        """Yield H_0, H_1, … H_L, each (B, T, D): the embedding, then the residual stream after every block.

        `rope` and `pasts` come from a Cache, whose tokens do not start at position 0.
        """
        if rope is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            rope = rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_base)
            rope = [table.to(self.compute_dtype) for table in rope]
        x = ids if ids.is_floating_point() else F.embedding(ids, self.embedding.weight)  # (B, T) -> (B, T, D)
        x = x.to(self.compute_dtype)
        yield x
        for block, past in zip(self.blocks, pasts or [None] * len(self.blocks)):
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, rope, causal, use_reentrant=False)
            else:
                x = block(x, rope, causal, past)
            yield x

    def logits(self, x):
        """H_L (…, D) -> float32 logits (…, V). The float32 copy leaves out the embedding's padding rows."""
        x = self.norm(x) * self.config.mup_ratio
        return F.linear(x, self.embedding.weight.to(x.dtype))[..., : self.config.vocab_size].float()

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T), the negative log-likelihood in nats per token.

        §3.1, Eq. 1: log p(x) = Σ_i log p(x_i | x_{i-1} … x_1), one term a position, all in one causal pass.
        """
        for x in self.residual_stream(ids):
            pass
        return self.logits(x) if targets is None else self.loss(x, targets)

    def loss(self, x, targets):
        """Eq. 2, L = E[-log p(x)], from H_L (B, T, D) and the ids that come next, targets (B, T).

        Not in the paper: averaged per token, in nats, so that it can be read at any length.
        """
        if not torch.is_grad_enabled():
            return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())
        # In training the same, without ever holding all logits: 2.4 times as fast on a CPU. At the end of this file.
        x, weight = self.norm(x) * self.config.mup_ratio, self.embedding.weight
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), self.config.vocab_size)

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
    def generate(self, ids, n_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, progress=None, cache=None):
        """Continue ids (B, T) by n_tokens codes (A.8) -> (B, T + n_tokens).

        Only codes are drawn, never a start, end or padding id. temperature 0 takes the most probable code, top_k > 0
        keeps the k most probable, top_p < 1 the fewest that together have that probability. `progress`, if given, is
        called after each token. `cache`: one for B sequences of T + n_tokens ids or more, to use it again.
        """
        B, T = ids.shape
        cache = cache or Cache(self, B, T + n_tokens)
        if cache.batch_size != B or len(cache.positions) < T + n_tokens:
            size = f"{cache.batch_size} sequences of up to {len(cache.positions)} ids"
            raise ValueError(f"the cache is for {size}, not {B} of {T + n_tokens}")
        cache.length = 0
        out, new = [ids], ids  # the prompt goes through the model in one pass, then one token at a time
        with torch.inference_mode():  # a sixth faster than no_grad alone
            for _ in range(n_tokens):
                code_logits = cache(new)[:, FIRST_CODE:]  # (B, V - 4)
                new = FIRST_CODE + sample_from(code_logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
                out.append(new)
                if progress:
                    progress()
        return torch.cat(out, dim=1)  # an ordinary tensor again


class Cache:
    """Keys and values of all tokens so far: what comes next costs one pass over the new token alone (A.8).

    Called with new ids it gives the logits after them, by the forward pass of training (Eq. 3 and 4).

    compile=True makes the step of one token one compiled graph, before it returns: 5 to 13 seconds on a CPU, after
    which `tiny` draws 1.6 to 2.5 times as many tokens a second. Its shapes must not change, so it reads all N places
    and hides those still empty. On CUDA "reduce-overhead" records the graph: its kernels then start without Python.
    """

    def __init__(self, model, batch_size, n_tokens, compile=False):
        c, device = model.config, model.embedding.weight.device
        self.model, self.batch_size, self.length, self.compiled_step = model, batch_size, 0, None
        self.positions = torch.arange(n_tokens, device=device)
        rope = rope_table(self.positions, c.dim // c.n_heads, c.rope_base)
        self.rope = [table.to(model.compute_dtype) for table in rope]  # two (N, D/H)
        # Zeros: a hidden value has weight 0, and 0 · NaN is NaN. Keys and values lie apart: writing into a part of
        # a tensor would make the compiled step copy all of it.
        shape = batch_size, c.n_heads, n_tokens, c.dim // c.n_heads
        zeros = lambda: torch.zeros(shape, dtype=model.compute_dtype, device=device)
        self.layers = [(zeros(), zeros()) for _ in model.blocks]
        if compile:
            for tensor in sum(self.layers, ()):
                torch._dynamo.mark_static_address(tensor)  # a recorded graph may then write into it
            self.compiled_step = torch.compile(self.step, dynamic=False, fullgraph=True, mode="reduce-overhead")
            with torch.inference_mode():
                self(torch.zeros(batch_size, 1, dtype=torch.long, device=device))

    def __call__(self, ids):
        """ids (B, T), the prompt, or one token after what has been given -> float32 logits (B, V) after the last."""
        positions = self.positions[self.length : self.length + ids.shape[1]]
        self.length += ids.shape[1]
        if ids.shape[1] > 1 or not self.compiled_step:
            return self.step(ids, positions, self.length)
        # Copies: what goes in must have one layout, or it compiles again; the next replay overwrites what comes out.
        return self.compiled_step(ids.clone(), positions).clone()

    def step(self, ids, positions, n_seen=None):
        """Logits after ids (B, T) at `positions` (T,), which see n_seen places; without it, all up to the position."""
        rope = [table.index_select(0, positions) for table in self.rope]
        future = self.positions > positions if n_seen is None else None
        seen = [layer if n_seen is None else [x[:, :, :n_seen] for x in layer] for layer in self.layers]
        pasts = [(layer, positions, future) for layer in seen]
        for x in self.model.residual_stream(ids, ids.shape[1] > 1, rope, pasts):  # a single token may see all before it
            pass
        return self.model.logits(x[:, -1])


def continue_video(model, codes, n_frames, window, start=VIDEO_START, progress=None, **how):
    """A.8: continue codes int64 (B, F, h, w) to n_frames frames, (B, n_frames, h, w). `how` goes to Toto.generate.

    The model has learned windows of `window` frames. Up to there a sequence is simply continued. Beyond (64 frames in
    A.8), not in the paper: at every frame boundary the oldest frame is dropped, and the start token and the kept frames
    are run afresh at their new positions, so that each frame is sampled exactly as the model would after that prompt.
    Whole frames are dropped because the model knows where in a frame it is by the count of tokens alone.
    """
    B, _, h, w = codes.shape
    while codes.shape[1] < n_frames:
        kept = codes[:, -(window - 1) :]
        new = min(window, n_frames) - kept.shape[1] if codes.shape[1] < window else 1
        ids = torch.cat((kept.new_full((B, 1), start), kept.flatten(1) + FIRST_CODE), dim=1)
        ids = model.generate(ids, new * h * w, progress=progress, **how)
        added = ids[:, -new * h * w :].view(B, new, h, w) - FIRST_CODE
        codes = torch.cat((codes, added), dim=1)
    return codes


def for_sampling(model, batch_size=1, compile=False):
    """The model with its weights in the dtype in which it draws fastest, so that no step rounds float32 masters.

    Below 20 M parameters on a CPU that is float32, unless a compiled step draws for several sequences.
    """
    is_cpu = model.embedding.weight.device.type == "cpu"
    if is_cpu and model.count_parameters() < 20e6 and not (compile and batch_size > 1):
        model.compute_dtype = torch.float32
    return model.to(model.compute_dtype)


def sample_from(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one index from each row of logits (B, V) -> (B,): inverse-CDF sampling, with one uniform number per row.

    torch.multinomial draws one per choice, which takes a tenth of a small model's time.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    order = None
    if top_k or top_p < 1:  # most probable first
        logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = (logits if temperature == 1 else logits / temperature).softmax(dim=-1)
    cumulated = p.cumsum(dim=-1)
    # top_p keeps a prefix: a choice is out when those before it already have top_p together.
    last = (cumulated - p < top_p).sum(dim=-1, keepdim=True) - 1 if top_p < 1 else cumulated.shape[-1] - 1
    total = cumulated.gather(1, last) if top_p < 1 else cumulated[:, -1:]
    u = torch.rand(len(p), 1, device=p.device, generator=generator) * total
    index = torch.searchsorted(cumulated, u, right=True).clamp(max=last)
    return (index if order is None else order.gather(1, index))[:, 0]


def load_checkpoint(path, device="cpu"):
    """The dictionary that train.py saved: model, optimizer, step, config (of the model), tokenizer (its hash) and more.

    Nothing in the file is executed (weights_only=True). Raises OSError where there is none, ValueError where it is
    something else.
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

    config.json and model.safetensors, in float32, without the embedding's padding rows. A safetensors file is the
    length of a JSON header (8 bytes, little-endian), the header (dtype, shape, place of each tensor), the bytes.
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


# The fast forms of `attend` and of Eq. 2. They change nothing but rounding, time and memory.
def attend_in_blocks(q, k, v, causal, scale):
    """`attend` for long bfloat16 sequences on a CPU, whose fused kernel leaves the matrix units mostly idle.

    Plain products of some 256 queries at a time with the keys that they see: 1.3 to 1.7 times as fast, forward and
    backward, at 1,024 tokens.
    """
    B, _, T, _ = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B·H, T, D/H)
    future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    blocks, end = [], 0
    for queries in q.tensor_split(math.ceil(T / 256), dim=1):
        start, end = end, end + queries.shape[1]
        seen = end if causal else T
        scores = torch.baddbmm(future[start:end, :seen], queries, k[:, :seen].mT, beta=int(causal), alpha=scale)
        blocks.append(scores.softmax(dim=-1) @ v[:, :seen])
    return torch.cat(blocks, dim=1).unflatten(0, (B, -1))


# How many logits ChunkedCrossEntropy holds at once: on a CPU few enough to stay in its cache, on a GPU enough to keep
# it busy.
CHUNK = {"cpu": 2**22, "cuda": 2**25}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Eq. 2 of x (n, D), the output matrix (V padded, D) and targets (n,), without ever holding all logits at once.

    The logits of 4,097 ids over 8,196 choices are the largest tensor of a step by far. Here some rows of them exist at
    a time, and the gradient is taken while they do: the same number of products, and on a CPU 2.4 times as fast.
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
            # ∂L/∂logits = (softmax - one-hot) / n
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
