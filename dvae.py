"""The dVAE tokenizer of §3.4: every 8x8 pixels of a frame become one of V codes, each frame on its own.

The architecture is that of OpenAI's DALL-E (Ramesh et al., 2021, appendix A), at any width and under its published
parameter names. At full size (`Config()`) a 128-pixel frame becomes 16 x 16 codes out of 8,192.

    python dvae.py                        train a small tokenizer on the built-in world: a minute on two cores
    python dvae.py --data MEDIA...        the same on your own images and videos
    torchrun --nproc_per_node=8 dvae.py --size full --data MEDIA...      one of OpenAI's size, in OpenAI's way
    python dvae.py --reconstruct FILE...  pictures of what a trained tokenizer keeps of your images and videos
    python dvae.py --reconstruct FILE... --out FOLDER    the same with OpenAI's encoder.pkl and decoder.pkl in FOLDER

Writes out/dvae.pt (weights and config), out/dvae.png (what it keeps of unseen frames) and, until it is done,
out/dvae.pt.training (and -warm-start), from which a stopped training resumes. Other programs use `load`, then `encode`
and `decode`.

From top to bottom: the architecture, reading and writing files, the two phases of training, the program.
Shape letters: N frames, H and W pixels, h = H/8 and w = W/8 codes, V vocabulary.
"""

import hashlib
import math
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import toto


@dataclass(frozen=True)
class Config:
    n_hid: int = 256  # width of the first group; the others are 2, 4 and 8 times as wide
    blocks_per_group: int = 2
    n_init: int = 128  # width of the decoder's code embedding
    vocab_size: int = 8192
    residual_gain: float = 1 / 64  # OpenAI's 1 / n_layers², with n_layers = 4 groups x 2 blocks


