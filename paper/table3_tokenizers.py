"""Table 3 and Figures 3, 12, 13: which tokens are best? The dVAE's, a VQGAN's, or patches of pixels without any codes.

This part is the paper's other tokenizer, the VQGAN of "Taming Transformers" (Esser et al., 2020, f = 16): every 16x16
pixels of a frame become one of 1,024 or of 16,384 codes. `load_vqgan` reads the published checkpoints; `train_vqgan`
trains a narrow one in two minutes on two cores. It encodes and decodes with the interface of `dvae.DVAE`.

From top to bottom: the architecture, reading and writing files, the training.
Shape letters: N frames, H and W pixels, h = H/16 and w = W/16 codes, C channels, D numbers in a code's embedding,
V vocabulary.
"""

import math
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts are modules of the folder above

import data
import dvae


@dataclass(frozen=True)
class Config:
    ch: int = 128  # width of the first level
    ch_mult: tuple = (1, 1, 2, 2, 4)  # of each level, in widths of the first; each but the last halves the resolution
    blocks: int = 2  # at each level of the encoder; the decoder has one more
    attention: tuple = (4,)  # the levels with attention: of 256-pixel frames, the 16x16 grid
    z_channels: int = 256
    embed_dim: int = 256  # D
    vocab_size: int = 16384
    groups: int = 32  # of channels that GroupNorm normalises together


# Not in the paper: narrow tokenizers that two cores train in minutes. Four groups are four channels each at the first
# level and sixteen at the last, as in the published model. With few numbers in an embedding k-means covers them better.
SMALL = Config(ch=16, blocks=1, z_channels=64, embed_dim=8, vocab_size=64, groups=4)
LARGE = replace(SMALL, vocab_size=1024)


class Conv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input; parameters stay in float32."""

    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class Norm(nn.GroupNorm):
    """The same of GroupNorm, which takes means over (C / groups, H, W)."""

    def __init__(self, groups, channels):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), where x goes through a 1x1 convolution if the width changes."""

    def __init__(self, n_in, n_out, groups):
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, n_in), Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = Norm(groups, n_out), Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # swish is SiLU: x · sigmoid(x)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """x + attention among all places of the grid: one head as wide as x, and so a scale of C^-½."""

    def __init__(self, n, groups):
        super().__init__()
        self.norm = Norm(groups, n)
        self.q, self.k, self.v, self.proj_out = (Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # (N, 1, h w, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y[:, 0].mT.reshape(x.shape))  # (N, 1, h w, C) -> (N, C, h, w)


class Level(nn.Module):
    """Residual blocks at one resolution, on some levels each with attention after it, and the change of resolution."""

    def __init__(self, widths, groups, has_attention):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n, m, groups) for n, m in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(m, groups) for m in widths[1:] if has_attention)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return x


def middle(n, groups):
    block_1, block_2 = ResnetBlock(n, n, groups), ResnetBlock(n, n, groups)
    return nn.Sequential(OrderedDict(block_1=block_1, attn_1=AttnBlock(n, groups), block_2=block_2))


def halve(n):
    """(N, n, H, W) -> (N, n, H/2, W/2), with zeros to the right and below alone."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=Conv2d(n, n, 3, stride=2)))


def double(n):
    """(N, n, h, w) -> (N, n, 2h, 2w)."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=Conv2d(n, n, 3, padding=1)))


