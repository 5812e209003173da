"""Table 3 and Figs. 3, 12 and 13 (§4.1, A.6): does the tokenizer matter? Codes of a dVAE, of a VQGAN, or patches.

    python paper/table3_tokenizers.py                 on images of the built-in world, under 20 minutes on two cores
    python paper/table3_tokenizers.py --data IMAGES --probe FOLDER           on your own; FOLDER as for probe.py
    python paper/table3_tokenizers.py --data IMAGES                          the figures alone: n_grams.json, .png
    torchrun --nproc_per_node=8 paper/table3_tokenizers.py --size large --data IMAGES --probe FOLDER
             --tokenizer dall-e --vqgan 1024.ckpt 16384.ckpt                 as in the paper, with published tokenizers

One trunk sees the same images in the same order in six ways: codes in and out, of the dVAE at two resolutions and of
two VQGANs; patches in and out; patches in and codes out. Linear probes say how good its features then are. Prints the
paper's table beside ours and the figures of the tokenizers' n-grams, and writes table3.json and table3.png to --out,
where the trained VQGANs stay too; run again, it resumes where it stopped. For the rows of patches the images are kept
as pixels in --out: 252 GB for ImageNet at 256 pixels.

From top to bottom: the VQGAN of "Taming Transformers" (Esser et al., 2020, f = 16), reading taming's checkpoints,
training a narrow one, the ways to feed a trunk, a run, the n-grams, the program.
Shape letters: N frames, H and W pixels, h and w codes or patches, C channels, D numbers in an embedding, V vocabulary,
B sequences of T places, P pixels and colours of a patch.
"""

import math
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts are modules of the folder above

import data
import dvae
import probe
import toto
import train


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
# level and sixteen at the last, as in the published model.
SMALL = Config(ch=16, blocks=1, z_channels=64, embed_dim=16, vocab_size=64, groups=4)
LARGE = replace(SMALL, vocab_size=1024)


class Conv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input; parameters stay in float32."""

    def forward(self, x):
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride, self.padding)


class Norm(nn.GroupNorm):
    """GroupNorm, over (C / groups, H, W), in the dtype of its input likewise."""

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
    """(N, n, H, W) -> (N, n, H/2, W/2), padded with zeros on the right and at the bottom only, as in taming."""
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
        # On a CPU, GroupNorm in bfloat16, there and back, takes 11 times as long in channels_last as in this layout.
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

    grid, fingerprint = dvae.DVAE.grid, dvae.DVAE.fingerprint


class Inert:
    """Stands in for the classes and functions that a checkpoint mentions: takes what it is given and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class InertDict:
    """Stands in for classes of dictionaries: gives a plain one, which is then filled."""

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


def save(model, path, settings={}):
    """Write a model in taming's layout; beside it how it was made, and the number of groups, which no shape tells."""
    with data.atomic_open(path) as file:
        torch.save({"state_dict": model.state_dict(), "groups": model.config.groups, "settings": settings}, file)


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


# Not in the paper: what suits two cores. Of dvae's recipe, steps, batch, rates, clipping and the share of the warm
# start are used. Many small steps do better than few large ones: with 1,024 codes, held-out photographs of 96 pixels
# come out at 17.5 dB so, and at 16.7 dB after 600 steps of 8 frames.
RECIPE = replace(dvae.LAPTOP, steps=1200, batch=4, lr=1e-3, lr_end=4e-5, warm_start=0.5)


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
            nn.init.zeros_(module.conv2.weight)  # blocks begin close to the identity: +1.1 dB after 400 steps
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
    frames = frames[np.random.default_rng(seed).permutation(len(frames))[:1000]]
    z = torch.cat([model.latents(frames[i : i + 32]).flatten(0, 2) for i in range(0, len(frames), 32)])
    codebook, _ = dvae.k_means(z, model.config.vocab_size, torch.Generator().manual_seed(seed))
    model.quantize.embedding.weight.copy_(codebook)
    if data.world_size() > 1:
        torch.distributed.broadcast(model.quantize.embedding.weight, 0)


