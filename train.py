"""Pre-training: next-token prediction over mixed images and videos (§3.1, §3.2).

    python train.py                                    all of it on the built-in world: minutes on two cores
    python train.py --data VIDEOS IMAGES=0.2           your own folders of media, or token folders, mixed by weight
    torchrun --nproc_per_node=8 train.py --size 1b --data tokens/howto100m=0.6 tokens/imagenet=0.2 ...
    python train.py --evaluate                         the loss of the checkpoint in --out, by source, frame and token
    python train.py --size 1b --dry-run 64             what a run on 64 GPUs would need
    python train.py --export FOLDER                    the checkpoint in --out as a Hugging Face LlamaForCausalLM, or
                                                       with --init-from FILE another, as of probe.py --finetune

Reads token folders; a folder of media is tokenized first, with out/dvae.pt, which is trained first if it is missing.
Writes to --out: toto.pt (everything needed to resume), best.pt (the save of the lowest validation loss), log.jsonl (one
line a step) and samples.gif. Run again with the same --out, it resumes where it stopped.

From top to bottom: the method of §3.2, the training loop, what it trains on and begins with, validation and samples,
files, and the other modes of the program.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import dvae
import toto

# §3.2: AdamW, peak 3e-4, 2,000 warm-up steps, batches of 2^20 tokens; §3.3: 10^12 tokens; §3.4: R = 128.
PAPER = {
    "resolution": 128, "frames": 16, "batch_tokens": 2**20, "steps": 953_674, "lr": 3e-4, "warmup": 2000,
    "save_every": 1000,
}  # fmt: skip
# Not in the paper: what trains `tiny` on two cores in minutes.
LAPTOP = {
    "resolution": 48, "frames": 8, "batch_tokens": 2**10, "steps": 6000, "lr": 3e-3, "warmup": 50, "save_every": 500,
}  # fmt: skip
# Dense bf16 matrix rates in TFLOP/s from the makers' data sheets, by a word of the device's name. The first word that
# fits counts, so that the variants of a card stand before the card.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "4090": 165,
    "3090": 71,
}  # fmt: skip


def make_optimizer(model, lr):
    """§3.2: AdamW with β = (0.9, 0.95). Not in the paper, from LLaMA: weight decay 0.1, on matrices only.

    `lr_scale` is what µP multiplies the learning rate of the blocks' matrices by (A.5, Fig. 11), 1 otherwise. A step
    shrinks a matrix by rate · decay: divided by the same number, the decay stays what it is at the base width.
    """
    is_vector = lambda p: p.dim() < 2 or hasattr(p, "no_weight_decay")  # which Mamba has (Table 6)
    blocks, ratio = [p for p in model.blocks.parameters() if not is_vector(p)], model.config.mup_ratio
    others = [p for p in model.parameters() if not is_vector(p) and all(p is not q for q in blocks)]  # the embedding
    vectors = [p for p in model.parameters() if is_vector(p)]
    triples = (blocks, 0.1 / ratio, ratio), (others, 0.1, 1.0), (vectors, 0.0, 1.0)
    groups = [{"params": p, "weight_decay": decay, "lr_scale": r, "lr": lr * r} for p, decay, r in triples]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, args):
    """§3.2: linear warm-up, then a cosine. Not in the paper, from LLaMA: the cosine ends at a tenth of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1))) / 2)


def take_step(trained, optimizer, batch, micro_batch, device):
    """One optimizer step on this process's sequences -> tensor of (loss, norm of the gradient), over all processes."""
    micro_batches, loss = batch.split(micro_batch), 0
    for i, ids in enumerate(micro_batches):
        # Gradients add up over micro-batches; replicas exchange them once, in the backward pass of the last one. That
        # is decided before the forward pass, where DDP reads the flag.
        is_last = i == len(micro_batches) - 1
        exchanges = is_last or not isinstance(trained, DistributedDataParallel)
        with nullcontext() if exchanges else trained.no_sync():
            ids = ids.to(device, non_blocking=True)
            part = trained(ids[:, :-1], ids[:, 1:]) * len(ids) / len(batch)  # Eq. 2
            part.backward()
        loss = loss + part.detach()
    # Not in the paper: gradients clipped at norm 1, as LLaMA does.
    grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    # Replicas' gradients lie in the buffers that they exchange: set to zero there, not given up, they exist once.
    optimizer.zero_grad(set_to_none=not isinstance(trained, DistributedDataParallel))
    grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
    figures = torch.stack((loss, grad_norm))
    if data.world_size() > 1:
        dist.all_reduce(figures)
    return figures / data.world_size()