# The two tables below are the architecture. The names in them are those of the published weights.
class Encoder(nn.Module):
    """Pixels (N, 3, H, W) -> (N, z_channels, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in (1, *config.ch_mult)]
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (n, m) in enumerate(pairwise(widths)):
            self.down.append(Level([n] + config.blocks * [m], config.groups, i in config.attention))
            self.down[i].downsample = halve(m) if i < len(config.ch_mult) - 1 else nn.Identity()
        self.mid = middle(m, config.groups)
        self.norm_out, self.conv_out = Norm(config.groups, m), Conv2d(m, config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(N, z_channels, h, w) -> pixels (N, 3, H, W). Its levels are numbered as the encoder's and run from the last."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * m for m in (*config.ch_mult, config.ch_mult[-1])]
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], config.groups)
        self.up = nn.ModuleList()
        for i, (m, n) in enumerate(pairwise(widths)):
            self.up.append(Level([n] + (config.blocks + 1) * [m], config.groups, i in config.attention))
            self.up[i].upsample = double(m) if i > 0 else nn.Identity()
        self.norm_out, self.conv_out = Norm(config.groups, config.ch), Conv2d(config.ch, 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """A tokenizer with the interface of `dvae.DVAE`; the code of a place is the nearest entry of a codebook.

    `compute_dtype` is the dtype of the activations; parameters, and all that decides between codes, stay in float32.
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.pixels_per_code = 2 ** (len(config.ch_mult) - 1)  # 16
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.vocab_size, config.embed_dim)})
        self.post_quant_conv = Conv2d(config.embed_dim, config.z_channels, 1)

    def latents(self, frames):
        """uint8 frames (N, H, W, 3) -> float32 latents z (N, h, w, D). [0, 255] is mapped to [-1, 1]."""
        frames = torch.as_tensor(frames, device=self.quant_conv.weight.device)
        x = self.encoder((frames.permute(0, 3, 1, 2).to(self.compute_dtype) / 127.5 - 1).contiguous())
        weight = self.quant_conv.weight[:, :, 0, 0]  # as a matrix product, which GPUs do not round to TF32
        return F.linear(x.float().permute(0, 2, 3, 1), weight, self.quant_conv.bias)

    def nearest(self, z):
        """Latents (N, h, w, D) -> codes (N, h, w): argmin over k of |z - E_k|², where |z|² is the same for all k."""
        E = self.quantize.embedding.weight
        return (E.pow(2).sum(dim=1) - 2 * z @ E.t()).argmin(dim=-1)

    def to_pixels(self, e):
        """Embedded codes (N, h, w, D) -> colours around [-1, 1], float32 (N, 3, H, W)."""
        return self.decoder(self.post_quant_conv(e.permute(0, 3, 1, 2).to(self.compute_dtype).contiguous())).float()

    def forward(self, frames, has_codes=True):
        """uint8 frames (N, H, W, 3) -> colours (N, 3, H, W), latents z and embedded codes e (N, h, w, D).

        The step from z to e has no gradient, so z gets that of e (straight through). Without codes, e is z.
        """
        z = self.latents(frames)
        e = self.quantize.embedding(self.nearest(z)) if has_codes else z
        return self.to_pixels(z + (e - z).detach()), z, e

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames (N, H, W, 3), numpy or torch, H and W multiples of 16 -> codes int64 (N, h, w)."""
        _, H, W, _ = frames.shape
        if H % self.pixels_per_code or W % self.pixels_per_code:
            raise ValueError(f"frames of {W}x{H} pixels: width and height must be multiples of {self.pixels_per_code}")
        return self.nearest(self.latents(frames))

    @torch.no_grad()
    def decode(self, codes):
        """codes int64 (N, h, w) -> uint8 frames (N, H, W, 3)."""
        pixels = self.to_pixels(self.quantize.embedding(codes)).clamp(-1, 1)
        return (127.5 * (pixels + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)

    fingerprint = dvae.DVAE.fingerprint


class Inert:
    """Stands in for the classes and functions that a checkpoint mentions: takes what it is given and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class InertDict:
    """The same for classes of dictionaries, which are then filled: makes a plain one."""

    def __new__(cls, *args):
        return OrderedDict()


def names_in(path):
    """The names of the classes and functions that a checkpoint's pickle mentions; to read them executes nothing."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with open(path, "rb") as file:  # of PyTorch before 1.6: a magic number, a version, the system's sizes, the object
        parts = [part for _ in range(4) for part in pickletools.genops(file)]
    names = [name.replace(" ", ".") for opcode, name, _ in parts if opcode.name == "GLOBAL"]
    return [name.replace("__builtin__.", "builtins.") for name in names]  # called so since Python 3


def save(model, path):
    """Write a model in taming's layout, with the number of groups beside it, which no shape tells."""
    with data.atomic_open(path) as file:
        torch.save({"state_dict": model.state_dict(), "groups": model.config.groups}, file)