# The ways to feed a trunk and to ask it.
class PixelCodec:
    """A "tokenizer" that loses nothing: two bytes of a row of pixels are a code, so that token folders can hold pixels.

    So patches come from the same images, in the same order and sequences, as the codes of every other tokenizer.
    """

    config, compute_dtype = SimpleNamespace(vocab_size=2**16), torch.uint8

    def grid(self, resolution):
        return [resolution, 3 * resolution // 2]

    def encode(self, frames):
        N, H, W, _ = frames.shape
        return torch.from_numpy(np.ascontiguousarray(frames).reshape(N, H, 3 * W).view(np.uint16).astype(np.int64))

    def fingerprint(self):
        return "pixels"


def patch_rows(pixels, ids, h):
    """Frames as `PixelCodec` keeps them, uint16 (F, R, 3R/2), and ids (T,) of the codes of their h · h patches each.

    One row for each place of the sequence: the pixels of a patch and then the id of its code, int16 (T, 3 (R/h)² + 1).
    The start, row 0, has no pixels, nor has the end, if the ids have one.
    """
    F, R, _ = pixels.shape
    patches = dvae.cut(pixels.view(np.uint8).reshape(F, R, R, 3), R // h)
    rows = np.zeros((len(ids), patches.shape[1] + 1), np.int16)
    rows[1 : 1 + len(patches), :-1], rows[:, -1] = patches, ids
    return rows


def normalised(patches):
    """§4.1's "patch-normalized" targets, as in MAE: x less its own mean, by its own deviation. (…, P) -> (…, P)."""
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


class PatchToto(toto.Toto):
    """The same trunk over continuous patches: it takes rows of `patch_rows` in place of ids.

    patch→patch regresses the normalised pixels of the next patch by squared error; patch→dVAE classifies its code by
    Eq. 2. Not in the paper: a linear embedding with a bias, as in MAE, and a learned vector for the start, all of which
    begin at the scale of the codes' embeddings, 0.02. torch's own scale is 30 times that, beside which the first steps
    of the blocks would be nothing.
    """

    def __init__(self, config, n_pixels, predicts_pixels, compute_dtype=torch.float32):
        super().__init__(config, compute_dtype)
        self.start = nn.Parameter(0.02 * torch.randn(config.dim))
        self.patch_in = nn.Linear(n_pixels, config.dim)
        nn.init.normal_(self.patch_in.weight, std=0.02 / math.sqrt(n_pixels))
        nn.init.zeros_(self.patch_in.bias)
        self.patch_out = nn.Linear(config.dim, n_pixels) if predicts_pixels else None
        if predicts_pixels:
            del self.embedding  # no codes go in or come out

    def residual_stream(self, rows, causal=True):
        """Rows (B, T, P + 1) -> H_0 … H_L, each (B, T, D)."""
        pixels = (rows[..., :-1] / 255 - 0.5) / 0.25  # of about unit variance
        x = self.patch_in(pixels)  # (B, T, P) -> (B, T, D)
        is_start = torch.arange(x.shape[1], device=x.device)[:, None] == 0
        yield from super().residual_stream(torch.where(is_start, self.start, x), causal)

    def loss(self, x, targets):
        """From H_L (B, T, D) and the rows that come next (B, T, P + 1)."""
        if self.patch_out is None:
            return super().loss(x, targets[..., -1].long())
        return F.mse_loss(self.patch_out(self.norm(x).float()), normalised(targets[..., :-1] / 255))


class PatchSet(probe.ProbeSet):
    """A split of a probing task whose images go through the trunk as rows of patches, read when they are needed."""

    def __init__(self, tokens, pixels, classes=None):
        super().__init__(tokens, 1, classes=classes)
        self.pixels = pixels

    def inputs(self, rows):
        h = self.tokens.meta["grid"][0]
        read = lambda image: patch_rows(self.pixels.codes(image), self.ids[image, 0].numpy(), h)
        return torch.from_numpy(np.stack([read(image) for image in rows.tolist()]))


@dataclass
class Way:
    """A row of Table 3: what the trunk is given and asked for. Its images are token folders of `probe.image_sets`."""

    name: str
    paper: float  # top-1 on ImageNet
    codes: dict  # what is given, where that is not patches, and asked for, where that is not pixels
    pixels: dict = None  # of `PixelCodec`, where patches are given
    predicts_pixels: bool = False

    def __post_init__(self):
        for split in self.pixels or ():
            if self.pixels[split].names != self.codes[split].names:
                raise ValueError(f"{self.pixels[split].folder}: has other images than {self.codes[split].folder}")

    @property
    def side(self):
        """h of the grid of h x h codes or patches."""
        return self.codes["pretrain"].meta["grid"][0]

    def model(self, args, device):
        config = replace(toto.SIZES[args.size], vocab_size=toto.FIRST_CODE + self.codes["pretrain"].meta["vocab_size"])
        if not self.pixels:
            return toto.Toto(config, data.fast_dtype(device)).to(device)
        n_pixels = 3 * (self.pixels["pretrain"].meta["resolution"] // self.side) ** 2
        return PatchToto(config, n_pixels, self.predicts_pixels, data.fast_dtype(device)).to(device)

    def probe_sets(self):
        if self.pixels:
            first = PatchSet(self.codes["train"], self.pixels["train"])
            return first, PatchSet(self.codes["val"], self.pixels["val"], first.classes)
        first = probe.ProbeSet(self.codes["train"], 1)
        return first, probe.ProbeSet(self.codes["val"], 1, classes=first.classes)

    def sequences(self, args, seed, held_out=False):
        """(how many sequences a pass has, a function that gives the i-th of them, (parts, T + 1) or rows of patches).

        All rows of the table see the same images in the same order. Not in the paper: at a finer grid, where an image
        has four times as many codes, a sequence is cut into four of a quarter of the images, so that no context is
        longer than another. Table 4 gives dVAE/32 four times the compute of dVAE/16, not more: so it was there too.
        """
        source = lambda tokens: data.Source(tokens["pretrain"], args.frames, held_out=held_out)
        codes = data.Mixture([source(self.codes)], [1.0], seed)
        pixels = data.Mixture([source(self.pixels)], [1.0], seed) if self.pixels else None

        def sequence(i):
            ids = codes.sequence(i)[0]
            if pixels is None:
                parts = ids[1:-1].reshape(max(self.side**2 // args.side**2, 1), -1)
                return np.pad(parts, ((0, 0), (1, 1)), constant_values=((0, 0), (ids[0], toto.END)))
            stored = (pixels.sequence(i)[0][1:-1] - toto.FIRST_CODE).astype(np.uint16)
            rows = patch_rows(stored.reshape(-1, *self.pixels["pretrain"].meta["grid"]), ids, self.side)
            return rows[None, :-1] if self.predicts_pixels else rows[None]  # an end has no pixels to predict

        return len(codes.sources[0]), sequence


def run_way(way, seed, args, device):
    """Pre-train and probe -> {"loss" on held-out images, "top1" of each layer, "untrained": that before training}."""

    def work(state, settings):
        torch.manual_seed(seed)
        model, sets = way.model(args, device), way.probe_sets()
        untrained = probe.linear_probes(model, sets, device)
        _, sequence = way.sequences(args, seed)
        n = train.sequences_in_a_step(args, args.side**2, data.world_size())
        share = lambda step: range(step * n + data.rank(), (step + 1) * n, data.world_size())
        read_batch = lambda step: torch.from_numpy(np.concatenate([sequence(i) for i in share(step)]))
        train.fit(model, read_batch, args, device, state, settings, f"{way.name}, seed {seed}")
        top1 = probe.linear_probes(model, sets, device)
        n_held_out, sequence = way.sequences(args, seed, held_out=True)
        held_out = [torch.from_numpy(sequence(i)).to(device) for i in range(min(n_held_out, 32))]
        with torch.no_grad():
            loss = np.mean([model(rows[:, :-1], rows[:, 1:]).item() for rows in held_out])
        return {"loss": float(loss), "top1": top1, "untrained": untrained}

    settings = {"way": way.name, "tokenizer": way.codes["pretrain"].meta["tokenizer"], "seed": seed}
    return train.kept_run(args, f"{way.name}-{seed}", settings, work)


# Fig. 3, Fig. 12 and Fig. 13.
def n_grams(codes, n, vocab_size):
    """How often each sequence of n raster neighbours occurs in codes (N, h, w), most frequent first.

    A row's last code has the next row's first as its neighbour: a 16 x 16 image has 255 pairs and 254 triples.
    """
    flat = codes.reshape(len(codes), -1).astype(np.int64)  # (N, h·w)
    n_places = flat.shape[1] - n + 1
    grams = sum(flat[:, i : i + n_places] * vocab_size ** (n - 1 - i) for i in range(n))  # each as one number
    return np.sort(np.unique(grams, return_counts=True)[1])[::-1]


def describe(tokens, n_images=10_000):
    """Of a token folder's images, as many as A.6 has: {"coverage", and for n = 1, 2, 3 "distinct" and "shares"}.

    Not in the paper, which counts on ImageNet's validation images: these are all of --data, the trained ones too. The
    shares of all n-grams, most frequent first, are thinned out to some 200 ranks for drawing.
    """
    some = np.linspace(0, len(tokens) - 1, min(len(tokens), n_images)).round().astype(int)
    codes, vocab_size = np.concatenate([tokens.codes(image, 0, 1) for image in some]), tokens.meta["vocab_size"]
    counts = [n_grams(codes, n, vocab_size) for n in (1, 2, 3)]
    ranks = [np.unique(np.geomspace(1, len(c), 200).round().astype(int)) for c in counts]
    return {
        "images": len(codes), "vocabulary": vocab_size, "coverage": len(counts[0]) / vocab_size,
        "distinct": [len(c) for c in counts], "places": [int(c.sum()) for c in counts],
        "ranks": [r.tolist() for r in ranks], "shares": [(c[r - 1] / c.sum()).tolist() for c, r in zip(counts, ranks)],
    }  # fmt: skip


def draw(plt, grams, path):
    """Fig. 3, Fig. 12 and Fig. 13: sorted shares of all n-grams for n = 1, 2, 3, a line for each tokenizer."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for n, axis in enumerate(axes):
        for name, g in grams.items():
            label = f"{name}: {g['distinct'][n]:,}" + (f" of {g['vocabulary']:,}" if n == 0 else "")
            axis.loglog(g["ranks"][n], g["shares"][n], label=label)
        axis.set(title=f"{n + 1}-grams (Fig. {(3, 12, 13)[n]})", xlabel="rank", ylabel="share")
        axis.legend(fontsize="small", frameon=False, title="distinct", title_fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def print_report(report):
    """Table 3, the paper's beside ours: means over seeds and their 95 % intervals; then Figs. 3, 12, 13 in numbers."""
    show = lambda values: probe.show_seeds([100 * x for x in values])
    columns, depth = "{:<12}{:<7}{:<12}{:<7}" + 4 * "{:<26}" + "{}", report.get("depth")
    if report["rows"]:
        n_seeds, bests = len(report["rows"][0]["loss"]), ("best layer", "untrained, best layer")
        print(f"\nTable 3: top-1 of linear probes in %, means of {n_seeds} seeds and 95 % intervals")
        heads = "paper", f"layer {depth}", "less the first row's", *bests, "loss: nats, or squared error"
        print(columns.format("in-out", "grid", "vocabulary", *heads))
    for row in report["rows"]:
        at = lambda key, l: [top1[l] for top1 in row[key]]
        best, of_untrained = (int(np.argmax(np.mean(row[key], axis=0))) for key in ("top1", "untrained"))
        gain = [top1[depth] - first[depth] for top1, first in zip(row["top1"], report["rows"][0]["top1"])]
        bests = f"{show(at('top1', best))}, {best}", f"{show(at('untrained', of_untrained))}, {of_untrained}"
        what = row["name"], f"{row['side']}x{row['side']}", row["vocabulary"] or "-", row["paper"]
        print(columns.format(*what, show(at("top1", depth)), show(gain), *bests, f"{np.mean(row['loss']):.3f}"))
    for name, top1 in report.get("bounds", {}).items():
        print(f"{name}: {100 * top1:.1f}")
    print("\nFigs. 3, 12, 13: n-grams of the codes, and what the tokenizers keep of unseen images")
    columns = "{:<18}" + 6 * "{:<16}"
    print(columns.format("tokenizer", "vocabulary", "coverage", "distinct pairs", "triples", "PSNR", "perplexity"))
    for name, kept in report["tokenizers"].items():
        g = report["grams"].get(name)
        cells = (g["vocabulary"], f"{g['coverage']:.1%}", *g["distinct"][1:]) if g else 4 * ("",)
        print(columns.format(name, *cells, f"{kept['psnr']:.1f} dB", f"{kept['perplexity']:.0f}"))


def images_of(args, resolution, held_out):
    """The items of --data that are held out, or those that are not."""
    items = sum(probe.image_shards(args, "pretrain", resolution), [])
    return [item for item, out in zip(items, data.is_held_out([item.name for item in items])) if out == held_out]


def measure(tokenizer, resolution, args):
    """What a tokenizer keeps of images that it has not seen, by dvae.measure."""
    items = images_of(args, resolution, held_out=True)
    return dvae.measure(tokenizer, data.gather_frames(items, 512, resolution, quiet=True))


def vqgans(args, resolution, device):
    """Those of --vqgan, or a small and a large one, trained first on --data where they are missing in --out."""
    how = device, data.fast_dtype(device)
    if args.vqgan:
        models = [load_vqgan(path, *how) for path in args.vqgan]
        if {model.pixels_per_code for model in models} != {16} or len({m.config.vocab_size for m in models}) < 2:
            raise ValueError("--vqgan needs two models with f = 16, of different vocabularies")
        return models
    items = images_of(args, resolution, held_out=False)
    # A batch that the processes cannot share is made larger, as for the dVAE.
    recipe = replace(RECIPE, steps=args.vqgan_steps, batch=math.lcm(RECIPE.batch, data.world_size()))
    settings, models = {"data": args.data, "resolution": resolution, "seed": args.seed, "steps": recipe.steps}, []

    def read_pool(i):
        frames = data.gather_frames(items, dvae.POOL, resolution, [args.seed, i, data.rank()], quiet=True)
        data.wait_for_all()  # for the slowest disk
        return frames

    for config in (SMALL, LARGE):
        path = args.out / f"vqgan-{config.vocab_size}.pt"
        state = path.with_suffix(".training")
        if not path.exists():
            model = train_vqgan(read_pool, config, recipe, args.seed, *how, state, settings)
            if data.rank() == 0:
                save(model, path, settings)
            data.wait_for_all()
        made = torch.load(path, map_location="cpu", weights_only=True)["settings"]
        data.check_same(path, made, settings, "remove it, or give another --out")
        state.unlink(missing_ok=True)
        models.append(load_vqgan(path, *how))
    return models


def tokenizers_of(args, device):
    """{name: (tokenizer, resolution)}. §3.4: a dVAE's code is of 8 x 8 pixels, and a VQGAN's of 16 x 16, so that twice
    the resolution gives it the same grid.
    """
    small, large, the_dvae = args.resolution, 2 * args.resolution, train.study_tokenizer(args, device)
    pairs = {"dVAE": (the_dvae, small), "dVAE, finer": (the_dvae, large)}
    for model in sorted(vqgans(args, large, device), key=lambda model: model.config.vocab_size):
        pairs[f"VQGAN {model.config.vocab_size}"] = model, large
    return pairs


def ways_of(sets, args):
    """The rows of Table 3. Not in the paper: how large its patches are; here 8 x 8 pixels for `tiny`, else 16 x 16."""
    pixels = probe.image_sets(args, PixelCodec(), args.resolution if args.size == "tiny" else 2 * args.resolution)
    coarse, fine, *of_vqgans = sets.values()
    ways = [Way("dVAE-dVAE", 53.2, coarse), Way("dVAE-dVAE finer", 61.2, fine)]
    for vqgan, paper in zip(of_vqgans, (61.1, 61.3)):
        ways.append(Way(f"VQGAN-VQGAN {vqgan['pretrain'].meta['vocab_size']}", paper, vqgan))
    return ways + [Way("patch-patch", 60.6, coarse, pixels, True), Way("patch-dVAE", 58.5, coarse, pixels)]


def main():
    parser = data.make_parser(__doc__)
    words = "two VQGANs of taming-transformers or of an earlier run (default: a small and a large one of --data)"
    parser.add_argument("--vqgan", nargs=2, type=Path, metavar="FILE", help=words)
    words = "optimizer steps of those that are trained here"
    parser.add_argument("--vqgan-steps", type=data.number(int, at_least=1), default=RECIPE.steps, help=words)
    args, plt = train.parse_study(parser, "out/table3", steps=300), data.pyplot()
    device = data.pick_device(args.device)
    data.start_processes(device)
    args.side = args.resolution // dvae.DVAE.pixels_per_code

    tokenizers = tokenizers_of(args, device)
    sets = {name: probe.image_sets(args, *pair) for name, pair in tokenizers.items()}
    report = {"rows": []}
    for way in ways_of(sets, args) if args.has_probe else ():
        runs = [run_way(way, seed, args, device) for seed in range(args.seed, args.seed + args.seeds)]
        vocab_size = None if way.predicts_pixels else way.codes["pretrain"].meta["vocab_size"]
        row = {"name": way.name.split()[0], "side": way.side, "vocabulary": vocab_size, "paper": way.paper}
        report["rows"].append(row | {key: [run[key] for run in runs] for key in runs[0]})
    if data.rank() > 0:
        return
    if args.has_probe:
        report["depth"] = round(9 / 16 * toto.SIZES[args.size].n_layers)
        report["bounds"] = probe.floor_and_ceiling(sets["dVAE"], args, device)
    report["tokenizers"] = {name: measure(*pair, args) for name, pair in tokenizers.items()}
    del sets["dVAE, finer"]  # the figures have 16 x 16 codes alone
    report["grams"] = {name: describe(of_images["pretrain"]) for name, of_images in sets.items()}
    written = args.out / ("table3.json" if args.has_probe else "n_grams.json")
    if not args.has_probe:
        print("without --probe there is nothing to probe: the figures alone, not Table 3")
    data.write_json(report, written)
    print_report(report)
    draw(plt, report["grams"], written.with_suffix(".png"))
    print(f"wrote {written} and {written.with_suffix('.png')}")


if __name__ == "__main__":
    data.run(main)