def distribute(model, args, device):
    """The model as the loop calls it: compiled, recomputing, sharded or replicated, as asked."""
    model.recompute = args.recompute
    if args.compile:  # block by block: one short compilation serves all layers
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    if args.shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second

        # FSDP2: a process holds its share of every weight, gradient and moment. A block's weights are gathered in
        # bfloat16 just before they are needed; gradients are averaged in float32 after every micro-batch, since keeping
        # them whole until the last one would cost what sharding saves.
        mesh = dist.init_device_mesh(device.type, (data.world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if data.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    return model


def fit(model, read_batch, args, device, path, settings, title):
    """§3.2's method and nothing else, for any model with a loss: what the scripts of paper/ train by.

    read_batch(step) gives this process's share. The state is kept in `path`, from which the same settings resume.
    Raises FloatingPointError where the loss is no number, before that can be saved.
    """
    trained, optimizer = distribute(model, args, device), make_optimizer(model, args.lr)
    file = data.state_file(path, {"model": model, "optimizer": optimizer}, settings)
    for step, bar in data.resumable_steps(title, args.steps, **file, save_every=args.save_every):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["lr_scale"]
        loss, grad_norm = take_step(trained, optimizer, read_batch(step), args.micro_batch, device).tolist()
        if not math.isfinite(loss + grad_norm):
            words = f"{title}, step {step + 1}: the loss is {loss}, its gradient {grad_norm:.3g}"
            raise FloatingPointError(f"{words}; try a lower --lr, in another --out")
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)


def train(args, device):
    """Pre-train a model, from the data to the samples. All processes of torchrun call this."""
    run = open_run(args, device)
    # `trained` is the model as it is called; run.model is the same weights under their plain names, to be saved.
    trained, optimizer = distribute(run.model, args, device), make_optimizer(run.model, args.lr)
    n_tokens = run.n_sequences * run.tokens_per_sequence  # of a step
    flops = run.model.flops_per_token(run.tokens_per_sequence) * n_tokens  # of a step too
    peak = data.world_size() * peak_flops_per_second(device, run.model.compute_dtype)
    is_main, results, seconds, batch = data.rank() == 0, {}, [], None

    def resume():
        if is_main:
            run.best_loss = trim_log(args.out / "log.jsonl", run.first_step)
        if run.first_step:
            load_moments(run.model, optimizer, run.moments)
            run.moments = None  # makes room
        return run.first_step

    def validate(done):
        # What runs now and then, on batches of other sizes, would cost more compilations than it is worth.
        with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
            results.update(evaluate(trained, run.held_out, args.micro_batch, device))
        if is_main and results:
            log_validation(args, run, results, done)

    save = lambda done: save_checkpoint(args, run, optimizer, done)  # always before validating, which may fail
    for step, bar in data.resumable_steps("training", args.steps, resume, save, args.save_every, validate):
        started, lr = time.perf_counter(), learning_rate(step, args)  # §3.2's schedule, scaled in each group by µP
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = read_batch(run, step, device) if batch is None else batch  # (B, T + 1), the first one of a run
        figures = take_step(trained, optimizer, batch, args.micro_batch, device)
        batch = read_batch(run, step + 1, device)  # while a GPU still computes; the next line waits for it
        loss, grad_norm = figures.tolist()
        if not math.isfinite(loss + grad_norm):
            raise diverged(run, step, loss, grad_norm)
        seconds.append(time.perf_counter() - started)
        speed, mfu = n_tokens / seconds[-1], flops / seconds[-1] / peak
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}", refresh=False)
        if is_main:
            entry = {"step": step + 1, "tokens": (step + 1) * n_tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm}
            append_log(args.out / "log.jsonl", entry | {"tokens_per_second": speed, "mfu": mfu})
    if is_main:
        if seconds:
            time_, memory = np.median(seconds), peak_memory(device) / 2**30
            print(f"median of {len(seconds):,} steps: {n_tokens / time_:,.0f} tokens/s, MFU {flops / time_ / peak:.1%} "
                  f"of {peak / 1e12:,.2f} TFLOP/s; peak memory {memory:.2f} GiB")  # fmt: skip
        finish(args, run, results, device)


def finish(args, run, results, device):
    """The last words of a run: how good the model is, and samples of it."""
    path = args.out / "toto.pt"
    if run.first_step >= args.steps:
        print(f"{path} has {run.first_step:,} steps already; give more --steps than that, or another --out")
    else:
        print(f"wrote {path}")
    print_results(results)
    if not results:
        print("no clip was held out of so few: there is no validation, and there are no samples")
    if run.tokenizer is not None:
        model = toto.load(path, device, run.model.compute_dtype)
        write_samples(toto.for_sampling(model, N_SAMPLES), run.tokenizer, run.held_out, args)


# What a run trains on, and what it begins with.
@dataclass
class Run:
    """What training and evaluating share."""

    tokenizer: object  # None where token folders need no encoding
    meta: dict  # of the token folders: tokenizer, grid, resolution
    mixture: data.Mixture  # the training sequences (§3.3)
    held_out: dict  # {source: data.Source of its validation clips}
    source_weights: list
    model: toto.Toto
    n_sequences: int  # in a step, over all processes
    settings: dict  # what decides which sequences a step sees; a run that resumes must have the same
    first_step: int = 0
    moments: dict = None  # AdamW's, of the run that is resumed
    best_loss: float = math.inf  # lowest validation loss so far

    @property
    def tokens_per_sequence(self):
        return self.settings["frames"] * math.prod(self.meta["grid"])


def open_run(args, device):
    """Everything between the arguments and the first step: checkpoint, tokenizer, token folders, model."""
    path, advice = args.out / "toto.pt", "give another --out"
    resumes = path.exists()
    if args.evaluate and not resumes:
        raise ValueError(f"{path}: no such checkpoint to evaluate")
    if not resumes:
        path, advice = args.init_from, "start from another"
    start = toto.load_checkpoint(path) if path else None
    if start:  # all that can be known before hours of tokenizing
        there, here = asdict(start["config"]), asdict(model_config(args, start["config"].vocab_size))
        if not (resumes and args.rope_base):  # a new run may have another RoPE base than what it starts from (Table 4)
            here["rope_base"] = there["rope_base"]
        data.check_same(path, there, here, advice)
    specs = [parse_spec(spec) for spec in args.data or [data.WORLD]]
    if args.evaluate:  # on what it was trained on, where nothing else is asked for
        specs = specs if args.data else start["plan"]["data"]
        advice = "leave out --frames and --resolution"
        for name, asked in args.asked.items():
            setattr(args, name, asked or start[name])

    # §3.3: all sources, each with its weight. What is no token folder yet becomes one, which may take hours.
    tokenizer = prepare_tokenizer(args, specs, device)
    sources = prepare_sources(args, specs, tokenizer)
    weights, meta = [weight for _, weight in specs], next(iter(sources.values())).meta
    sequences = lambda tokens, **how: data.Source(tokens, args.frames, step=tokens.step(args.stride), **how)
    mixture = data.Mixture([sequences(tokens) for tokens in sources.values()], weights, args.seed)
    held_out = {name: sequences(tokens, held_out=True) for name, tokens in sources.items()}
    n_sequences = sequences_in_a_step(args, math.prod(meta["grid"]), data.world_size())
    settings = {"tokenizer": meta["tokenizer"], "grid": meta["grid"], "data": specs, "frames": args.frames}
    settings |= {"stride": args.stride, "sequences in a step": n_sequences, "seed": args.seed}

    # The seed decides the initial weights and, through the mixture, what every step sees: nothing else is random.
    torch.manual_seed(args.seed)
    config = model_config(args, toto.FIRST_CODE + meta["vocab_size"])
    if start and not args.rope_base:
        config = replace(config, rope_base=start["config"].rope_base)
    model = toto.Toto(config, data.fast_dtype(device))
    run = Run(tokenizer, meta, mixture, held_out, weights, model, n_sequences, settings)
    if start:  # new weights may see other data, at another resolution; the number of processes may always change
        keys = ["tokenizer", "grid", "frames"] if args.evaluate else settings if resumes else ["tokenizer"]
        data.check_same(path, start | start["plan"], {key: settings[key] for key in keys}, advice)
        model.load_state_dict(start["model"])
    if resumes:
        run.first_step, run.moments = start["step"], start["optimizer"]
    model.to(device)
    announce(args, run, device)
    return run


