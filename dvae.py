"""The dVAE tokenizer of §3.4: every 8x8 pixels of a frame become one of V codes, each frame on its own.

The architecture is that of OpenAI's DALL-E (Ramesh et al., 2021, appendix A), at any width and under its published
parameter names. At full size (`Config()`) a 128-pixel frame becomes 16 x 16 codes out of 8,192.

    python dvae.py                        train a small tokenizer on the built-in world: a minute on two cores
    python dvae.py --data MEDIA...        the same on your own images and videos
    torchrun --nproc_per_node=8 dvae.py --size full --data MEDIA...      one of OpenAI's size, in OpenAI's way
    python dvae.py --reconstruct FILE...  pictures of what a trained tokenizer keeps of your images and videos
    python dvae.py --convert FOLDER       OpenAI's own encoder.pkl and decoder.pkl as one file that is safe to load

Writes out/dvae.pt (weights and config), out/dvae.png (what it keeps of unseen frames) and, until it is done,
out/dvae.pt.training, from which a stopped training goes on. Other programs use `load`, then `encode` and `decode`.
Shape letters: N frames, H and W pixels, h = H/8 and w = W/8 codes, V vocabulary.
"""

import argparse
import hashlib
import math
import os
import pickle
import signal
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

PIXELS_PER_CODE = 8  # three 2x2 poolings


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
    """How a tokenizer is trained. Schedules are given as shares of all steps, so that --steps stretches them alike."""

    steps: int
    batch: int  # frames in a step, over all processes
    lr: float  # peak of AdamW's rate, after 50 steps of warm-up; a cosine takes it down to lr_end
    lr_end: float
    betas: tuple
    warm_start: float  # share of the steps as a plain autoencoder, before there are codes; 0 is from random weights
    anneal: float  # share after which the relaxation's temperature has come down from 1 to 1/16, on a cosine
    kl: float  # weight of the KL term when all else is a mean over pixels and colours, reached on a cosine
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
# Not in the paper: what two cores learn most from in a minute. The squared error adds 0.5 dB to the absolute alone.
LAPTOP = Recipe(
    steps=1800, batch=8, lr=2e-3, lr_end=4e-5, betas=(0.9, 0.99), warm_start=0.3,
    anneal=0.75, kl=0, kl_warmup=0, laplace=False, ema=0, clip=1,
)  # fmt: skip
SIZES, RECIPES = {"small": SMALL, "full": Config()}, {"laptop": LAPTOP, "openai": OPENAI}
POOL = 8192  # frames in memory that batches are drawn from, in each process


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