# Not in the paper: a tokenizer that two cores train in a minute. A gain of 1 trains faster where it is this shallow.
SMALL = Config(n_hid=16, blocks_per_group=1, n_init=64, vocab_size=512, residual_gain=1.0)


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer is trained. Schedules are given as shares of all steps, so that --steps stretches them all."""

    steps: int
    batch: int  # frames in a step, over all processes
    lr: float  # peak of AdamW's rate, after 50 steps of warm-up; a cosine takes it down to lr_end
    lr_end: float
    betas: tuple
    warm_start: float  # share of the steps as an autoencoder without codes; 0 begins with codes, from random weights
    anneal: float  # share after which the relaxation's temperature has come down from 1 to 1/16, on a cosine
    kl: float  # weight of the KL term beside a likelihood that is a mean over pixels and colours, reached on a cosine
    kl_warmup: float  # after this share of the steps
    laplace: bool  # the likelihood of a logit-Laplace, or else absolute plus three times squared error
    ema: float  # decay of the running mean of the weights that is kept in the end; 0 keeps the last weights
    clip: float  # norm at which gradients are clipped


# The schedules of Ramesh et al. (2021), appendix A.2, for the tokenizer of §3.4. Not as there: it trains on for another
# 1.8 million steps at the last rate, on 256-pixel crops that are flipped and rescaled, and has no warm-up of the rate.
OPENAI = Recipe(
    steps=1_200_000, batch=512, lr=1e-4, lr_end=1.25e-6, betas=(0.9, 0.999), warm_start=0,
    anneal=150_000 / 1_200_000, kl=6.6, kl_warmup=5_000 / 1_200_000, laplace=True, ema=0.999, clip=math.inf,
)  # fmt: skip
# Not in the paper: what suits two cores and a minute.
LAPTOP = Recipe(
    steps=1800, batch=8, lr=2e-3, lr_end=4e-5, betas=(0.9, 0.99), warm_start=0.3,
    anneal=0.75, kl=0, kl_warmup=0, laplace=False, ema=0, clip=1,
)  # fmt: skip
SIZES = {"small": (SMALL, LAPTOP), "full": (Config(), OPENAI)}
POOL = 8192  # frames in memory that batches are drawn from, in each process
ALIKE = 30  # mean squared error of pixels in 0 ... 255, 33 dB: what looks more alike than that shares a code


class Conv2d(nn.Module):
    """A convolution that keeps height and width, computed in the dtype of its input.

    With float32=True, for a 1x1 kernel, it computes in float32 whatever comes in. The convolution that makes the logits
    needs that: after a bfloat16 trunk 96 to 98 % of a trained dVAE's codes stay as they were, with bfloat16 logits too
    only 56 to 79 %.
    """

    def __init__(self, n_in, n_out, kernel, float32=False):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel).normal_(std=(n_in * kernel**2) ** -0.5))
        self.b = nn.Parameter(torch.zeros(n_out))
        self.float32 = float32

    def forward(self, x):
        if self.float32:  # always 1x1: a matrix product, which GPUs do not round to TF32 as they do convolutions
            return F.linear(x.float().permute(0, 2, 3, 1), self.w[:, :, 0, 0], self.b).permute(0, 3, 1, 2)
        return F.conv2d(x, self.w.to(x.dtype), self.b.to(x.dtype), padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """id_path(x) + gain · res_path(x), where res_path is four times ReLU and convolution, at a quarter of the width."""

    def __init__(self, n_in, n_out, kernels, gain):
        super().__init__()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU(inplace=i > 0))  # the first one's input is still needed
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))
        self.gain = gain

    def forward(self, x):
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)  # in one pass over memory


def group(config, n_in, n_out, kernels, resample=None):
    """One group of residual blocks at one width, then the change of resolution."""
    layers = OrderedDict()
    for i in range(config.blocks_per_group):
        layers[f"block_{i + 1}"] = ResidualBlock(n_in if i == 0 else n_out, n_out, kernels, config.residual_gain)
    if resample:
        layers["resample"] = resample
    return nn.Sequential(layers)


# The two tables below are the architecture. The names in them are those of the published weights.
class Encoder(nn.Module):
    """§3.4: pixels (N, 3, H, W) -> float32 logits over the codes (N, V, h, w)."""

    def __init__(self, config):
        super().__init__()
        n, kernels, pool = config.n_hid, (3, 3, 3, 1), nn.MaxPool2d(2)
        self.blocks = nn.Sequential(OrderedDict([
            ("input", Conv2d(3, n, 7)),
            ("group_1", group(config, 1 * n, 1 * n, kernels, pool)),
            ("group_2", group(config, 1 * n, 2 * n, kernels, pool)),
            ("group_3", group(config, 2 * n, 4 * n, kernels, pool)),
            ("group_4", group(config, 4 * n, 8 * n, kernels)),
            ("output", nn.Sequential(OrderedDict([
                ("relu", nn.ReLU()),
                ("conv", Conv2d(8 * n, config.vocab_size, 1, float32=True)),
            ]))),
        ]))  # fmt: skip

    def trunk(self, x):
        """All but the last convolution: (N, 3, H, W) -> (N, 8 n_hid, h, w)."""
        return self.blocks.output.relu(self.blocks[:-1](x))

    def forward(self, x):
        return self.blocks(x)


class Decoder(nn.Module):
    """§3.4: embedded codes (N, n_init, h, w) -> (N, 6, H, W): μ and log scale of a logit-Laplace for each colour."""

    def __init__(self, config):
        super().__init__()
        n, kernels, double = config.n_hid, (1, 3, 3, 3), nn.Upsample(scale_factor=2, mode="nearest")
        self.blocks = nn.Sequential(OrderedDict([
            ("input", Conv2d(config.vocab_size, config.n_init, 1)),
            ("group_1", group(config, config.n_init, 8 * n, kernels, double)),
            ("group_2", group(config, 8 * n, 4 * n, kernels, double)),
            ("group_3", group(config, 4 * n, 2 * n, kernels, double)),
            ("group_4", group(config, 2 * n, 1 * n, kernels)),
            ("output", nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(n, 6, 1))]))),
        ]))  # fmt: skip

    def embed(self, codes):
        """Codes (N, h, w) -> (N, n_init, h, w): a 1x1 convolution over one-hot codes is exactly a look-up."""
        first = self.blocks.input
        return (F.embedding(codes, first.w[:, :, 0, 0].t()) + first.b).permute(0, 3, 1, 2)

    def forward(self, x):
        return self.blocks[1:](x)


def gumbel_softmax(logits, temperature, generator=None):
    """The relaxation of §3.4's dVAE: logits (N, V, h, w) -> nearly one-hot codes (N, V, h, w) that pass gradients.

    With Gumbel noise the argmax over logits is an exact draw from the softmax (Jang et al., 2017; Maddison et al.,
    2017). A softmax at a temperature stands in for the argmax, which has no gradient; towards 0 the two are the same.
    """
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
    return F.softmax((logits + gumbel) / temperature, dim=1)


class DVAE(nn.Module):
    """The tokenizer of §3.4: `encode` turns frames into codes, `decode` codes into frames.

    `compute_dtype` is the dtype of the activations; parameters and logits stay in float32.
    """

    pixels_per_code = 8  # three 2x2 poolings

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def prepare(self, frames):
        """uint8 frames (N, H, W, 3) -> network input (N, 3, H, W), with [0, 255] mapped to [0.1, 0.9] as in DALL-E."""
        frames = torch.as_tensor(frames, device=self.encoder.blocks.input.w.device)
        # (N, H, W, 3) in memory, seen as (N, 3, H, W), is already the channels_last layout that convolutions like.
        return 0.1 + 0.8 / 255 * frames.permute(0, 3, 1, 2).to(self.compute_dtype)

    def forward(self, frames, temperature, generator=None):
        """In training: uint8 frames (N, H, W, 3) -> the decoder's output (N, 6, H, W) and logits (N, V, h, w)."""
        logits = self.encoder(self.prepare(frames))
        codes = gumbel_softmax(logits, temperature, generator).to(self.compute_dtype)
        return self.decoder(self.decoder.blocks.input(codes)), logits

    def grid(self, resolution):
        """[h, w], the codes of a frame with sides of so many pixels."""
        return 2 * [resolution // self.pixels_per_code]

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames (N, H, W, 3), numpy or torch, H and W multiples of 8 -> codes int64 (N, h, w)."""
        _, H, W, _ = frames.shape
        if H % self.pixels_per_code or W % self.pixels_per_code:
            raise ValueError(f"frames of {W}x{H} pixels: width and height must be multiples of {self.pixels_per_code}")
        return self.encoder(self.prepare(frames)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, codes):
        """codes int64 (N, h, w) -> uint8 frames (N, H, W, 3)."""
        pixels = to_pixels(self.decoder(self.decoder.embed(codes).to(self.compute_dtype)))  # (N, 3, H, W)
        return (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1)

    def fingerprint(self):
        """A hash of all weights, by which token folders and checkpoints name their tokenizer."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def to_pixels(output):
    """Decoder output (N, 6, H, W) -> float32 colours sigmoid(μ) (N, 3, H, W), [0.1, 0.9] mapped back to [0, 1]."""
    return (output[:, :3].float().sigmoid() - 0.1) / 0.8


frame_side = data.number(int, at_least=8, multiple_of=DVAE.pixels_per_code)  # for argparse: --resolution


def save(model, path):
    with data.atomic_open(path) as file:
        torch.save({"dvae": model.state_dict(), "config": asdict(model.config)}, file)


def load(path, device="cpu", compute_dtype=torch.float32):
    """Read a tokenizer, ready to encode: a file of `save`, or a folder with OpenAI's encoder.pkl and decoder.pkl.

    Nothing in the files is executed (weights_only=True). Raises OSError where there is no such file and ValueError, in
    one line, where it is something else.
    """
    try:
        if Path(path).is_dir():
            model = load_openai(path, compute_dtype)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = DVAE(Config(**saved["config"]), compute_dtype)
            model.load_state_dict(saved["dvae"])
    except OSError:
        raise
    except Exception as error:
        what = "a folder with OpenAI's encoder.pkl and decoder.pkl" if Path(path).is_dir() else "a tokenizer of dvae.py"
        raise ValueError(f"{path} is not {what}") from error
    # channels_last suits convolutions: 1.5 times as fast at full size, on a CPU, as the same code without it.
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_trained(checkpoint_path, tokenizer_path, device, rope_base=None):
    """(the model of a checkpoint of train.py, the tokenizer that it was trained with, the checkpoint's dictionary).

    The tokenizer is looked for beside the checkpoint unless its path is given, and refused where it is another one.
    """
    dtype = data.fast_dtype(device)
    path = Path(tokenizer_path or Path(checkpoint_path).with_name("dvae.pt"))
    if not Path(checkpoint_path).is_file():
        raise ValueError(f"{checkpoint_path}: no such file; train.py makes one")
    checkpoint = toto.load_checkpoint(checkpoint_path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; give the model's tokenizer with --tokenizer")
    tokenizer = load(path, device, dtype)
    if tokenizer.fingerprint() != checkpoint["tokenizer"]:
        raise ValueError(f"{path} is not the tokenizer of {checkpoint_path}; give that with --tokenizer")
    checkpoint["config"] = replace(checkpoint["config"], rope_base=rope_base or checkpoint["config"].rope_base)
    return toto.from_checkpoint(checkpoint, device, dtype), tokenizer, checkpoint


def save_trained(model, tokenizer, checkpoint, resolution, path):
    """A model that was trained or fine-tuned elsewhere, as a checkpoint for all programs, with its tokenizer beside it.

    `checkpoint` says what it came from; train.py takes the file by --init-from.
    """
    plan = {"tokenizer": checkpoint["tokenizer"], "grid": tokenizer.grid(resolution), "frames": checkpoint["frames"]}
    weights = {name: p.cpu() for name, p in model.state_dict().items()}
    changed = {"model": weights, "optimizer": {}, "config": asdict(model.config), "resolution": resolution}
    with data.atomic_open(path) as file:
        torch.save(checkpoint | changed | {"plan": plan}, file)
    if not path.with_name("dvae.pt").exists():
        save(tokenizer, path.with_name("dvae.pt"))
    print(f"wrote {path}")


class Inert:
    """Stands in for every class that OpenAI's files mention: it holds what is unpickled into it and does nothing."""


def load_openai(folder, compute_dtype=torch.float32):
    """The published weights of §3.4's tokenizer: two whole pickled modules, of which only the tensors are read."""
    classes = ["dall_e.utils.Conv2d", "dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock"]
    classes += ["dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock", "torch.nn.modules.container.Sequential"]
    classes += ["torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Identity"]
    classes += ["torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample"]

    def tensors(module, prefix=""):
        found = {prefix + name: tensor.detach().contiguous() for name, tensor in module._parameters.items()}
        for name, child in module._modules.items():
            found |= tensors(child, f"{prefix}{name}.")
        return found

    weights = {}
    with torch.serialization.safe_globals([(Inert, name) for name in classes]):
        for part in ("encoder", "decoder"):
            weights[part] = tensors(torch.load(Path(folder) / f"{part}.pkl", map_location="cpu", weights_only=True))
    n_hid, n_init = (len(weights[part]["blocks.input.w"]) for part in ("encoder", "decoder"))
    vocab_size = len(weights["encoder"]["blocks.output.conv.w"])
    n_blocks = sum(re.fullmatch(r"blocks\.group_1\..*\.conv_1\.w", name) is not None for name in weights["encoder"])
    model = DVAE(Config(n_hid, n_blocks, n_init, vocab_size, 1 / (4 * n_blocks) ** 2), compute_dtype)
    model.encoder.load_state_dict(weights["encoder"])
    model.decoder.load_state_dict(weights["decoder"])
    return model


class WarmStart(nn.Module):
    """A dVAE's encoder and decoder as a plain autoencoder, through `width` numbers at each place of the grid.

    Not in the paper. From random weights a small dVAE ends with a few dozen codes in use: its codes mean nothing while
    its decoder learns, and its decoder learns nothing while the codes mean nothing. So it first learns to pass on 16
    numbers per place. `place_codes` then puts a codebook among these numbers and folds all of it into the dVAE's own
    two convolutions, which from there on trains as any other.
    """

    def __init__(self, model, width=16):
        super().__init__()
        self.model = model
        self.squeeze = Conv2d(8 * model.config.n_hid, width, 1, float32=True)
        self.expand = Conv2d(width, model.config.n_init, 1)

    def latents(self, frames):
        """uint8 frames (N, H, W, 3) -> (N, width, h, w)."""
        return self.squeeze(self.model.encoder.trunk(self.model.prepare(frames)))

    def forward(self, frames):
        """uint8 frames (N, H, W, 3) -> the decoder's output (N, 6, H, W)."""
        return self.model.decoder(self.expand(self.latents(frames).to(self.model.compute_dtype)))

    @torch.no_grad()
    def place_codes(self, frames, generator):
        """Give the dVAE its codes: a codebook E (V, width) among the latents of uint8 frames (N, H, W, 3).

        Code k gets the logit -s |z - E_k|² = 2s E_k · z - s |E_k|² - s |z|². The last term is the same for all codes,
        so the softmax does not see it, and what is left is linear in z; z is linear in the trunk's output S t + b. So
        the logits are one 1x1 convolution of the trunk, and the decoder's first one has the columns W_expand E_k.
        """
        z = torch.cat([self.latents(frames[i : i + 32]) for i in range(0, len(frames), 32)])
        E, s = k_means(z.permute(0, 2, 3, 1).flatten(0, 2), self.model.config.vocab_size, generator)
        to_logits, to_expand = self.model.encoder.blocks.output.conv, self.model.decoder.blocks.input
        to_logits.w.copy_((2 * s * E @ self.squeeze.w[:, :, 0, 0])[:, :, None, None])
        to_logits.b.copy_(2 * s * E @ self.squeeze.b - s * E.pow(2).sum(dim=1))
        to_expand.w.copy_((self.expand.w[:, :, 0, 0] @ E.t())[:, :, None, None])
        to_expand.b.copy_(self.expand.b)
        to_logits.b[redundant(self.model, frames)] = -1e4  # so that no argmax and no draw takes them


@torch.no_grad()
def redundant(model, frames):
    """Which codes look like one that is more frequent in uint8 frames (N, H, W, 3), bool (V,).

    The encoder sees more than the 8x8 pixels of a code, and k-means then gives one and the same patch several codes,
    by what is near it: noise to the transformer, which has to predict it. So where a code's patches are nearly the same
    (a mean squared spread below 100), it is decoded by itself, as the middle of 5 x 5 of its kind, and where two such
    pictures differ by less than ALIKE, one code does for both. On the built-in world that leaves some 40 codes of 512,
    and of the entropy that a code has when its patch is known 0.05 of 0.59 nats. Codes of photographs stand for patches
    that differ: nearly all of them stay.
    """
    V, side, chunks = model.config.vocab_size, model.pixels_per_code, np.split(frames, range(32, len(frames), 32))
    codes = torch.cat([model.encode(some).flatten() for some in chunks])
    counts = torch.bincount(codes, minlength=V)
    pixels = torch.from_numpy(cut(frames, side).astype(np.float32)).to(codes.device)  # (patches, 8·8·3)
    sum_of = lambda x: torch.zeros(V, x.shape[1], device=x.device).index_add_(0, codes, x)
    mean_of = lambda x: sum_of(x) / counts.clamp(min=1)[:, None]
    spread = mean_of((pixels - mean_of(pixels)[codes]).pow(2)).mean(dim=1)  # (V,)
    grids, middle = torch.arange(V, device=codes.device)[:, None, None].expand(-1, 5, 5), slice(2 * side, 3 * side)
    looks = [model.decode(some)[:, middle, middle].flatten(1).float() for some in grids.split(256)]
    looks, kept, goes = torch.cat(looks), [], torch.zeros(V, dtype=torch.bool)  # looks (V, 8·8·3)
    for k in counts.argsort(descending=True, stable=True).tolist():
        is_alike = bool(kept) and (looks[kept] - looks[k]).pow(2).mean(dim=1).min().item() < ALIKE
        goes[k] = is_alike and spread[k].item() < 100
        if not goes[k]:
            kept.append(k)
    return goes.to(codes.device)


def cut(frames, side):
    """uint8 frames (N, H, W, 3) -> their patches, row by row (N · H/side · W/side, side · side · 3)."""
    N, H, W, _ = frames.shape
    return frames.reshape(N, H // side, side, W // side, side, 3).swapaxes(2, 3).reshape(-1, 3 * side**2)


def k_means(z, n_codes, generator):
    """A codebook E (n_codes, width) for latents z (n, width), and the scale s for logits -s |z - E_k|².

    Most latents may be of one plain ground. So codes start where latents lie far from the codes so far (as in
    k-means++), and s is 1 / the spread of latents about a code, as a mean over codes: over latents it would be that of
    the ground.
    """
    z = z[torch.randperm(len(z), generator=generator).to(z.device)]

    def nearest(E):
        # In chunks: the distances of 262,144 latents to 8,192 codes at once would take 8.6 GB.
        found = [torch.cdist(chunk, E).min(dim=1) for chunk in z.split(16384)]
        return torch.cat([d for d, _ in found]), torch.cat([k for _, k in found])

    E = z[:1]
    while len(E) < n_codes:
        odds = nearest(E)[0].pow(2).cpu() + 1e-12
        n_new = min(len(E), n_codes - len(E))
        E = torch.cat((E, z[torch.multinomial(odds, n_new, replacement=True, generator=generator)]))
    for _ in range(5):
        distance, code = nearest(E)
        counts = torch.bincount(code, minlength=n_codes)
        means = torch.zeros_like(E).index_add_(0, code, z) / counts[:, None].clamp(min=1)
        E = torch.where(counts[:, None] > 0, means, E)
    spread = torch.zeros(n_codes, device=z.device).index_add_(0, code, distance.pow(2)) / counts.clamp(min=1)
    # Where hardly two latents differ, no code has two of them, and any scale will do.
    return E, 1 / spread[counts > 1].mean().nan_to_num(1.0).clamp(min=1e-6)


def warm_steps(recipe):
    """How many steps are without codes."""
    return round(recipe.warm_start * recipe.steps)


def schedule(recipe, step):
    """(learning rate, temperature of the relaxation, weight of the KL term) at a step."""
    fall = lambda done: (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2  # a cosine from 1 to 0
    lr = recipe.lr_end + (recipe.lr - recipe.lr_end) * fall(step / recipe.steps)
    first, annealed = warm_steps(recipe), recipe.anneal * recipe.steps
    temperature = 1 / 16 + (1 - 1 / 16) * fall((step - first) / max(annealed - first, 1))
    kl = recipe.kl * (1 - fall(step / max(recipe.kl_warmup * recipe.steps, 1)))
    return lr * min(1, (step + 1) / 50), temperature, kl


def kl_to_uniform(logits):
    """KL divergence in nats of the codes' distribution (N, V, h, w) from the uniform one, mean over positions."""
    log_q = F.log_softmax(logits, dim=1)
    return (log_q.exp() * log_q).sum(dim=1).mean() + math.log(logits.shape[1])


def reconstruction_loss(output, target, laplace):
    """Of the decoder's output (N, 6, H, W) for colours in [0, 1] (N, 3, H, W), mean over pixels and colours.

    laplace: -ln p of a logit-Laplace with mean μ and scale b in the logit of a colour x (Ramesh et al., A.3),
    p(x) = exp(-|logit x - μ| / b) / (2 b x (1 - x)), with x moved into [0.1, 0.9].
    """
    if laplace:
        x = 0.1 + 0.8 * target
        mu, log_b = output.float().chunk(2, dim=1)
        return ((x.logit() - mu).abs() * (-log_b).exp() + log_b + (2 * x * (1 - x)).log()).mean()
    error = to_pixels(output) - target
    return error.abs().mean() + 3 * error.pow(2).mean()


def draw_frames(read_pool, recipe, seed, step, device):
    """This process's share of a step: frames uint8 (n, R, R, 3), the same in [0, 1] (n, 3, R, R), a seed for noise.

    All that is random follows from the seed, the step and the process, so that a resumed training sees the same.
    """
    n, rng = recipe.batch // data.world_size(), np.random.default_rng([seed, step, data.rank()])
    noise_seed, frames = int(rng.integers(2**62)), read_pool(step * n // (4 * POOL))  # each frame is seen four times
    pixels = torch.as_tensor(frames[np.sort(rng.integers(len(frames), size=n))], device=device)
    return pixels, pixels.permute(0, 3, 1, 2).float() / 255, noise_seed


def start_phase(module, recipe, device, **how):
    """(the optimizer, the module as a loop calls it: under torchrun gradients are averaged over the processes)."""
    optimizer = torch.optim.AdamW(module.parameters(), recipe.lr, recipe.betas, weight_decay=1e-4, fused=True)
    if data.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        return optimizer, DistributedDataParallel(module, device_ids=ids, **how)
    return optimizer, module


def update(optimizer, loss, lr, clip, step):
    """One optimizer step. Raises ValueError where the loss is no number, before that can be saved."""
    (parameters,) = optimizer.param_groups
    parameters["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(parameters["params"], clip)
    if not math.isfinite(loss.item() + grad_norm.item()):
        raise ValueError(f"step {step + 1}: the loss is {loss.item()}, its gradient {grad_norm.item():.3g}")
    optimizer.step()


def figures(loss, output, target):
    """For the progress bar: loss and PSNR of a step, of colours in [0, 1] (N, 3, H, W)."""
    error = (to_pixels(output.detach()).clamp(0, 1) - target).pow(2).mean().clamp(min=1e-9)
    return f"loss {loss.item():.4f}, PSNR {-10 * error.log10().item():.1f} dB"


def train(read_pool, config, recipe, seed=0, device=torch.device("cpu"), compute_dtype=torch.float32,
          path=None, settings={}, save_every=1000, show=lambda model: None):  # fmt: skip
    """Train a tokenizer in two phases; all processes call this. Everything random follows from the seed and the step.

    read_pool(i) gives the uint8 frames (N, R, R, 3) that steps draw from for the i-th time. With a `path` the state is
    saved there every save_every steps and when asked to stop, and a state with the same `settings` that is found there
    is resumed exactly; show(model) is called after saves of the second phase. Raises ValueError where the loss is not
    finite, before a save.
    """
    if recipe.batch % data.world_size():
        raise ValueError(f"{recipe.batch} frames a step cannot be shared evenly by {data.world_size()} processes")
    torch.manual_seed(seed)
    model = DVAE(config, compute_dtype).to(device, memory_format=torch.channels_last)
    read_pool = lru_cache(maxsize=1)(read_pool)
    next_batch = partial(draw_frames, read_pool, recipe, seed, device=device)
    if recipe.warm_start and not (path and path.exists()):
        file = path and warm_start_file(path)
        warm = train_autoencoder(model, next_batch, recipe, device, file, settings, save_every)
        # Each process places codes among frames of its own; as phase 2 begins, DDP gives all those of process 0.
        frames, rng = read_pool(0), np.random.default_rng([seed, data.rank()])
        picked = rng.permutation(len(frames))[: 1 + 4 * 2**20 // frames[0].size]  # 607 frames of 48 pixels
        warm.place_codes(frames[picked], torch.Generator().manual_seed(seed))
    return train_codes(model, next_batch, recipe, device, path, settings, save_every, show).eval().requires_grad_(False)


def warm_start_file(path):
    """Phase 1 keeps its state beside that of phase 2, whose file says that phase 1 is over."""
    return path.with_name(f"{path.name}-warm-start")


def train_autoencoder(model, next_batch, recipe, device, path, settings, save_every):
    """Phase 1, not in the paper: without codes, to have something to place codes in (see WarmStart)."""
    warm, n_steps = WarmStart(model).to(device, memory_format=torch.channels_last), warm_steps(recipe)
    # Unused: the two convolutions that codes will go through.
    optimizer, trained = start_phase(warm, recipe, device, find_unused_parameters=True)
    file = data.state_file(path, {"warm": warm, "optimizer": optimizer}, settings) if path else {}
    for step, bar in data.resumable_steps("warm start", n_steps, **file, save_every=save_every):
        pixels, target, _ = next_batch(step)
        output = trained(pixels)
        loss = reconstruction_loss(output, target, recipe.laplace)
        update(optimizer, loss, schedule(recipe, step)[0], recipe.clip, step)
        if step % 20 == 0:
            bar.set_postfix_str(figures(loss, output, target), refresh=False)
    return warm


def train_codes(model, next_batch, recipe, device, path, settings, save_every, show):
    """Phase 2, the dVAE of §3.4: the evidence lower bound of Ramesh et al. (2021), Eq. 1, through the relaxation."""
    optimizer, trained = start_phase(model, recipe, device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    kept, generator = average.module if average else model, torch.Generator(device)
    parts = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
    how = data.state_file(path, parts, settings) if path else {}
    how |= {"after_save": lambda done: show(kept) if data.rank() == 0 else None, "start": warm_steps(recipe)}
    for step, bar in data.resumable_steps("tokenizer", recipe.steps, save_every=save_every, **how):
        pixels, target, noise_seed = next_batch(step)
        lr, temperature, kl = schedule(recipe, step)
        output, logits = trained(pixels, temperature, generator.manual_seed(noise_seed))
        loss = reconstruction_loss(output, target, recipe.laplace)
        if kl:  # a code stands for 3·8·8 of the values that the likelihood is a mean over
            loss = loss + kl * kl_to_uniform(logits) / (3 * model.pixels_per_code**2)
        update(optimizer, loss, lr, recipe.clip, step)
        if average:
            average.update_parameters(model)
        if step % 20 == 0:
            used = perplexity_of(logits.detach().argmax(dim=1))
            words = f"{figures(loss, output, target)}, perplexity {used:.0f}, temperature {temperature:.2f}"
            bar.set_postfix_str(words, refresh=False)
    return kept


def perplexity_of(codes):
    """exp of the entropy of the codes' frequencies: as many codes, all equally frequent, would be as varied."""
    p = codes.unique(return_counts=True)[1].double() / codes.numel()
    return torch.special.entr(p).sum().exp().item()  # 1 of none


def measure(model, frames):
    """How much of uint8 frames (N, H, W, 3) survives, and what the codes mean.

    psnr in dB; perplexity of the codes, and how many are in use; `entropy` of the codes, and `entropy_given_patch`, in
    nats, what is left of it once the 8x8 pixels are known, over patches that occur more than once: codes that depend on
    the surroundings, which the transformer must pay for and PSNR does not show. Since photographs have no patch twice,
    `same_elsewhere` is the share of patches that keep their code when another frame, far off, lends their neighbours.
    """
    codes, elsewhere, psnr = [], [], []
    n, side, device = len(frames), model.pixels_per_code, next(model.parameters()).device
    h, w = (length // side for length in frames.shape[1:3])
    here = np.indices((h, w)).sum(axis=0) % 2 == 0  # a chessboard of patches
    pixels = np.kron(here, np.ones((side, side), bool))[..., None]  # (H, W, 1)
    for rows in np.split(np.arange(n), range(32, n, 32)):
        truth = frames[rows]
        codes.append(model.encode(truth).cpu())
        elsewhere.append(model.encode(np.where(pixels, truth, frames[rows - (n + 1) // 2])).cpu()[:, here])
        error = model.decode(codes[-1].to(device)).float().cpu() - torch.as_tensor(truth)
        psnr.append(20 * math.log10(255) - 10 * error.pow(2).flatten(1).mean(dim=1).clamp(min=1e-9).log10())
    codes = torch.cat(codes)
    hashes = torch.tensor([hash(patch.tobytes()) for patch in cut(frames, side)])
    _, patch, count = hashes.unique(return_inverse=True, return_counts=True)
    twice = count[patch] > 1
    patch, of_patch = patch[twice], codes.flatten()[twice]
    entropy, vocab_size = lambda codes: math.log(perplexity_of(codes)), model.config.vocab_size
    return {
        "psnr": torch.cat(psnr).mean().item(), "perplexity": perplexity_of(codes),
        "codes_in_use": len(codes.unique()), "entropy": entropy(codes),
        "entropy_given_patch": entropy(patch * vocab_size + of_patch) - entropy(patch),
        "same_elsewhere": (torch.cat(elsewhere) == codes[:, torch.from_numpy(here)]).float().mean().item(),
    }  # fmt: skip


def train_on(paths, out, resolution, stride, seed, device, config=SMALL, recipe=LAPTOP, save_every=1000):
    """Train a tokenizer on folders of media (or on the built-in world), save it, and report how good it is.

    Clips that train.py would hold out for validation are held out here too; the report and the picture beside the
    tokenizer, of what it keeps, are of them. A stopped training is resumed. Not in the paper: of a video, it is the
    first 16 frames kept by the stride that are read.
    """
    training, unseen = [], []
    for path in paths:
        items = [item for shard in data.shards_of(path, resolution, stride, n_frames=16) for item in shard]
        for item, is_held_out in zip(items, data.is_held_out([item.name for item in items])):
            (unseen if is_held_out else training).append(item)
    if data.rank() == 0:
        try:
            test, seen = data.gather_frames(unseen, 512, resolution, seed, quiet=True), "held-out"
        except ValueError:  # a single clip, or none that can be read
            test, seen = data.gather_frames(training, 512, resolution, seed, quiet=True), "training"
        examples = test[np.linspace(0, len(test) - 1, 8).astype(int)]

    def read_pool(i):
        quiet = i > 0 or data.rank() > 0
        frames = data.gather_frames(training, POOL, resolution, [seed, i, data.rank()], quiet=quiet)
        data.wait_for_all()  # for the slowest disk, longer than a step would
        return frames

    show = lambda model: draw_kept(model, examples, Path(out).with_suffix(".png"))
    settings = {"data": [str(path) for path in paths], "resolution": resolution, "stride": stride, "seed": seed}
    settings |= {"processes": data.world_size(), "size": asdict(config), "recipe": asdict(recipe)}
    state = Path(f"{out}.training")
    model = train(read_pool, config, recipe, seed, device, data.fast_dtype(device), state, settings, save_every, show)
    if data.rank() == 0:
        save(model, out)
        for path in (state, warm_start_file(state)):
            path.unlink(missing_ok=True)
        score = measure(model, test)
        psnr, perplexity, in_use, entropy, given_patch, same = score.values()
        print(
            f"tokenizer: {psnr:.1f} dB on {seen} frames, {in_use} of {config.vocab_size} codes in use, perplexity "
            f"{perplexity:.1f}\n  a code has {entropy:.2f} nats of entropy, {given_patch:.2f} where its 8x8 pixels are "
            f"known; {same:.0%} of codes stay the same among other neighbours"
        )


def draw_kept(model, frames, path):
    """Write a picture of uint8 frames (N, H, W, 3) above what the tokenizer keeps of them."""
    kept = model.decode(model.encode(frames)).cpu().numpy()
    data.write_strip(path, [[("truth", frames), ("kept", kept)]], n_prompt=0)


def reconstruct(paths, tokenizer_path, out, resolution, stride, device):
    """Write a picture per file to the folder `out`: up to 8 of its frames above what the tokenizer keeps of them."""
    model = load(tokenizer_path, device, data.fast_dtype(device))
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        frames = np.stack([data.crop(f, resolution) for f in islice(data.read_frames(path, resolution, stride), 8)])
        picture = Path(out) / f"{Path(path).stem}-reconstructed.png"
        draw_kept(model, frames, picture)
        score = measure(model, frames)
        print(f"wrote {picture}: {score['psnr']:.1f} dB, {score['codes_in_use']} different codes")


def main():
    parser = data.make_parser(__doc__)
    add, count = parser.add_argument, data.number(int, at_least=1)
    add("--data", nargs="+", default=[data.WORLD], metavar="PATH", help="folders of media, or world: the built-in one")
    add("--reconstruct", nargs="+", metavar="FILE", help="no training: draw what --out keeps of images and videos")
    add("--out", default="out/dvae.pt", type=Path, help="the tokenizer's file")
    add("--size", choices=SIZES, default="small", help="small trains in a minute; full is OpenAI's, 8,192 codes")
    add("--resolution", type=frame_side, default=48, help="side of the frames in pixels")
    add("--stride", type=count, default=4, help="keep every n-th frame of a video")
    add("--steps", type=count, help="training steps (default: the recipe's, 1,800 or 1,200,000)")
    add("--batch", type=count, help="frames in a step (default: the recipe's, 8 or 512)")
    add("--save-every", type=count, default=1000, help="steps between saves and pictures")
    args = parser.parse_args()
    device = data.pick_device(args.device)
    if args.reconstruct:  # here --out is read, not written
        return reconstruct(args.reconstruct, args.out, args.out.parent, args.resolution, args.stride, device)
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already, and models may depend on it; give another --out, or remove it")
    data.start_processes(device)
    config, recipe = SIZES[args.size]
    recipe = replace(recipe, steps=args.steps or recipe.steps, batch=args.batch or recipe.batch)
    train_on(args.data, args.out, args.resolution, args.stride, args.seed, device, config, recipe, args.save_every)


if __name__ == "__main__":
    data.run(main)