def announce(args, run, device):
    """Say what is about to run, and keep a given tokenizer beside the model, which needs it."""
    if data.rank() > 0:
        return
    grid, dtype = math.prod(run.meta["grid"]), str(run.model.compute_dtype).removeprefix("torch.")
    words = f"{args.steps:,} steps of {run.n_sequences} sequences of {args.frames} x {grid} tokens"
    words += f"; resuming at step {run.first_step:,}" if run.first_step else ""
    if args.evaluate:
        whose = "the given" if args.data else "its training"
        words = f"trained for {run.first_step:,} steps; evaluating on {whose} data, {', '.join(run.held_out)}"
    print(f"{args.size}: {run.model.count_parameters() / 1e6:.2f} M parameters, {dtype} on {device.type}; {words}")
    path = args.out / "dvae.pt"
    if run.tokenizer is None:
        print("no tokenizer given: there will be no samples, and probe.py and sample.py will need --tokenizer")
    elif not path.exists():
        dvae.save(run.tokenizer, path)
    elif args.tokenizer and dvae.load(path).fingerprint() != run.tokenizer.fingerprint():
        raise ValueError(f"{path}: is another tokenizer than --tokenizer; give another --out, or remove it")


def model_config(args, vocab_size):
    """The size that was asked for, with the ids of the tokenizer at hand."""
    config = replace(toto.SIZES[args.size], vocab_size=vocab_size, mup_width=args.mup or 0)
    return replace(config, rope_base=args.rope_base or config.rope_base)


def sequences_in_a_step(args, tokens_per_frame, n_processes):
    """A step is a fixed number of sequences: split evenly over the processes, and there into micro-batches."""
    n_sequences = max(round(args.batch_tokens / (args.frames * tokens_per_frame)), 1)
    if n_sequences % n_processes:
        words = f"{n_processes} processes cannot share the {n_sequences} sequences of a step evenly"
        raise ValueError(f"{words}; give another --batch-tokens")
    return n_sequences


def read_batch(run, step, device):
    """This process's share of a step's sequences, (B, T + 1); the seed and the step alone decide which they are."""
    numbers = range(step * run.n_sequences + data.rank(), (step + 1) * run.n_sequences, data.world_size())
    batch = torch.as_tensor(np.stack([run.mixture.sequence(i)[0] for i in numbers]))
    return batch.pin_memory() if device.type == "cuda" else batch


def diverged(run, step, loss, grad_norm):
    """The error that ends a run whose loss or gradient is no number, naming the sources of the step's sequences."""
    names = list(run.held_out)
    sources = {names[run.mixture.sequence(step * run.n_sequences + i)[1]] for i in range(run.n_sequences)}
    return ValueError(
        f"step {step + 1}: the loss is {loss}, its gradient {grad_norm:.3g}, on sequences of "
        f"{', '.join(sorted(sources))}; nothing of it was saved, and a lower --lr can resume from the last checkpoint"
    )


def parse_spec(spec):
    """PATH or PATH=WEIGHT -> [path, weight]. Not in the paper: sources without a weight get 1."""
    path, _, weight = spec.rpartition("=")
    if data.is_world(spec) or Path(spec).exists():
        return [spec, 1.0]  # no weight, or a path with "=" in it
    if not path or not (Path(path).exists() or data.is_world(path)):
        raise ValueError(f"{path or spec}: no such file or folder")
    try:
        weight = float(weight)
    except ValueError:
        raise ValueError(f"--data {spec}: {weight!r} is not a number to weigh {path} by") from None
    if not 1e-4 <= weight <= 1e4:
        raise ValueError(f"--data {spec}: a weight must lie between 0.0001 and 10,000")
    return [path, weight]


def prepare_tokenizer(args, specs, device):
    """The tokenizer, trained first on the same data where there is none; None where token folders need no encoding."""
    path = args.tokenizer or args.out / "dvae.pt"
    if not path.exists() and args.tokenizer is None:
        media = [source for source, _ in specs if not data.is_token_folder(source)]
        if not media:
            return None
        if data.rank() == 0:
            print(f"no tokenizer at {path}: training one on the same data")
        # All processes train it together; a batch that they cannot share is made larger.
        recipe = replace(dvae.LAPTOP, batch=math.lcm(dvae.LAPTOP.batch, data.world_size()))
        dvae.train_on(media, path, args.resolution, args.stride, args.seed, device, recipe=recipe)
    data.wait_for_all()
    return dvae.load(path, device, data.fast_dtype(device))


