"""The dVAE tokenizer of §3.4: every 8x8 pixels of a frame become one of V codes, each frame on its own.

The architecture is that of OpenAI's DALL-E (Ramesh et al., 2021, appendix A), at any width and under its published
parameter names. At full size (`Config()`) a 128-pixel frame becomes 16 x 16 codes out of 8,192.

    python dvae.py                        train a small tokenizer on the built-in world: a minute on two cores
    python dvae.py --data MEDIA...        the same on your own images and videos
    python dvae.py --reconstruct FILE...  pictures of what a trained tokenizer keeps of your images and videos

Writes out/dvae.pt: weights and config. Other programs use `load`, then `encode` and `decode`.
Shape letters: N frames, H and W pixels, h = H/8 and w = W/8 codes, V vocabulary.
"""

import argparse
import hashlib
import math
import os
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
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
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))
        self.gain = gain

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


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
    finally:
        temporary.unlink(missing_ok=True)


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
    return model.to(device).eval().requires_grad_(False)


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
    n_hid, vocab_size = (
        weights["encoder"]["blocks.input.w"].shape[0],
        weights["encoder"]["blocks.output.conv.w"].shape[0],
    )
    n_blocks = sum(name.startswith("blocks.group_1.") and name.endswith(".conv_1.w") for name in weights["encoder"])
    n_init = weights["decoder"]["blocks.input.w"].shape[0]
    model = DVAE(Config(n_hid, n_blocks, n_init, vocab_size, 1 / (4 * n_blocks) ** 2), compute_dtype)
    model.encoder.load_state_dict(weights["encoder"])
    model.decoder.load_state_dict(weights["decoder"])
    return model