class DVAE(nn.Module):
    """The tokenizer of §3.4: `encode` turns frames into codes, `decode` codes into frames.

    `compute_dtype` is the dtype of the activations; parameters and logits stay in float32.
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def prepare(self, frames):
        """uint8 frames (N, H, W, 3) -> network input (N, 3, H, W), with [0, 255] mapped to [0.1, 0.9] as in DALL-E."""
        frames = torch.as_tensor(frames, device=self.encoder.blocks.input.w.device)
        # (N, H, W, 3) in memory, seen as (N, 3, H, W), is already the channels_last layout that convolutions like.
        return 0.1 + 0.8 / 255 * frames.permute(0, 3, 1, 2).to(self.compute_dtype)

    @torch.no_grad()
    def encode(self, frames):
        """uint8 frames (N, H, W, 3), numpy or torch, H and W multiples of 8 -> codes int64 (N, h, w)."""
        _, H, W, _ = frames.shape
        if H % PIXELS_PER_CODE or W % PIXELS_PER_CODE:
            raise ValueError(f"frames of {W}x{H} pixels: width and height must be multiples of {PIXELS_PER_CODE}")
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


@contextmanager
def atomic_open(path):
    """A binary file that appears under its name whole and on disk, or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides the file's own error
        if not isinstance(reason, OSError) or reason.filename:
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def listen_for_stop():
    """Let Ctrl-C and SIGTERM fill the list that is returned, so that a loop can save first. Asked again, they kill."""
    received = []

    def receive(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


def stop_listening():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def start_processes(device):
    """(rank, world_size) under torchrun, which starts a process per GPU (or CPU) and tells each which one it is."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        # A day: some wait for as long as others read media.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return rank, world_size


def agree(number, device, world_size):
    """The sum of a number over all processes, which must agree on whether to stop."""
    if world_size == 1:
        return number
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return total.item()


def check_plan(path, there, here, advice):
    """A run that goes on must see the same data in the same way as the one that was stopped."""
    for what in here:
        if there.get(what) != here[what]:
            raise ValueError(f"{path}: its {what} is {there.get(what)}, here it is {here[what]}; {advice}")


def save(model, path):
    with atomic_open(path) as file:
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
    n_hid = weights["encoder"]["blocks.input.w"].shape[0]
    vocab_size = weights["encoder"]["blocks.output.conv.w"].shape[0]
    n_blocks = sum(name.startswith("blocks.group_1.") and name.endswith(".conv_1.w") for name in weights["encoder"])
    n_init = weights["decoder"]["blocks.input.w"].shape[0]
    model = DVAE(Config(n_hid, n_blocks, n_init, vocab_size, 1 / (4 * n_blocks) ** 2), compute_dtype)
    model.encoder.load_state_dict(weights["encoder"])
    model.decoder.load_state_dict(weights["decoder"])
    return model


class Relaxed(nn.Module):
    """A dVAE in training (§3.4): codes are drawn by the Gumbel-softmax relaxation, so that gradients pass through them.

    Not in the paper: `width`, a narrow linear bottleneck on either side of the codes, for a warm start. From random
    weights a small dVAE ends with a few dozen codes in use. So it first trains as a plain autoencoder through `width`
    numbers per position; k-means over these numbers then gives a codebook E, and code k the logit -s |z - E_k|², which
    is linear in z up to a term that all codes share. From there on it is an ordinary dVAE, with all codes in use.
    """

    def __init__(self, model, width=None):
        super().__init__()
        self.model, self.width, config = model, width, model.config
        if width:
            self.squeeze = Conv2d(8 * config.n_hid, width, 1, float32=True)
            self.to_logits = Conv2d(width, config.vocab_size, 1, float32=True)
            self.codebook = nn.Parameter(torch.zeros(config.vocab_size, width))
            self.expand = Conv2d(width, config.n_init, 1)

    def latents(self, frames):
        """uint8 frames (N, H, W, 3) -> (N, width, h, w)."""
        return self.squeeze(self.model.encoder.trunk(self.model.prepare(frames)))

    def forward(self, frames, temperature, straight_through=False, generator=None):
        """uint8 frames (N, H, W, 3) -> the decoder's output (N, 6, H, W) and logits (N, V, h, w).

        Temperature None passes the latents on without codes, and gives no logits. straight_through decodes the drawn
        codes themselves, with the gradient of the soft ones.
        """
        if temperature is None:
            z, logits = self.latents(frames), None
        else:
            prepare, encoder = self.model.prepare, self.model.encoder
            logits = self.to_logits(self.latents(frames)) if self.width else encoder(prepare(frames))
            gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
            codes = F.softmax((logits + gumbel) / temperature, dim=1)
            if straight_through:
                hard = torch.zeros_like(codes).scatter_(1, codes.argmax(dim=1, keepdim=True), 1.0)
                codes = hard + codes - codes.detach()
            if not self.width:
                return self.model.decoder(self.model.decoder.blocks.input(codes.to(self.model.compute_dtype))), logits
            z = torch.einsum("nvhw,vc->nchw", codes, self.codebook)
        return self.model.decoder(self.expand(z.to(self.model.compute_dtype))), logits

    @torch.no_grad()
    def start_codes(self, z, generator):
        """Place the codebook by k-means over latents z (n, width), and the logits at the distances to it.

        Most latents may be of one plain ground. So codes start where latents lie far from the codes so far (as in
        k-means++), and the logits' scale follows from the spread of latents about each code, all codes alike: a
        mean over latents would be that of the ground.
        """
        V = len(self.codebook)
        z = z[torch.randperm(len(z), generator=generator).to(z.device)]

        def nearest(E):
            # In chunks: the distances of 262,144 latents to 8,192 codes at once would take 8.6 GB.
            found = [torch.cdist(chunk, E).min(dim=1) for chunk in z.split(16384)]
            return torch.cat([d for d, _ in found]), torch.cat([k for _, k in found])

        E = z[:1]
        while len(E) < V:
            odds = nearest(E)[0].pow(2).cpu() + 1e-12
            n_new = min(len(E), V - len(E))
            E = torch.cat((E, z[torch.multinomial(odds, n_new, replacement=True, generator=generator)]))
        for _ in range(5):
            distance, code = nearest(E)
            counts = torch.bincount(code, minlength=V)
            means = torch.zeros_like(E).index_add_(0, code, z) / counts[:, None].clamp(min=1)
            E = torch.where(counts[:, None] > 0, means, E)
        spread = torch.zeros(V, device=z.device).index_add_(0, code, distance.pow(2)) / counts.clamp(min=1)
        # Where hardly two latents differ, no code has two of them, and any scale will do.
        scale = 1 / spread[counts > 1].mean().nan_to_num(1.0).clamp(min=1e-6)
        self.codebook.copy_(E)
        self.to_logits.w.copy_(2 * scale * E[:, :, None, None])
        self.to_logits.b.copy_(-scale * E.pow(2).sum(dim=1))

    @torch.no_grad()
    def fold(self):
        """Multiply the bottleneck into the 1x1 convolutions beside it: then the plain dVAE is the same function."""
        if not self.width:
            return
        matrix = lambda conv: conv.w[:, :, 0, 0]
        logits, first = self.model.encoder.blocks.output.conv, self.model.decoder.blocks.input
        logits.w.copy_((matrix(self.to_logits) @ matrix(self.squeeze))[:, :, None, None])
        logits.b.copy_(matrix(self.to_logits) @ self.squeeze.b + self.to_logits.b)
        first.w.copy_((matrix(self.expand) @ self.codebook.t())[:, :, None, None])
        first.b.copy_(self.expand.b)


def schedule(recipe, step):
    """(learning rate, temperature or None in the warm start, weight of the KL term) at a step."""
    fall = lambda done: (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2  # a cosine from 1 to 0
    lr = recipe.lr_end + (recipe.lr - recipe.lr_end) * fall(step / recipe.steps)
    warm_steps, annealed = round(recipe.warm_start * recipe.steps), recipe.anneal * recipe.steps
    temperature = 1 / 16 + (1 - 1 / 16) * fall((step - warm_steps) / max(annealed - warm_steps, 1))
    kl = recipe.kl * (1 - fall(step / max(recipe.kl_warmup * recipe.steps, 1)))
    return lr * min(1, (step + 1) / 50), temperature if step >= warm_steps else None, kl


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


def train(
    read_pool, config, recipe, seed=0, device=torch.device("cpu"), compute_dtype=torch.float32, straight_through=False,
    path=None, plan=None, save_every=1000, show=lambda model: None, rank=0, world_size=1,
):  # fmt: skip
    """Train a tokenizer; every process of world_size calls this. Everything random follows from the seed and the step.

    read_pool(i) gives the uint8 frames (N, H, W, 3) that batches are drawn from for the i-th time, once for as many
    steps as see each of POOL frames four times. With a `path` the state is saved there every save_every steps and when
    asked to stop (SIGINT, SIGTERM), and a state with the same `plan` that is found there goes on exactly; show(model)
    is then called in process 0, once there are codes. Raises ValueError where the loss is not finite, before a save.
    """
    if recipe.batch % world_size:
        raise ValueError(f"a step's {recipe.batch} frames cannot be shared evenly by {world_size} processes")
    batch, first_step = recipe.batch // world_size, 0
    torch.manual_seed(seed)
    relaxed = Relaxed(DVAE(config, compute_dtype), width=16 if recipe.warm_start else None)
    relaxed = relaxed.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(relaxed.parameters(), recipe.lr, recipe.betas, weight_decay=1e-4, fused=True)
    average = AveragedModel(relaxed, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    parts = {"relaxed": relaxed, "optimizer": optimizer} | ({"average": average} if average else {})
    if path and path.exists():
        first_step = resume(path, parts, plan, device)
    trained = relaxed
    if world_size > 1:  # in the warm start some parameters have no gradient
        ids = [device.index] if device.type == "cuda" else None
        trained = DistributedDataParallel(relaxed, device_ids=ids, find_unused_parameters=True)

    def finished():
        """The tokenizer as it is now, to measure and to keep."""
        best = average.module if average else relaxed
        best.fold()
        return best.model

    pool_steps, frames = max(4 * POOL // batch, 1), None
    generator = torch.Generator(device)
    signals = listen_for_stop() if path else []
    progress = tqdm(
        range(first_step, recipe.steps), initial=first_step, total=recipe.steps,
        desc="tokenizer", unit="step", dynamic_ncols=True, disable=rank > 0,
    )  # fmt: skip
    for step in progress:
        if frames is None or step % pool_steps == 0:
            frames = read_pool(step // pool_steps)
        rng = np.random.default_rng([seed, step, rank])
        generator.manual_seed(int(rng.integers(2**62)))
        lr, temperature, kl = schedule(recipe, step)
        if recipe.warm_start and temperature == 1:  # the first step with codes
            sample = rng.permutation(len(frames))[: 1 + 4 * 2**20 // frames[0].size]
            with torch.no_grad():
                z = torch.cat([relaxed.latents(frames[sample[i : i + 32]]) for i in range(0, len(sample), 32)])
            relaxed.start_codes(z.permute(0, 2, 3, 1).flatten(0, 2), torch.Generator().manual_seed(seed))
            if world_size > 1:  # all start with the codes of process 0
                for parameter in relaxed.parameters():
                    dist.broadcast(parameter.data, src=0)

        optimizer.param_groups[0]["lr"] = lr
        pixels = torch.as_tensor(frames[np.sort(rng.integers(len(frames), size=batch))], device=device)
        target = pixels.permute(0, 3, 1, 2).float() / 255
        output, logits = trained(pixels, temperature, straight_through, generator)
        loss = reconstruction_loss(output, target, recipe.laplace)
        if kl:  # a code stands for 3·8·8 of the values that the likelihood is a mean over
            loss = loss + kl * kl_to_uniform(logits) / (3 * PIXELS_PER_CODE**2)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(relaxed.parameters(), recipe.clip)
        optimizer.step()
        if average:
            average.update_parameters(relaxed)

        stop = agree(len(signals), device, world_size) if path else 0
        is_save = path is not None and ((step + 1) % save_every == 0 or stop)
        is_last = step == recipe.steps - 1
        if step % 20 == 0 or is_save or is_last:
            if not math.isfinite(loss.item() + grad_norm.item()):
                raise ValueError(f"step {step + 1}: the loss is {loss.item()}, its gradient {grad_norm.item():.3g}")
            psnr = -10 * (to_pixels(output.detach()).clamp(0, 1) - target).pow(2).mean().clamp(min=1e-9).log10().item()
            words = f"loss {loss.item():.4f}, PSNR {psnr:.1f} dB"
            if logits is not None:
                used = perplexity_of(logits.detach().argmax(dim=1), config.vocab_size)
                words += f", perplexity {used:.0f}, temperature {temperature:.2f}"
            progress.set_postfix_str(words)
        if is_save and not is_last:
            if rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                with atomic_open(path) as file:
                    torch.save(state | {"step": step + 1, "plan": plan}, file)
                if logits is not None:
                    show(finished())
            if stop:
                progress.close()
                if rank == 0:
                    print(f"stopped and saved at step {step + 1:,}; the same command goes on from there")
                raise KeyboardInterrupt
    if path:
        stop_listening()
    return finished().eval().requires_grad_(False)


def resume(path, parts, plan, device):
    """Load the state of a stopped training; return the step to go on at."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        check_plan(path, state["plan"], plan, "remove it to start over")
    except (KeyError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is not the state of a stopped training; remove it to start over") from error
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def perplexity_of(codes, vocab_size):
    """exp of the entropy of the codes' frequencies: as many codes, all equally frequent, would be as varied."""
    p = torch.bincount(codes.flatten().cpu(), minlength=vocab_size).double() / codes.numel()
    return torch.special.entr(p).sum().exp().item()


def measure(model, frames):
    """How much of uint8 frames (N, H, W, 3) survives: PSNR in dB, perplexity of the codes, and how many are in use."""
    codes, psnr = [], []
    for truth in np.split(frames, range(32, len(frames), 32)):
        codes.append(model.encode(truth).cpu())
        error = model.decode(codes[-1].to(model.encoder.blocks.input.w.device)).float().cpu() - torch.as_tensor(truth)
        psnr.append(20 * math.log10(255) - 10 * error.pow(2).flatten(1).mean(dim=1).clamp(min=1e-9).log10())
    codes = torch.cat(codes)
    return {
        "psnr": torch.cat(psnr).mean().item(),
        "perplexity": perplexity_of(codes, model.config.vocab_size),
        "codes_in_use": len(codes.unique()),
    }


def train_on(paths, out, resolution, stride, seed, device, compute_dtype, config=SMALL, recipe=LAPTOP,
             straight_through=False, save_every=1000, rank=0, world_size=1):  # fmt: skip
    """Train a tokenizer on folders of media (or on the built-in world), save it, and report how good it is.

    Clips that train.py would hold out for validation are held out here too; the report and the picture beside the
    tokenizer, of what it keeps, are of them. A stopped training goes on where it was. Not in the paper: of a video, it
    is the first 16 frames kept by the stride that are read.
    """
    import data  # not above: data.py imports this file

    training, unseen = [], []
    for path in paths:
        items = [item for shard in data.shards_of(path, resolution, stride, n_frames=16) for item in shard]
        for item, is_held_out in zip(items, data.is_held_out([item.name for item in items])):
            (unseen if is_held_out else training).append(item)
    if rank == 0:
        try:
            test, seen = data.gather_frames(unseen, 512, resolution, seed, quiet=True), "held-out"
        except ValueError:  # a single clip, or none that can be read
            test, seen = data.gather_frames(training, 512, resolution, seed, quiet=True), "training"
        examples = test[np.linspace(0, len(test) - 1, 8).astype(int)]

    def read_pool(i):
        return data.gather_frames(training, POOL, resolution, [seed, i, rank], quiet=i > 0 or rank > 0)

    def show(model):
        kept = model.decode(model.encode(examples)).cpu().numpy()
        data.write_strip(Path(out).with_suffix(".png"), [[("truth", examples), ("kept", kept)]], n_prompt=0)

    plan = {"data": [str(path) for path in paths], "resolution": resolution, "stride": stride, "seed": seed}
    plan |= {"straight-through": straight_through, "processes": world_size}
    plan |= {"size": asdict(config), "recipe": asdict(recipe)}
    state = Path(f"{out}.training")
    model = train(
        read_pool, config, recipe, seed, device, compute_dtype, straight_through,
        state, plan, save_every, show, rank, world_size,
    )  # fmt: skip
    if rank == 0:
        save(model, out)
        state.unlink(missing_ok=True)
        show(model)
        score = measure(model, test)
        print(
            f"tokenizer: {score['psnr']:.1f} dB on {seen} frames, "
            f"{score['codes_in_use']} of {config.vocab_size} codes in use, perplexity {score['perplexity']:.0f}"
        )


def reconstruct(paths, tokenizer_path, out, resolution, stride, device, compute_dtype):
    """Write a picture per file to the folder `out`: up to 8 of its frames above what the tokenizer keeps of them."""
    import data  # not above: data.py imports this file

    model = load(tokenizer_path, device, compute_dtype)
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        frames = np.stack([data.crop(f, resolution) for f in islice(data.read_frames(path, resolution, stride), 8)])
        picture = Path(out) / f"{Path(path).stem}-reconstructed.png"
        kept = model.decode(model.encode(frames)).cpu().numpy()
        data.write_strip(picture, [[("truth", frames), ("kept", kept)]], n_prompt=0)
        score = measure(model, frames)
        print(f"wrote {picture}: {score['psnr']:.1f} dB, {score['codes_in_use']} different codes")


def main():
    import data  # not above: data.py imports this file

    parser = argparse.ArgumentParser(
        description="Train a tokenizer, show what one keeps, or make a safe copy of OpenAI's. "
        "A stopped training goes on where it was.",
        formatter_class=data.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=[data.WORLD],
        metavar="PATH",
        help="folders of images and videos, or world: the built-in one",
    )
    add("--reconstruct", nargs="+", metavar="FILE", help="no training: draw what --out keeps of images and videos")
    add("--convert", metavar="FOLDER", help="no training: write OpenAI's two files as one safe file, --out")
    add("--out", default="out/dvae.pt", type=Path, help="the tokenizer's file")
    add("--size", choices=SIZES, default="small", help="small trains in a minute; full is OpenAI's, 8,192 codes")
    add("--recipe", choices=RECIPES, help="short with a warm start, or as OpenAI's (default: laptop for small)")
    add("--resolution", type=data.resolution, default=48, help="side of the frames in pixels")
    add("--stride", type=data.positive, default=4, help="keep every n-th frame of a video")
    add("--steps", type=data.positive, help="training steps (default: the recipe's, 1,800 or 1,200,000)")
    add("--batch", type=data.positive, help="frames in a step (default: the recipe's, 8 or 512)")
    add("--straight-through", action="store_true", help="decode hard codes in training, with the gradient of soft ones")
    add("--save-every", type=data.positive, default=1000, help="steps between saves and pictures")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.out.exists() and not args.reconstruct:
        raise ValueError(f"{args.out}: exists already, and models may depend on it; give another --out, or remove it")
    if args.convert:
        model = load(args.convert)
        save(model, args.out)
        count = lambda module: sum(p.numel() for p in module.parameters())
        print(f"wrote {args.out}, hash {model.fingerprint()}")
        print(f"  {count(model.encoder):,} + {count(model.decoder):,} parameters (OpenAI's: 53,786,240 + 43,829,766)")
        return
    device = data.pick_device(args.device)
    if args.reconstruct:
        reconstruct(
            args.reconstruct, args.out, args.out.parent, args.resolution, args.stride, device, data.fast_dtype(device)
        )
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rank, world_size = start_processes(device)
    recipe = RECIPES[args.recipe or ("openai" if args.size == "full" else "laptop")]
    recipe = replace(recipe, steps=args.steps or recipe.steps, batch=args.batch or recipe.batch)
    train_on(
        args.data, args.out, args.resolution, args.stride, args.seed, device, data.fast_dtype(device),
        SIZES[args.size], recipe, args.straight_through, args.save_every, rank, world_size,
    )  # fmt: skip
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    import data

    data.run(main)