def prepare_sources(args, specs, tokenizer):
    """{name: data.Tokens} for all --data; media is tokenized first, all processes sharing the work."""
    sources = {}
    for path, _ in specs:
        if data.is_token_folder(path):
            tokens = data.Tokens(path)
        else:
            shards = data.shards_of(path, args.resolution, args.stride, args.frames)
            tokens = data.tokenize_cached(path, shards, args.out / "tokens", tokenizer, args.resolution, args.stride)
        asked = {"resolution": args.asked["resolution"] or tokens.meta["resolution"]}
        data.check_same(path, tokens.meta, asked, "a token folder keeps what it was made with")
        first = next(iter(sources.values()), tokens)  # one model reads all sources: they must be of one kind
        kind = {key: first.meta[key] for key in ("tokenizer", "grid")}
        data.check_same(path, tokens.meta, kind, f"{first.folder} is of another kind")
        if tokenizer is not None and tokens.meta["tokenizer"] != tokenizer.fingerprint():
            raise ValueError(f"{path}: was made by another tokenizer; give the right one with --tokenizer")
        sources[path if path not in sources else f"{path} ({len(sources)})"] = tokens  # the same one twice is allowed
    return sources


# Validation and samples.
@torch.no_grad()
def evaluate(model, held_out, micro_batch, device, limit=64, by_position=False):
    """For each source, over up to `limit` held-out sequences:

    loss               nats per token, of codes and the end token, as in training (Eq. 2)
    loss_by_frame      of the codes alone (A.1, Fig. 10), and with by_position loss_by_token
    accuracy           of the most probable next code, on all frames but the first
    repeat_accuracy    of the code at the same place of the frame before
    unigram_entropy    the loss of a model that knows nothing but how frequent each code is

    Padding (repeated frames or images, and the end token after them) is not scored.
    """
    results, rank, world_size = {}, data.rank(), data.world_size()
    for name, source in held_out.items():
        (h, w), n = source.tokens.meta["grid"], min(len(source), limit)
        if n == 0:
            continue
        sums = torch.zeros(source.n_frames * h * w + 1, 4, device=device)  # loss, correct, repeated, 1; by position
        counts = torch.zeros(source.tokens.meta["vocab_size"] + toto.FIRST_CODE, dtype=torch.int64, device=device)
        order = np.linspace(0, len(source) - 1, n).round().astype(int)  # spread over all of them
        for start in range(0, n, micro_batch * world_size):
            # Every process runs the model as often as the others, which a sharded one needs: without work of its own,
            # on a sequence that does not count.
            mine = order[start + rank : start + micro_batch * world_size : world_size]
            sequences = [source.sequence(k, source.images) for k in (mine if len(mine) else order[:1])]
            ids, n_real = (torch.as_tensor(np.stack(part)).to(device) for part in zip(*sequences))
            logits, targets = model(ids[:, :-1]), ids[:, 1:]  # (B, T), T - 1 codes and the end token
            if not len(mine):
                continue
            loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # (B, T)
            correct, repeated = logits.argmax(dim=-1) == targets, torch.zeros_like(targets)
            repeated[:, h * w :] = targets[:, h * w :] == targets[:, : -h * w]
            n_targets = n_real * h * w + (n_real == source.n_frames)
            counted = torch.arange(len(sums), device=device) < n_targets[:, None]  # (B, T)
            figures = torch.stack((loss, correct, repeated, counted), dim=-1)
            sums += (figures * counted[..., None]).sum(dim=0)  # (B, T, 4) -> (T, 4)
            counts += torch.bincount(targets[:, :-1][counted[:, :-1]], minlength=len(counts))
        if world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        mean = lambda sums: sums[..., :3] / sums[..., 3:]
        by_token = sums[:-1][sums[:-1, 3] > 0]  # (T - 1, 4), or less where all are short
        by_frame = by_token.view(-1, h * w, 4).sum(dim=1)  # (F, 4)
        _, accuracy, repeat_accuracy = mean(by_frame[1:].sum(dim=0)).tolist() if len(by_frame) > 1 else 3 * [None]
        results[name] = {
            "loss": mean(sums.sum(dim=0))[0].item(),
            "loss_by_frame": [round(x, 4) for x in mean(by_frame)[:, 0].tolist()],
            "accuracy": accuracy,
            "repeat_accuracy": repeat_accuracy,
            "unigram_entropy": torch.special.entr(counts / counts.sum()).sum().item(),
        } | ({"loss_by_token": mean(by_token)[:, 0].tolist()} if by_position else {})
    return results


def print_results(results):
    """The figures of `evaluate`, each beside what it is to be compared with."""
    for name, r in results.items():
        first, *later = r["loss_by_frame"]
        entropy, accuracy, repeat_accuracy = r["unigram_entropy"], r["accuracy"], r["repeat_accuracy"]
        print(f"validation on {name}: {r['loss']:.3f} nats per token; the codes' unigram entropy is {entropy:.3f}")
        if later:  # without, all is single images or frames
            print(f"  first frame {first:.3f}, later frames {np.mean(later):.3f} (A.1)")
            words = f"after the first frame {accuracy:.3f}; repeating the previous frame gives {repeat_accuracy:.3f}"
            print(f"  next-token accuracy {words}")
        if "loss_by_token" in r:
            print("  by frame " + " ".join(f"{loss:.3f}" for loss in r["loss_by_frame"]))
            tokens = np.reshape(r["loss_by_token"], (len(r["loss_by_frame"]), -1)).mean(axis=0)
            print("  by place in a frame, raster order " + " ".join(f"{loss:.2f}" for loss in tokens))


N_SAMPLES = 4  # in samples.gif