class WarmStart(nn.Module):
    """A dVAE in training, with a narrow linear bottleneck on either side of its codes.

    Not in the paper. From random weights a small dVAE ends with a few dozen codes in use. So it first trains as a plain
    autoencoder through `width` numbers per position; k-means over these numbers then gives a codebook E, and code k the
    logit -s |z - E_k|², which is linear in z up to a term that all codes share. From there on it is the dVAE of §3.4,
    trained with the Gumbel-softmax relaxation, and starts with all codes in use.
    """

    def __init__(self, model, width=16):
        super().__init__()
        config = model.config
        self.model = model
        self.squeeze = Conv2d(8 * config.n_hid, width, 1, float32=True)
        self.to_logits = Conv2d(width, config.vocab_size, 1, float32=True)
        self.codebook = nn.Parameter(torch.zeros(config.vocab_size, width))
        self.expand = Conv2d(width, config.n_init, 1)

    def latents(self, frames):
        """uint8 frames (N, H, W, 3) -> (N, width, h, w)."""
        return self.squeeze(self.model.encoder.trunk(self.model.prepare(frames)))

    def forward(self, frames, temperature, generator=None):
        """uint8 frames (N, H, W, 3) -> reconstruction (N, 3, H, W); temperature None is the continuous phase."""
        z = self.latents(frames)
        if temperature is not None:
            logits = self.to_logits(z)  # (N, V, h, w)
            gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
            soft_codes = F.softmax((logits + gumbel) / temperature, dim=1)
            z = torch.einsum("nvhw,vc->nchw", soft_codes, self.codebook)
        return to_pixels(self.model.decoder(self.expand(z.to(self.model.compute_dtype))))

    @torch.no_grad()
    def start_codes(self, z, generator):
        """Place the codebook by k-means over latents z (n, width), and the logits at the distances to it.

        Most latents may be of one plain ground. So codes start where latents lie far from the codes so far (as in
        k-means++), and the logits' scale follows from the spread of latents about each code, all codes alike: a
        mean over latents would be that of the ground.
        """
        V = len(self.codebook)
        z = z[torch.randperm(len(z), generator=generator).to(z.device)]
        nearest_distance = lambda: torch.cat([torch.cdist(chunk, E).amin(dim=1) for chunk in z.split(16384)])
        E = z[: V // 8]
        while len(E) < V:
            odds = nearest_distance().pow(2).cpu() + 1e-12
            E = torch.cat(
                (E, z[torch.multinomial(odds, min(V // 8 + 1, V - len(E)), replacement=True, generator=generator)])
            )
        for _ in range(5):
            # In chunks: the distances of 262,144 latents to 8,192 codes at once would take 8.6 GB.
            nearest = torch.cat([torch.cdist(chunk, E).argmin(dim=1) for chunk in z.split(16384)])
            counts = torch.bincount(nearest, minlength=V)
            means = torch.zeros_like(E).index_add_(0, nearest, z) / counts[:, None].clamp(min=1)
            E = torch.where(counts[:, None] > 0, means, E)
        spread = torch.zeros(V, device=z.device).index_add_(0, nearest, (z - E[nearest]).pow(2).sum(dim=1))
        scale = 1 / (spread / counts.clamp(min=1))[counts > 1].mean().clamp(min=1e-6)
        self.codebook.copy_(E)
        self.to_logits.w.copy_(2 * scale * E[:, :, None, None])
        self.to_logits.b.copy_(-scale * E.pow(2).sum(dim=1))

    @torch.no_grad()
    def fold(self):
        """Multiply the bottleneck into the 1x1 convolutions beside it, and return the plain dVAE: the same function."""
        matrix = lambda conv: conv.w[:, :, 0, 0]
        logits, first = self.model.encoder.blocks.output.conv, self.model.decoder.blocks.input
        logits.w.copy_((matrix(self.to_logits) @ matrix(self.squeeze))[:, :, None, None])
        logits.b.copy_(matrix(self.to_logits) @ self.squeeze.b + self.to_logits.b)
        first.w.copy_((matrix(self.expand) @ self.codebook.t())[:, :, None, None])
        first.b.copy_(self.expand.b)
        return self.model.eval().requires_grad_(False)


def train(frames, config, steps, batch_size=8, lr=2e-3, seed=0, device="cpu", compute_dtype=torch.float32):
    """Train a tokenizer on uint8 frames (N, H, W, 3) in memory.

    Not in the paper, which took OpenAI's: a warm start for 30 % of the steps, then the soft Gumbel relaxation in both
    passes with a temperature from 1 to 1/16, no KL term, absolute plus three times squared error (0.5 dB better after
    a minute than the absolute error alone), AdamW at 2e-3 with a cosine to 2 %, gradients clipped at 1.
    """
    torch.manual_seed(seed)
    warm = WarmStart(DVAE(config, compute_dtype).to(device)).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(warm.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    warm_steps = round(0.3 * steps)
    generator = torch.Generator(device)
    progress = tqdm(range(steps), desc="tokenizer", unit="step", dynamic_ncols=True)
    for step in progress:
        # Everything random follows from the seed and the step.
        rng = np.random.default_rng([seed, step])
        generator.manual_seed(int(rng.integers(2**62)))
        if step == warm_steps:
            sample = rng.permutation(len(frames))[: 1 + 4 * 2**20 // frames[0].size]
            with torch.no_grad():
                z = torch.cat([warm.latents(frames[sample[i : i + 32]]) for i in range(0, len(sample), 32)])
            warm.start_codes(z.permute(0, 2, 3, 1).flatten(0, 2), torch.Generator().manual_seed(seed))
        annealed = min(max((step - warm_steps) / (0.75 * steps - warm_steps), 0), 1)
        temperature = 1 / 16 + (1 - 1 / 16) * (1 + math.cos(math.pi * annealed)) / 2
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr * cosine * min(1, (step + 1) / 50)

        batch = torch.as_tensor(frames[np.sort(rng.integers(len(frames), size=batch_size))], device=device)
        target = batch.permute(0, 3, 1, 2).float() / 255
        output = warm(batch, temperature if step >= warm_steps else None, generator)
        error = output - target
        loss = error.abs().mean() + 3 * error.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(warm.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            mse = (output.detach().clamp(0, 1) - target).pow(2).mean().item()
            progress.set_postfix_str(
                f"loss {loss.item():.4f}, PSNR {-10 * math.log10(mse):.1f} dB, temperature {temperature:.2f}"
            )
    return warm.fold()


def measure(model, frames):
    """How much of uint8 frames (N, H, W, 3) survives: PSNR in dB, perplexity of the codes, and how many are in use."""
    codes = torch.cat([model.encode(chunk) for chunk in np.array_split(frames, math.ceil(len(frames) / 32))])
    psnr = []
    for chunk, truth in zip(codes.split(32), np.split(frames, range(32, len(frames), 32))):
        error = model.decode(chunk).float().cpu() - torch.as_tensor(truth).float()
        psnr.append(20 * math.log10(255) - 10 * error.pow(2).flatten(1).mean(dim=1).clamp(min=1e-9).log10())
    p = torch.bincount(codes.flatten().cpu(), minlength=model.config.vocab_size).double() / codes.numel()
    perplexity = torch.special.entr(p).sum().exp().item()
    return {"psnr": torch.cat(psnr).mean().item(), "perplexity": perplexity, "codes_in_use": int((p > 0).sum())}


def train_on(paths, out, resolution, stride, seed, device, compute_dtype, steps=1800):
    """Train a small tokenizer on folders of media (or on the built-in world), save it, and report how good it is.

    Not in the paper: on at most 8,192 frames, 16 of a file; the report is on a tenth of them that it did not see.
    """
    import data  # not above: data.py imports this file

    shards = [shard for path in paths for shard in data.shards_of(path, resolution, stride, n_frames=16)]
    frames = data.gather_frames(shards, 8192, resolution, seed)
    held_out, training = np.split(frames, [min(len(frames) // 160 * 16, 512)])
    model = train(training, SMALL, steps, seed=seed, device=device, compute_dtype=compute_dtype)
    save(model, out)
    score = measure(model, held_out if len(held_out) else training)
    seen = "held-out" if len(held_out) else "training"
    print(
        f"tokenizer: {score['psnr']:.1f} dB on {seen} frames, {score['codes_in_use']} of {SMALL.vocab_size} codes "
        f"in use, perplexity {score['perplexity']:.0f}"
    )


def reconstruct(paths, tokenizer_path, out, resolution, stride, device, compute_dtype):
    """Write a picture per file to the folder `out`: up to 8 of its frames above what the tokenizer keeps of them."""
    import data  # not above: data.py imports this file

    model = load(tokenizer_path, device, compute_dtype)
    for path in paths:
        frames = np.stack([data.crop(f, resolution) for f in islice(data.read_frames(path, resolution, stride), 8)])
        picture = Path(out) / f"{Path(path).stem}-reconstructed.png"
        kept = model.decode(model.encode(frames)).cpu().numpy()
        data.write_strip(picture, [[("truth", frames), ("kept", kept)]], n_prompt=0)
        score = measure(model, frames)
        print(f"wrote {picture}: {score['psnr']:.1f} dB, {score['codes_in_use']} different codes")


def main():
    import data  # not above: data.py imports this file

    parser = argparse.ArgumentParser(
        description="Train a tokenizer, or show what one keeps.", formatter_class=data.HelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", default=[data.WORLD], metavar="PATH", help="folders of images and videos to train on")
    add(
        "--reconstruct",
        nargs="+",
        metavar="FILE",
        help="train nothing; write pictures of these beside --out, a tokenizer",
    )
    add("--out", default="out/dvae.pt", type=Path, help="the tokenizer's file")
    add("--resolution", type=data.resolution, default=48, help="side of the frames in pixels")
    add("--stride", type=data.positive, default=4, help="keep every n-th frame of a video")
    add("--steps", type=data.positive, default=1800, help="training steps of 8 frames")
    add("--seed", type=int, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    device = data.pick_device(args.device)
    where = args.resolution, args.stride
    if args.reconstruct:
        reconstruct(args.reconstruct, args.out, args.out.parent, *where, device, data.fast_dtype(device))
    else:
        train_on(args.data, args.out, *where, args.seed, device, data.fast_dtype(device), args.steps)


if __name__ == "__main__":
    import data

    data.run(main)