def load_vqgan(path, device="cpu", compute_dtype=torch.float32):
    """Read a VQGAN, ready to encode: a checkpoint of taming-transformers, or a file of `save`.

    The published files are pickles of PyTorch Lightning that mention its classes and others. Nothing in them is
    executed: weights_only=True reads tensors, and every name that it does not know gets a stand-in. The config is read
    off the names and shapes of the weights. Raises OSError where there is no such file and ValueError, in one line,
    where it is something else, such as a VQGAN with Gumbel noise.
    """
    try:
        stand_ins = [(InertDict if name.lower().endswith("dict") else Inert, name) for name in names_in(path)]
        with torch.serialization.safe_globals(stand_ins):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        parts = ("encoder.", "quant_conv.", "quantize.", "post_quant_conv.", "decoder.")  # without the losses' networks
        weights = {name: weight for name, weight in saved["state_dict"].items() if name.startswith(parts)}
        model = VQGAN(read_config(weights, saved.get("groups", 32)), compute_dtype)
        model.load_state_dict(weights)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a VQGAN checkpoint of taming-transformers, nor one of ours") from error
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def read_config(weights, groups):
    """The Config of weights {name: tensor}."""
    count = lambda pattern: sum(re.fullmatch(pattern, name) is not None for name in weights)
    ch, n_levels = len(weights["encoder.conv_in.weight"]), count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight")
    return Config(
        ch=ch,
        ch_mult=tuple(len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) // ch for i in range(n_levels)),
        blocks=count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight"),
        attention=tuple(i for i in range(n_levels) if f"encoder.down.{i}.attn.0.q.weight" in weights),
        z_channels=len(weights["encoder.conv_out.weight"]),
        embed_dim=weights["quantize.embedding.weight"].shape[1],
        vocab_size=len(weights["quantize.embedding.weight"]),
        groups=groups,
    )


# Not in the paper: what suits two cores. Of dvae's recipe only batch, rates and the share of the warm start matter.
RECIPE = replace(dvae.LAPTOP, steps=600, batch=8, lr=2e-3, lr_end=4e-5, warm_start=0.3)


def train_vqgan(read_pool, config, recipe=RECIPE, seed=0, device=torch.device("cpu"), compute_dtype=torch.float32,
                path=None, settings={}, save_every=1000):  # fmt: skip
    """Train a VQGAN; all processes call this. Arguments and what is raised are those of `dvae.train`.

    Not in the paper: the loss has no discriminator and no perceptual network, for which two cores are too few. And the
    first steps are without codes, or most of the codebook would never be used: its entries are placed among latents
    that mean something, by k-means.
    """
    if recipe.batch % data.world_size():
        raise ValueError(f"{recipe.batch} frames a step cannot be shared evenly by {data.world_size()} processes")
    torch.manual_seed(seed)
    model = VQGAN(config, compute_dtype).to(device)
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)  # each block begins as the identity: 1.1 dB after 400 steps
    read_pool, first = lru_cache(maxsize=1)(read_pool), dvae.warm_steps(recipe)
    optimizer, trained = dvae.start_phase(model, recipe, device, find_unused_parameters=True)  # the codebook, at first
    file = data.state_file(path, {"model": model, "optimizer": optimizer}, settings) if path else {}
    for step, bar in data.resumable_steps("VQGAN", recipe.steps, **file, save_every=save_every):
        if step == first:
            place_codes(model, read_pool(0), seed)
        pixels, target, _ = dvae.draw_frames(read_pool, recipe, seed, step, device)
        output, z, e = trained(pixels, step >= first)
        loss = (output - (2 * target - 1)).abs().mean() + codebook_loss(z, e)
        dvae.update(optimizer, loss, dvae.schedule(recipe, step)[0], recipe.clip, step)
        if step % 20 == 0:
            mse = ((output.detach().clamp(-1, 1) + 1) / 2 - target).pow(2).mean().clamp(min=1e-9)
            words = f"loss {loss.item():.4f}, PSNR {-10 * mse.log10().item():.1f} dB"
            if step >= first:
                words += f", perplexity {dvae.perplexity_of(model.nearest(z.detach())):.0f}"
            bar.set_postfix_str(words, refresh=False)
    return model.eval().requires_grad_(False)


def codebook_loss(z, e):
    """|sg(z) - e|² + 0.25 |z - sg(e)|², as means: entries come to their latents, and latents stay near their entries.

    sg is no gradient (van den Oord et al., 2017, Eq. 3). It is 0 where e is z.
    """
    return (z.detach() - e).pow(2).mean() + 0.25 * (z - e.detach()).pow(2).mean()


@torch.no_grad()
def place_codes(model, frames, seed):
    """Make the codebook centres of the latents of uint8 frames (N, H, W, 3), the same in all processes."""
    frames = np.random.default_rng(seed).permutation(frames)[:1000]
    z = torch.cat([model.latents(frames[i : i + 32]).flatten(0, 2) for i in range(0, len(frames), 32)])
    codebook, _ = dvae.k_means(z, model.config.vocab_size, torch.Generator().manual_seed(seed))
    model.quantize.embedding.weight.copy_(codebook)
    if data.world_size() > 1:
        torch.distributed.broadcast(model.quantize.embedding.weight, 0)