def write_samples(model, tokenizer, held_out, args):
    """A GIF of held-out videos (as the tokenizer keeps them) beside what the model makes of their first frames."""
    source = max(held_out.values(), key=lambda source: source.n_videos)  # of several sources that with most videos
    if not len(source):
        return
    (h, w), device = source.tokens.meta["grid"], model.embedding.weight.device
    longest = max(source.tokens.length[source.videos], default=1) // source.step
    F = max(args.frames, min(16, int(longest)))  # beyond what the model sees at once, where there is more (A.8)
    n_prompt, longer = max(F // 4, 1), data.Source(source.tokens, F, held_out=True, step=source.step)
    n = longer.n_videos or longer.n_images  # of one kind, which has one start token
    order = np.linspace(0, n - 1, min(N_SAMPLES, n)).round().astype(int)
    ids = [longer.sequence(k, longer.images)[0] for k in order]
    start, truth = ids[0][0].item(), np.stack(ids)[:, 1:-1].reshape(len(ids), F, h, w) - toto.FIRST_CODE
    truth = torch.as_tensor(truth).to(device)
    with tqdm(total=(F - n_prompt) * h * w, desc="sampling", unit="token", dynamic_ncols=True) as bar:
        how = {"top_p": 0.95, "generator": torch.Generator(device).manual_seed(args.seed), "progress": bar.update}
        made = toto.continue_video(model, truth[:, :n_prompt], F, args.frames, start, **how)
    decode = lambda codes: tokenizer.decode(codes).cpu().numpy()
    rows = [[("truth", decode(real)), ("model", decode(sample))] for real, sample in zip(truth, made)]
    data.write_gif(args.out / "samples.gif", rows, n_prompt)
    print(f"wrote {args.out / 'samples.gif'}: {n_prompt} given frames, then the truth beside the model's continuation")


# Files: checkpoints and the log.
def save_checkpoint(args, run, optimizer, step):
    """Write toto.pt, one file with everything that resuming needs; the sampler has no state but the seed and the step.

    All processes call it, since a sharded state must be put together; the first one writes. The file is the same
    however many there are.
    """
    is_main, path = data.rank() == 0, args.out / "toto.pt"

    def whole(tensor):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.cpu() if is_main else None

    weights = {name: whole(p) for name, p in run.model.state_dict().items()}
    of = lambda p: {key: whole(value) for key, value in optimizer.state[p].items()}
    moments = {name: of(p) for name, p in run.model.named_parameters()}
    if not is_main:
        return
    checkpoint = {"model": weights, "optimizer": moments, "step": step, "config": asdict(run.model.config)}
    checkpoint |= {"plan": run.settings, "tokenizer": run.meta["tokenizer"], "resolution": run.meta["resolution"]}
    checkpoint |= {"stride": args.stride, "frames": args.frames}
    with data.atomic_open(path) as file:
        torch.save(checkpoint, file)
    if args.keep > 1:
        copy_file(path, path.with_name(f"toto-{step}.pt"))
        names = [re.fullmatch(r"toto-(\d+)\.pt", p.name) for p in path.parent.iterdir()]
        steps = sorted(int(name[1]) for name in names if name)
        # Saves from beyond this step are of an earlier run that got further; what comes will replace them.
        for old in [s for s in steps if s > step] + [s for s in steps if s <= step][: -args.keep]:
            path.with_name(f"toto-{old}.pt").unlink()


def load_moments(model, optimizer, moments):
    """Give AdamW the moments and step numbers that were saved, by the names of the weights, sharded like them."""
    for name, p in model.named_parameters():
        for key, value in moments[name].items():
            if hasattr(p, "device_mesh") and value.dim():
                value = dist.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            optimizer.state[p][key] = value.to(p.device, copy=True)


def copy_file(path, copy):
    """As atomic as the save it copies; a link would change with the next save on some file systems."""
    with open(path, "rb") as source, data.atomic_open(copy) as file:
        shutil.copyfileobj(source, file, 2**24)


def append_log(path, entry):
    """One JSON line. Opened anew for every line, so that whoever reads along sees all of them."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def trim_log(path, step):
    """Drop the lines of what came after the last checkpoint, and will come again -> the lowest validation loss left."""
    kept, best = [], math.inf
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # a line that was cut off
            continue
        if entry["step"] < step or entry["step"] == step and "validation" not in entry:
            kept.append(line + "\n")
            best = min(best, entry.get("validation_loss", best))
    with data.atomic_open(path) as file:
        file.write("".join(kept).encode())
    return best


def log_validation(args, run, results, done):
    """Print and log the validation loss; the save of the lowest so far becomes best.pt."""
    weights = [weight for weight, name in zip(run.source_weights, run.held_out) if name in results]
    loss = np.average([result["loss"] for result in results.values()], weights=weights)
    tqdm.write(f"step {done:,}: validation loss " + ", ".join(f"{name} {r['loss']:.3f}" for name, r in results.items()))
    append_log(args.out / "log.jsonl", {"step": done, "validation": results, "validation_loss": loss})
    if loss < run.best_loss:
        run.best_loss = loss
        copy_file(args.out / "toto.pt", args.out / "best.pt")


# The other modes.
def evaluate_checkpoint(args, device):
    """--evaluate: the loss of the checkpoint in --out by source, frame and token, over all held-out sequences."""
    run = open_run(args, device)
    model = distribute(run.model, args, device)
    results = evaluate(model, run.held_out, args.micro_batch, device, limit=10**9, by_position=True)
    if data.rank() == 0:
        print_results(results)
        data.write_json(results, args.out / "validation.json")
        print(f"wrote {args.out / 'validation.json'}, with the loss by frame and by token")


def export(args):
    """--export: the checkpoint in --out, or --init-from, as a folder for Hugging Face's LlamaForCausalLM."""
    toto.export_hf(toto.load(args.init_from or args.out / "toto.pt"), args.export)
    print(f"wrote {args.export}: AutoModelForCausalLM.from_pretrained({str(args.export)!r}) reads it")


def dry_run(args, device):
    """--dry-run: what a run on so many processes would need, in parameters, memory, operations and days."""
    n, tokens_per_frame = args.dry_run, (args.resolution // dvae.DVAE.pixels_per_code) ** 2
    n_sequences = sequences_in_a_step(args, tokens_per_frame, n)
    n_codes = (dvae.SMALL if args.size == "tiny" else dvae.Config()).vocab_size
    with torch.device("meta"):  # shapes without memory
        model = toto.Toto(model_config(args, toto.FIRST_CODE + n_codes))
    tokens_per_sequence = args.frames * tokens_per_frame
    tokens = args.steps * n_sequences * tokens_per_sequence
    flops = model.flops_per_token(tokens_per_sequence) * tokens
    micro_batch = min(args.micro_batch, math.ceil(n_sequences / n))
    parts = memory_needed(model, micro_batch * tokens_per_sequence, n if args.shard else 1, args.recompute)
    if device.type == "cuda" or args.device:  # this machine's rate, or that of a card that is not here
        what, peak = device.type, peak_flops_per_second(device, data.fast_dtype(device))
    else:
        what, peak = "H200", PEAK_TFLOPS["H200"] * 1e12
    print(
        f"{args.size}: {model.count_parameters() / 1e6:,.2f} M parameters, with {model.config.vocab_size:,} ids\n"
        f"{args.steps:,} steps of {n_sequences} sequences of {args.frames} x {tokens_per_frame} tokens: "
        f"{tokens:.3g} tokens, {flops:.3g} FLOPs\n"
        f"in each of {n} processes, {n_sequences / n:g} sequences a step in micro-batches of {micro_batch}:"
    )
    for part, size in (parts | {"together": sum(parts.values())}).items():
        print(f"  {part:<28}{size / 2**30:>8.2f} GiB")
    for mfu in (0.3, 0.4, 0.5):
        days = flops / (mfu * n * peak) / 86400
        time_ = f"{days:,.2f} days" if days >= 1 else f"{24 * days:,.2f} hours"
        print(f"at {mfu:.0%} of {n} x {peak / 1e12:.4g} TFLOP/s ({what}): {time_}")


def memory_needed(model, n_tokens, n_shards=1, recompute=False):
    """{part: bytes} in a process that trains on n_tokens at a time in bfloat16. A run prints what it really took."""
    c, n = model.config, sum(p.numel() for p in model.parameters())
    # What a block keeps of a token for its backward pass: the inputs and outputs of its two norms, q, k and v, q and k
    # turned, the pooled values; gate and up, SiLU(gate), and its product with up. With recomputing, only its input.
    kept = 10 * c.dim + 4 * c.hidden
    layers = (c.n_layers * c.dim + kept) if recompute else c.n_layers * kept
    parts = {"weights, float32": 4 * n, "gradients, float32": 4 * n, "AdamW's moments, float32": 8 * n}
    parts = {part: size // n_shards for part, size in parts.items()}
    copies = 0 if recompute or n_shards > 1 else 2 * n  # in bfloat16, kept from the forward to the backward pass
    return parts | {"activations, about": 2 * n_tokens * layers + copies}


def peak_memory(device):
    """Bytes, the most that this process has held so far: of GPU memory, or resident with Python and torch."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops_per_second(device, dtype):
    """The device's matrix rate, which MFU is a share of: from the table, else from a matrix product here and now."""
    if device.type == "cuda":
        for name, tflops in PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name(device) and dtype == torch.bfloat16:
                return tflops * 1e12
    n = 1024 if device.type == "cpu" else 4096  # a product that keeps the device busy, 2 n³ FLOPs
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)  # the fastest: others may use the machine too


def parse_arguments(words=None):
    """The arguments of the command line, or of a list of words with which another program trains (Fig. 6)."""
    parser = data.make_parser(__doc__)
    add, count, positive = parser.add_argument, data.number(int, at_least=1), data.number(float, above=0)
    about = lambda name: f"(default: {PAPER[name]:,}, or {LAPTOP[name]:,} for tiny)"
    default = lambda words: f"(default: {words}; with --evaluate as in training)"
    add("--data", nargs="+", metavar="PATH[=WEIGHT]", help=f"token or media folders {default('the built-in world')}")
    add("--size", default="tiny", choices=toto.SIZES, help="tiny for a laptop; Table 1's; a1 to a6 of Table 15")
    add("--out", default="out", type=data.output_folder, help="folder for the checkpoint, the log and the samples")
    add("--tokenizer", type=Path, help="dvae.pt, or OpenAI's folder (default: that of --out, trained first if missing)")
    add("--resolution", type=dvae.frame_side, help=f"side of the frames in pixels {about('resolution')}")
    add("--frames", type=data.number(int, at_least=2), help=f"frames in a sequence {about('frames')}")
    add("--stride", type=count, help=f"read every n-th frame of a video {default(4)}")
    add("--steps", type=count, help=f"optimizer steps {about('steps')}")
    add("--batch-tokens", type=count, help=f"visual tokens in a step, over all processes {about('batch_tokens')}")
    add("--micro-batch", type=count, default=4, help="sequences in one forward pass of one process")
    add("--lr", type=positive, help=f"peak learning rate {about('lr')}")
    add("--warmup", type=data.number(int, at_least=0), help=f"steps of linear warm-up {about('warmup')}")
    add("--save-every", type=count, help=f"steps between checkpoints {about('save_every')}")
    add("--keep", type=count, default=1, help="checkpoints to keep: toto.pt, and with 2 or more toto-STEP.pt")
    add("--init-from", type=Path, help="start from the weights of this checkpoint (Table 4: at --resolution 256)")
    add("--rope-base", type=positive, help="RoPE's base (default: the size's, or of --init-from; 50,000 in Table 4)")
    add("--mup", type=count, metavar="WIDTH", help="µ-parametrisation with this base width (A.5)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks (default: on CUDA only)")
    add("--shard", action="store_true", help="FSDP2 under torchrun: weights and optimizer split over the processes")
    add("--recompute", action="store_true", help="activation checkpointing: less memory for a third more work")
    add("--evaluate", action="store_true", help="no training: the loss of the checkpoint in --out, in detail")
    add("--export", type=Path, metavar="FOLDER", help="no training: --init-from or --out for Hugging Face's Llama")
    add("--dry-run", type=count, nargs="?", const=1, metavar="N", help="no training: what N GPUs would need, or CPUs")
    args = parser.parse_args(words)
    args.asked = {name: getattr(args, name) for name in ("resolution", "stride", "frames")}  # None where nothing was
    args.stride = args.stride or 4
    for name, value in (LAPTOP if args.size == "tiny" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def parse_study(parser, out, steps):
    """The arguments of a script of paper/ that pre-trains on images (§4.1), with the flags that all of them have.

    §4.1 trains `large` on ImageNet-1k for 400 epochs: 1,281,167 images · 400 / (256 sequences of 16) steps.
    """
    add, count, positive = parser.add_argument, data.number(int, at_least=1), data.number(float, above=0)
    about = lambda name, tiny: f"(default: {PAPER[name]:,}, or {tiny:,} for tiny)"
    add("--data", default=data.WORLD_IMAGES, help="folder of images to pre-train on, or the built-in ones")
    add("--probe", help="folder with train/<class>/* and val/<class>/* (default: of the built-in images)")
    add("--tokenizer", type=Path, help="dvae.pt, or OpenAI's folder (default: out/dvae.pt, or of --data that in --out)")
    add("--size", default="tiny", choices=toto.SIZES, help="tiny for a laptop; §4.1 has large")
    add("--resolution", type=dvae.frame_side, help=f"side of the images in pixels {about('resolution', 48)}")
    add("--steps", type=count, help=f"optimizer steps of each run (default: 125,113, or {steps} for tiny)")
    add("--seeds", type=count, default=3, help="runs of each kind, from --seed on")
    add("--batch-tokens", type=count, help=f"tokens in a step, of all processes {about('batch_tokens', 1024)}")
    add("--micro-batch", type=count, default=4, help="sequences in one forward pass of one process")
    add("--lr", type=positive, help=f"peak rate; Table 6 tries a third and thrice of it too {about('lr', 0.003)}")
    add("--out", default=out, type=data.output_folder, help="folder for results, states of runs, and cached tokens")
    args = parser.parse_args()
    defaults = LAPTOP | {"steps": steps} if args.size == "tiny" else PAPER | {"steps": 125_113}
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name, None) or value)
    if data.is_world(args.data) and args.data != data.WORLD_IMAGES:
        raise ValueError(f"--data {args.data}: has videos; of the built-in world these are for {data.WORLD_IMAGES}")
    args.has_probe = args.probe is not None or data.is_world(args.data)
    for folder in [Path(args.probe) / split for split in ("train", "val")] if args.probe else []:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; --probe needs train/<class>/* and val/<class>/*")
    args.compile, args.shard, args.recompute, args.stride = False, False, False, 4
    return args


def parse_task(description, data_help, out, paper, laptop, clips, seeds, more=lambda add: None):
    """The arguments of a script of paper/ that pre-trains on clips of its task and then fine-tunes (Tables 9 and 12).

    `paper` and `laptop` hold the defaults that follow from the model (None until `open_task`); `more` adds flags.
    """
    parser = data.make_parser(description)
    add, count, positive = parser.add_argument, data.number(int, at_least=1), data.number(float, above=0)
    about = lambda name: f"(default: {paper[name]:,}, or {laptop[name]:,} for tiny)"
    add("--data", help=data_help)
    add("--checkpoint", type=Path, help="a model of train.py (default: pre-trained on the training clips)")
    add("--tokenizer", type=Path, help="its tokenizer (default: dvae.pt beside it, or in --out, trained if missing)")
    add("--size", default="tiny", choices=toto.SIZES, help="of the model to pre-train; §4.4 and §4.7 have large")
    add("--resolution", type=dvae.frame_side, help=f"side of the frames in pixels {about('resolution')}")
    add("--clips", type=data.number(int, at_least=10), default=clips, help="of the stand-in, most of them for training")
    add("--steps", type=count, help=f"of pre-training {about('steps')}")
    add("--batch-tokens", type=count, help=f"tokens in a step of it, of all processes {about('batch_tokens')}")
    add("--micro-batch", type=count, default=4, help="sequences in one forward pass of it, in one process")
    add("--lr", type=positive, help=f"peak rate of it {about('lr')}")
    add("--epochs", type=count, help=f"of fine-tuning {about('epochs')}")
    add("--finetune-lr", type=positive, help=f"peak rate of it {about('finetune_lr')}")
    add("--batch", type=count, help=f"clips in a step of fine-tuning, over all processes {about('batch')}")
    add("--seeds", type=count, default=seeds, help="runs of each kind, from --seed on")
    add("--out", default=out, type=data.output_folder, help="folder for results, models and cached tokens")
    more(add)
    args = parser.parse_args()
    args.compile, args.shard, args.recompute, args.probe = False, False, False, None
    return args


def open_task(args, paper, laptop, keep=("resolution",)):
    """-> (device, tokenizer or None): starts processes, and fills in what --checkpoint or its size decide."""
    device, tokenizer, config = data.pick_device(args.device), None, toto.SIZES[args.size]
    data.start_processes(device)
    if args.checkpoint:
        _, tokenizer, checkpoint = dvae.load_trained(args.checkpoint, args.tokenizer, device)
        config = checkpoint["config"]
        if args.resolution not in (None, checkpoint["resolution"]):
            raise ValueError(f"--resolution {args.resolution}: {args.checkpoint} has {checkpoint['resolution']}")
        vars(args).update({key: checkpoint[key] for key in keep})
    for name, value in (laptop if toto.is_tiny(config) else paper).items():
        setattr(args, name, getattr(args, name, None) or value)
    return device, tokenizer


def tokenizer_of_clips(args, items, source, device):
    """--tokenizer, or dvae.pt in --out: a small dVAE, which is trained first, on the data.Items, if it is missing.

    Not by dvae.train_on, which reads folders of media. dvae.json beside it keeps what it was trained on, with `source`
    for what the items' contents follow from: with other settings it is refused.
    """
    path, state, kept = args.tokenizer or args.out / "dvae.pt", args.out / "dvae.pt.training", args.out / "dvae.json"
    settings = {"resolution": args.resolution, "seed": args.seed, "clips": len(items), "source": source}

    def work():
        recipe = replace(dvae.LAPTOP, batch=math.lcm(dvae.LAPTOP.batch, data.world_size()))
        read_pool = lambda i: data.gather_frames(
            items, dvae.POOL, args.resolution, [args.seed, i, data.rank()], per_item=32, quiet=data.rank() > 0
        )
        how = args.seed, device, data.fast_dtype(device), state, settings | {"processes": data.world_size()}
        model = dvae.train(read_pool, dvae.SMALL, recipe, *how)
        if data.rank() == 0:
            examples = data.gather_frames(items[:8], 8, args.resolution, per_item=1, quiet=True)
            dvae.draw_kept(model, examples, path.with_suffix(".png"))
            dvae.save(model, path)
            for file in (state, dvae.warm_start_file(state)):
                file.unlink(missing_ok=True)

    if args.tokenizer is None:
        if path.exists() and not kept.exists():
            words = f"{kept.name} is missing, which tells what it was trained on"
            raise ValueError(f"{path}: {words}; remove it, or give it by --tokenizer")
        if kept.exists() and not path.exists():
            raise ValueError(f"{path}: is missing, although {kept} is there; remove that")
        data.once(kept, settings, work)
    data.wait_for_all()
    return dvae.load(path, device, data.fast_dtype(device))


def pre_train(args, source, tokenizer, device, seed=None):
    """§3.2 on the clips of a token folder -> {"loss", …} of those held out among them.

    Writes toto.pt to --out, or for a seed of its own toto-SEED.pt. `source` makes a data.Source of the training clips
    or, with held_out=True, of the others.
    """
    ending, seed = ("", args.seed) if seed is None else (f"-{seed}", seed)
    training, path = source(), args.out / f"toto{ending}.pt"
    grid = training.tokens.meta["grid"]

    def work(state, settings):
        torch.manual_seed(seed)
        config = replace(toto.SIZES[args.size], vocab_size=toto.FIRST_CODE + tokenizer.config.vocab_size)
        model = toto.Toto(config, data.fast_dtype(device)).to(device)
        how = argparse.Namespace(frames=training.n_frames, batch_tokens=args.batch_tokens)
        n_sequences = sequences_in_a_step(how, math.prod(grid), data.world_size())
        run = argparse.Namespace(n_sequences=n_sequences, mixture=data.Mixture([training], [1.0], seed))
        fit(model, lambda i: read_batch(run, i, device), args, device, state, settings, f"pre-training{ending}")
        result = evaluate(model, {"clips": source(held_out=True)}, args.micro_batch, device)["clips"]
        if data.rank() == 0:
            checkpoint = {"step": args.steps, "tokenizer": tokenizer.fingerprint(), "stride": 1}
            checkpoint |= {"frames": training.n_frames}
            dvae.save_trained(model, tokenizer, checkpoint, args.resolution, path)
        return {key: result[key] for key in ("loss", "unigram_entropy", "accuracy", "repeat_accuracy")}

    kept = args.out / "runs" / f"pre-training{ending}.json"
    if kept.exists() and not path.exists():
        raise ValueError(f"{path}: is missing, although {kept} is there; remove that")
    contents = data.checksum(*(training.tokens.codes(i) for i in range(len(training.tokens))))
    settings = {"tokenizer": tokenizer.fingerprint(), "contents": contents, "frames": training.n_frames}
    return kept_run(args, kept.stem, settings | {"seed": seed}, work)


def kept_run(args, name, settings, work):
    """What work(state, settings) gives, done once and kept in --out/runs; `state` is where `fit` keeps its own."""
    keys = "data", "probe", "resolution", "size", "steps", "batch_tokens", "lr"
    settings |= {key: getattr(args, key) for key in keys}
    path = args.out / "runs" / f"{name.replace(' ', '-')}.json"
    result = data.once(path, settings, lambda: work(path.with_suffix(".pt"), settings))
    path.with_suffix(".pt").unlink(missing_ok=True)
    return result


def study_tokenizer(args, device):
    """--tokenizer, or that of `python train.py`, or one of --data in --out; a small dVAE, trained first if missing."""
    is_world = data.is_world(args.data)
    args = argparse.Namespace(**vars(args) | {"out": Path("out") if is_world else args.out})
    return prepare_tokenizer(args, [[data.WORLD if is_world else args.data, 1.0]], device)


def main():
    args = parse_arguments()
    if args.export:
        return export(args)
    device = data.pick_device(args.device)
    if args.dry_run:
        return dry_run(args, device)
    data.start_processes(device)
    if args.shard and data.world_size() == 1:
        raise ValueError("--shard splits a model over processes; start several with torchrun")
    if args.compile is None:
        args.compile = device.type == "cuda" and not args.evaluate
    (evaluate_checkpoint if args.evaluate else train)(args, device)


if __name__ == "__main__":
    data.run(main)
