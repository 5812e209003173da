"""Pre-training: next-token prediction over mixed images and videos (§3.1, §3.2).

    python train.py                                    all of it on the built-in world: minutes on two cores
    python train.py --data VIDEOS IMAGES=0.2           your own folders of media, or token folders, mixed by weight
    torchrun --nproc_per_node=8 train.py --size 1b --data tokens/howto100m=0.6 tokens/imagenet=0.2 ...
    python train.py --size 1b --dry-run 64             what a run on 64 GPUs would need
    python train.py --size base --benchmark            how fast it is on this machine

Reads token folders; a folder of media is tokenized first, with out/dvae.pt, which is trained first if it is missing.
Writes to --out: toto.pt (everything needed to go on), best.pt (the save of the lowest validation loss), log.jsonl (one
line a step) and samples.gif. Run again with the same --out, it goes on where it stopped.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import data
import dvae
import toto

# §3.2: AdamW, peak 3e-4, 2,000 warm-up steps, batches of 2^20 tokens; §3.3: 10^12 tokens; §3.4: R = 128.
PAPER = {"resolution": 128, "batch_tokens": 2**20, "steps": 953_674, "lr": 3e-4, "warmup": 2000, "save_every": 1000}
# Not in the paper: what trains `tiny` on two cores in minutes.
LAPTOP = {"resolution": 48, "batch_tokens": 2**10, "steps": 4200, "lr": 5e-3, "warmup": 50, "save_every": 500}

# Dense bf16 matrix rates in TFLOP/s from the makers' data sheets, by a word of the device's name.
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "4090": 165,
    "3090": 71,
}  # fmt: skip


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Pre-train Toto. Run again with the same --out, it goes on where it stopped.",
        formatter_class=data.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data", nargs="+", metavar="PATH[=WEIGHT]", help="token folders or folders of media (default: built-in world)"
    )
    add("--size", default="tiny", help=f"one of {', '.join(toto.SIZES)}")
    add("--out", default="out", type=Path, help="folder for the checkpoint, the log and the samples")
    add(
        "--tokenizer",
        type=Path,
        help="a dvae.pt, or OpenAI's folder (default: the one in --out, trained first if media need one)",
    )
    add("--resolution", type=data.resolution, help=f"side of the frames in pixels (default: {about('resolution')})")
    add("--frames", type=data.positive, default=16, help="frames in a sequence, at least 2")
    add("--stride", type=data.positive, help="keep every n-th frame of a video (default: 4)")
    add("--steps", type=data.positive, help=f"optimizer steps (default: {about('steps')})")
    add(
        "--batch-tokens",
        type=data.positive,
        help=f"visual tokens in a step, over all processes (default: {about('batch_tokens')})",
    )
    add("--micro-batch", type=data.positive, default=4, help="sequences in one forward pass of one process")
    add("--lr", type=data.rate, help=f"peak learning rate (default: {about('lr')})")
    add("--warmup", type=int, help=f"steps of linear warm-up (default: {about('warmup')})")
    add("--save-every", type=data.positive, help=f"steps between checkpoints (default: {about('save_every')})")
    add("--keep", type=data.positive, default=1, help="checkpoints to keep: toto.pt, and with 2 or more toto-STEP.pt")
    add(
        "--init-from",
        type=Path,
        help="start from the weights of this checkpoint (Table 4: fine-tune at --resolution 256)",
    )
    add(
        "--rope-base", type=data.rate, help="RoPE's base (default: 10,000, or that of --init-from; Table 4 uses 50,000)"
    )
    add(
        "--evaluate",
        action="store_true",
        help="no training: loss by source, frame and token of the checkpoint in --out",
    )
    add("--mup", type=data.positive, metavar="WIDTH", help="µ-parametrisation with this base width (A.5)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="fuse the blocks with torch.compile (default: on CUDA only; on a CPU it takes half a minute to start)",
    )
    add("--shard", action="store_true", help="FSDP2 under torchrun: weights and optimizer split over the processes")
    add("--recompute", action="store_true", help="activation checkpointing: less memory for a third more work")
    add(
        "--dry-run",
        type=data.positive,
        nargs="?",
        const=1,
        metavar="PROCESSES",
        help="print what the run would need on that many GPUs, and leave; with --device cpu, on CPUs",
    )
    add("--benchmark", action="store_true", help="measure a few steps (of random tokens without --data), and leave")
    add("--seed", type=data.natural, default=0, help="of everything random")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()
    if args.size not in toto.SIZES:
        raise ValueError(f"--size {args.size}: there is no such size; choose from {', '.join(toto.SIZES)}")
    if args.frames < 2:
        raise ValueError("--frames 1: a sequence needs at least 2 frames")
    args.asked = {"resolution": args.resolution, "stride": args.stride}  # what token folders must agree with
    args.stride = args.stride or 4
    for name, value in (LAPTOP if args.size == "tiny" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def about(name):
    return f"{PAPER[name]:,}, or {LAPTOP[name]:,} for tiny"


def main():
    args = parse_arguments()
    device = data.pick_device(args.device)
    compute_dtype = data.fast_dtype(device)
    if args.dry_run:
        return print_plan(args, device)
    rank, world_size = dvae.start_processes(device)
    if args.shard and world_size == 1:
        raise ValueError("--shard splits a model over processes; start several with torchrun")
    if args.compile is None:
        args.compile = device.type == "cuda"
    train(args, device, compute_dtype, rank, world_size)
    if world_size > 1:
        dist.barrier()  # the first one may still draw samples
        dist.destroy_process_group()


def train(args, device, compute_dtype, rank, world_size):
    """All that one process does, from the data to the samples."""
    checkpoint_path, log_path = args.out / "toto.pt", args.out / "log.jsonl"
    if args.evaluate and not checkpoint_path.exists():
        raise ValueError(f"{checkpoint_path}: no such checkpoint to evaluate")
    is_main = rank == 0
    say = print if is_main else lambda *words: None
    # A run that goes on keeps its RoPE base; a new one may start from the weights of another (Table 4).
    goes_on = checkpoint_path.exists() and not args.benchmark
    start_path = checkpoint_path if goes_on else args.init_from
    start = toto.load_checkpoint(start_path) if start_path else None
    advice = "give another --out" if goes_on else "start from another"
    if start:  # all that can be known before hours of tokenizing
        there, here = asdict(start["config"]), asdict(model_config(args, start["config"].vocab_size))
        if not (goes_on and args.rope_base):
            here["rope_base"] = there["rope_base"]
        dvae.check_plan(start_path, there, here, advice)

    if args.benchmark and not args.data:
        specs, tokenizer, held_out, mixture = [], None, {}, None
        side = args.resolution // dvae.PIXELS_PER_CODE
        meta = {"grid": [side, side], "vocab_size": usual_codes(args.size), "tokenizer": None}
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        specs = [parse_spec(spec) for spec in args.data or [data.WORLD]]
        tokenizer = prepare_tokenizer(args, specs, device, compute_dtype, is_main)
        sources = prepare_sources(args, specs, tokenizer, rank, world_size)
        mixture = data.Mixture(
            [data.Source(tokens, args.frames) for tokens in sources.values()],
            [weight for _, weight in specs],
            args.seed,
        )
        held_out = {name: data.Source(tokens, args.frames, held_out=True) for name, tokens in sources.items()}
        meta = next(iter(sources.values())).meta

    # A step is a fixed number of sequences: split evenly over the processes, then into micro-batches.
    tokens_per_frame = math.prod(meta["grid"])
    tokens_per_sequence = args.frames * tokens_per_frame
    n_sequences = max(round(args.batch_tokens / tokens_per_sequence), 1)
    if n_sequences % world_size:
        raise ValueError(
            f"--batch-tokens makes {n_sequences} sequences, which {world_size} processes cannot share evenly"
        )

    torch.manual_seed(args.seed)
    config = model_config(args, toto.FIRST_CODE + meta["vocab_size"])
    if start and not args.rope_base:
        config = replace(config, rope_base=start["config"].rope_base)
    model = toto.Toto(config, compute_dtype)
    # What decides which sequences a step sees: a run that goes on must have the same. The number of processes is free.
    plan = {"tokenizer": meta["tokenizer"], "grid": meta["grid"], "data": specs, "frames": args.frames}
    plan |= {"sequences in a step": n_sequences, "seed": args.seed}
    if start:
        keys = plan if goes_on else ["tokenizer"]  # new weights may see other data, at another resolution
        keys = ["tokenizer", "grid", "frames"] if args.evaluate else keys
        dvae.check_plan(start_path, start["plan"], {key: plan[key] for key in keys}, advice)
        model.load_state_dict(start["model"])
    trained = distribute(model.to(device), args, device, world_size)
    optimizer = make_optimizer(model, args.lr)
    first_step = 0
    if goes_on:
        load_averages(model, optimizer, start["optimizer"])
        first_step = start["step"]
    del start
    flops_per_step = model.flops_per_token(tokens_per_sequence) * n_sequences * tokens_per_sequence
    peak_flops = world_size * peak_flops_per_second(device, compute_dtype)
    steps = f"{args.steps:,} steps of {n_sequences} sequences of {args.frames} x {tokens_per_frame} tokens"
    say(
        f"{args.size}: {model.count_parameters() / 1e6:.2f} M parameters, {str(compute_dtype)[6:]} on {device.type}; "
        + (f"trained for {first_step:,} steps" if args.evaluate else steps)
        + (f"; going on at step {first_step:,}" if first_step and not args.evaluate else "")
    )

    def read_batch(step):
        """This process's share of a step's sequences; which they are depends on nothing but the seed and the step."""
        numbers = range(step * n_sequences + rank, (step + 1) * n_sequences, world_size)
        if mixture:
            batch = torch.as_tensor(np.stack([mixture.sequence(i)[0] for i in numbers]))
        else:
            batch = torch.randint(toto.FIRST_CODE, config.vocab_size, (len(numbers), tokens_per_sequence + 2))
        return batch.pin_memory() if device.type == "cuda" else batch

    # What runs now and then, on batches of other sizes, would cost more compilations than it is worth.
    uncompiled = torch.compiler.set_stance if args.compile else nullcontext

    def check(done):
        """Validation loss into the log; the save of the lowest so far becomes best.pt."""
        nonlocal best_loss
        with uncompiled("force_eager"):
            results = evaluate(trained, held_out, args.micro_batch, device, rank, world_size)
        if is_main and results:
            report = ", ".join(f"{name} {result['loss']:.3f}" for name, result in results.items())
            tqdm.write(f"step {done:,}: validation loss {report}")
            weights = [weight for (_, weight), name in zip(specs, held_out) if name in results]
            loss = np.average([result["loss"] for result in results.values()], weights=weights)
            append_log(log_path, {"step": done, "validation": results, "validation_loss": loss})
            if loss < best_loss:
                best_loss = loss
                copy_file(checkpoint_path, args.out / "best.pt")
        return results

    def leave(done):
        if world_size > 1:
            dist.barrier()  # where one process ends, torchrun ends the others, which may still write
        progress.close()
        say(f"stopped and saved at step {done:,}; the same command goes on from there")
        raise KeyboardInterrupt

    if args.benchmark:
        n_tokens = n_sequences * tokens_per_sequence
        return benchmark(trained, optimizer, read_batch, args, device, n_tokens, flops_per_step, peak_flops)
    if is_main and tokenizer is None:
        print("no tokenizer given: there will be no samples, and probe.py and sample.py will need --tokenizer")
    elif is_main and args.tokenizer and args.tokenizer != args.out / "dvae.pt":
        keep_tokenizer(tokenizer, args.out / "dvae.pt")
    if args.evaluate:
        with uncompiled("force_eager"):
            results = evaluate(trained, held_out, args.micro_batch, device, rank, world_size, 10**9, by_position=True)
        if is_main:
            print_results(results)
            data.write_json(results, args.out / "validation.json")
            print(f"wrote {args.out / 'validation.json'}, with the loss by frame and by token")
        return
    kept = trim_log(log_path, first_step) if is_main else []
    best_loss = min((entry["validation_loss"] for entry in kept if "validation_loss" in entry), default=math.inf)

    # Ctrl-C and SIGTERM ask the loop to save and leave: between two micro-batches (the step is then taken again), or
    # with several processes, which must agree, after the step. Asked again, they end it at once.
    signals = dvae.listen_for_stop()
    results = None
    if goes_on and (first_step % args.save_every == 0 or first_step >= args.steps):
        results = check(first_step)  # which a stop right after the save may have left undone
    progress = tqdm(
        range(first_step, args.steps), initial=first_step, total=args.steps,
        desc="training", unit="step", dynamic_ncols=True, disable=not is_main,
    )  # fmt: skip
    batch = read_batch(first_step)
    for step in progress:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["lr_scale"]
        taken = take_step(trained, optimizer, batch, args, device, lambda: signals and world_size == 1)
        if taken is None:
            save(checkpoint_path, model, optimizer, step, plan, meta, args)
            leave(step)
        losses, grad_norm = taken

        batch = read_batch(step + 1)  # while a GPU still computes; the next lines wait for it, once a step
        figures = torch.stack((losses.sum(), grad_norm, torch.tensor(float(len(signals)), device=device)))
        if world_size > 1:  # all processes must agree on whether to stop
            dist.all_reduce(figures)
        loss, grad_norm, stop = (figures / figures.new_tensor((world_size, world_size, 1))).tolist()
        seconds = time.perf_counter() - started
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise diverged(step, loss, grad_norm, losses, mixture, list(sources), n_sequences, args, rank, world_size)
        if is_main:
            speed, mfu = n_sequences * tokens_per_sequence / seconds, flops_per_step / seconds / peak_flops
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}")
            append_log(
                log_path,
                {"step": step + 1, "tokens": (step + 1) * n_sequences * tokens_per_sequence, "loss": loss}
                | {"lr": learning_rate(step, args), "grad_norm": grad_norm}
                | {"tokens_per_second": speed, "mfu": mfu},
            )
        done = step + 1
        if done % args.save_every == 0 or done == args.steps or stop:
            save(checkpoint_path, model, optimizer, done, plan, meta, args)  # first of all: what comes after may fail
            if stop:
                leave(done)
            results = check(done)

    if first_step >= args.steps:
        say(
            f"{checkpoint_path} has {first_step:,} of {args.steps:,} steps already; give more --steps, or another --out"
        )
    dvae.stop_listening()
    if is_main:
        print(f"wrote {checkpoint_path}")
        print_results(results)
        if not results:
            print("no clip was held out of so few: there is no validation, and there are no samples")
        if tokenizer is not None:
            write_samples(toto.load(checkpoint_path, device, compute_dtype), tokenizer, held_out, args)


def usual_codes(size):
    """How many codes there are: OpenAI's 8,192, but for `tiny` those of the small tokenizer."""
    return dvae.SMALL.vocab_size if size == "tiny" else 8192


def model_config(args, vocab_size):
    config = replace(toto.SIZES[args.size], vocab_size=vocab_size, mup_width=args.mup or 0)
    return replace(config, rope_base=args.rope_base or config.rope_base)


def distribute(model, args, device, world_size):
    """The model as the loop calls it: compiled, recomputing, sharded or replicated, as asked."""
    model.recompute = args.recompute
    if args.compile:  # block by block: one short compilation serves all layers
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    if args.shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second

        # FSDP2: a process holds its share of every weight, gradient and average. A block's weights are gathered in
        # bfloat16 just before they are needed; gradients are averaged in float32 after every micro-batch, since keeping
        # them whole until the last one would cost what sharding saves.
        mesh = dist.init_device_mesh(device.type, (world_size,))
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    return model


def take_step(trained, optimizer, batch, args, device, is_stopped=lambda: False):
    """One optimizer step on this process's sequences -> its loss, in parts by micro-batch, and the gradient's norm.

    None if is_stopped between two micro-batches: nothing has changed then.
    """
    micro_batches, losses = batch.split(args.micro_batch), []
    for i, ids in enumerate(micro_batches):
        if is_stopped():
            return None
        # Gradients add up over micro-batches; replicas exchange them once, in the backward pass of the last one. That
        # is decided before the forward pass, where DDP reads the flag.
        is_last = i == len(micro_batches) - 1
        exchanges = is_last or not isinstance(trained, DistributedDataParallel)
        with nullcontext() if exchanges else trained.no_sync():
            ids = ids.to(device, non_blocking=True)
            loss = trained(ids[:, :-1], ids[:, 1:]) * len(ids) / len(batch)  # Eq. 2
            loss.backward()
        losses.append(loss.detach())
    # Not in the paper: gradients clipped at norm 1, as LLaMA does.
    grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
    optimizer.step()
    # Replicas' gradients lie in the buffers that they exchange: set to zero there, not given up, they exist once.
    optimizer.zero_grad(set_to_none=not isinstance(trained, DistributedDataParallel))
    return torch.stack(losses), grad_norm.full_tensor() if args.shard else grad_norm


def diverged(step, loss, grad_norm, losses, mixture, names, n_sequences, args, rank, world_size):
    """The error to end a run with whose loss or gradient is no number, naming the sources of such sequences."""
    numbers = range(step * n_sequences + rank, (step + 1) * n_sequences, world_size)
    bad = set()
    for i in (~losses.isfinite()).nonzero().flatten().tolist():
        bad |= {names[mixture.sequence(k)[1]] for k in numbers[i * args.micro_batch :][: args.micro_batch]}
    if world_size > 1:
        everywhere = [None] * world_size
        dist.all_gather_object(everywhere, bad)
        bad = set().union(*everywhere)
    return ValueError(
        f"step {step + 1}: the loss is {loss}, its gradient {grad_norm:.3g}"
        + (f", on sequences of {', '.join(sorted(bad))}" if bad else "")
        + "; nothing of it was saved, and a lower --lr can go on from the last checkpoint"
    )


def benchmark(trained, optimizer, read_batch, args, device, n_tokens, flops_per_step, peak_flops, n_steps=5):
    """Print tokens/s, MFU, peak memory and the time outside matrix products of training steps."""

    def step():
        batch = read_batch(0)
        loss, grad_norm = take_step(trained, optimizer, batch, args, device)
        loss.sum().item()  # waits for the device

    for _ in range(2):  # the first compiles, and allocates what the later ones reuse
        step()
    started = time.perf_counter()
    for _ in tqdm(range(n_steps), desc="benchmark", unit="step", disable=dist.is_initialized() and dist.get_rank() > 0):
        step()
    seconds = (time.perf_counter() - started) / n_steps
    if device.type == "cuda":
        memory, what = torch.cuda.max_memory_allocated(device), "of GPU memory"
    else:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        memory, what = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident, Python and torch included"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as profiled:
        step()
    rows = profiled.key_averages()
    products = [op for op in rows if re.fullmatch(r"aten::\w*(mm|attention\w*)", op.key)]
    if device.type == "cuda":  # kernels have rows of their own, beside those of the calls that started them
        kernels = [op for op in rows if op.device_type == torch.autograd.DeviceType.CUDA and not op.is_user_annotation]
        in_products, in_all = (sum(op.self_device_time_total for op in ops) for ops in (products, kernels))
    else:
        in_products, in_all = (sum(op.self_cpu_time_total for op in ops) for ops in (products, rows))
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"{args.size}, {n_tokens:,} tokens a step, micro-batches of {args.micro_batch}: "
            f"{n_tokens / seconds:,.0f} tokens/s\n"
            f"  MFU {flops_per_step / seconds / peak_flops:.1%} of {peak_flops / 1e12:,.2f} TFLOP/s\n"
            f"  {1 - in_products / in_all:.0%} of the time outside matrix products and attention\n"
            f"  peak memory {memory / 2**30:.2f} GiB ({what})"
        )


def memory_plan(config, n_ids, micro_batch, on_cpu=False, n_shards=1, recompute=False):
    """{part: bytes} in one process that trains on sequences of n_ids ids in bfloat16, without torch.compile."""
    D, H, L = config.dim, config.n_heads, config.n_layers
    embedding = math.ceil(config.vocab_size / 128) * 128 * D
    block = 4 * D * D + 3 * D * config.hidden + 2 * D
    n = embedding + L * block + D
    # What a block keeps for the backward pass, in bfloat16 numbers a token: the inputs of the two norms and their
    # outputs; q, k and v, q and k rotated, the pooled values; gate and up, the gate's SiLU, and its product with up.
    kept = 2 * D + 2 * D + 3 * D + 2 * D + D + 4 * config.hidden
    if on_cpu:  # there the norms keep two float32 copies each, and the pooled values are copied into another order
        kept += 6 * D + D
        if n_ids > 256:  # toto.attend keeps the probabilities, in blocks that leave out most of the future, and no qkv
            kept += H * n_ids * (1 + 1 / math.ceil(n_ids / 256)) / 2 - 3 * D
    tokens = micro_batch * n_ids
    chunk = min(toto.CHUNK["cpu" if on_cpu else "cuda"], tokens * embedding // D)  # logits at a time
    return {
        "weights, float32": 4 * n // n_shards,
        "gradients, float32": 4 * n // n_shards,
        "AdamW's averages, float32": 8 * n // n_shards,
        # All of them, from the forward to the backward pass; sharded or recomputed, the embedding and two blocks.
        "weights, bfloat16": 2 * (n if n_shards == 1 and not recompute else embedding + 2 * block),
        "activations, bfloat16": round(2 * tokens * L * (D if recompute else kept)),
        "the block in work": round(2 * tokens * kept),  # its gradients, or what is recomputed
        "loss": 2 * tokens * D + 6 * embedding + 12 * chunk,
    }


def print_plan(args, device):
    """What a run on args.dry_run processes would need: parameters, memory, operations, days."""
    n, tokens_per_frame = args.dry_run, (args.resolution // dvae.PIXELS_PER_CODE) ** 2
    tokens_per_sequence = args.frames * tokens_per_frame
    n_sequences = max(round(args.batch_tokens / tokens_per_sequence), 1)
    if n_sequences % n:
        raise ValueError(f"--batch-tokens makes {n_sequences} sequences, which {n} processes cannot share evenly")
    config = model_config(args, toto.FIRST_CODE + usual_codes(args.size))
    with torch.device("meta"):
        model = toto.Toto(config)
    micro_batch = min(args.micro_batch, math.ceil(n_sequences / n))
    n_shards = n if args.shard else 1
    parts = memory_plan(config, tokens_per_sequence + 1, micro_batch, args.device == "cpu", n_shards, args.recompute)
    tokens = args.steps * n_sequences * tokens_per_sequence
    flops = model.flops_per_token(tokens_per_sequence) * tokens
    if device.type == "cuda" or args.device:
        what, peak = device.type, peak_flops_per_second(device, data.fast_dtype(device))
    else:
        what, peak = "H200", PEAK_TFLOPS["H200"] * 1e12
    print(
        f"{args.size}: {model.count_parameters() / 1e6:,.2f} M parameters, with {config.vocab_size:,} ids\n"
        f"{args.steps:,} steps of {n_sequences} sequences of {args.frames} x {tokens_per_frame} tokens: "
        f"{tokens:.3g} tokens, {flops:.3g} FLOPs\n"
        f"in each of {n} processes, {n_sequences / n:g} sequences a step in micro-batches of {micro_batch}:"
    )
    for part, size in parts.items():
        print(f"  {part:<28}{size / 2**30:>8.2f} GiB")
    print(f"  {'together, before compiling':<28}{sum(parts.values()) / 2**30:>8.2f} GiB")
    for mfu in (0.3, 0.4, 0.5):
        hours = flops / (mfu * n * peak) / 3600
        time_ = f"{hours / 24:,.2f} days" if hours >= 24 else f"{hours:,.2f} hours"
        print(f"at {mfu:.0%} of {n} x {peak / 1e12:.4g} TFLOP/s ({what}): {time_}")


def keep_tokenizer(tokenizer, path):
    """Copy the given tokenizer into --out, which then holds all that probe.py and sample.py need."""
    if not path.exists():
        dvae.save(tokenizer, path)
    elif dvae.load(path).fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"{path}: is another tokenizer than --tokenizer; give another --out, or remove it")


def parse_spec(spec):
    """PATH or PATH=WEIGHT -> [path, weight]. Not in the paper: sources without a weight get 1."""
    path, _, weight = spec.rpartition("=")
    if spec in (data.WORLD, data.WORLD_MASKS) or Path(spec).exists():
        return [spec, 1.0]  # no weight, or a path with "=" in it
    if not path or not Path(path).exists() and path not in (data.WORLD, data.WORLD_MASKS):
        raise ValueError(f"{path or spec}: no such file or folder")
    try:
        weight = float(weight)
    except ValueError:
        raise ValueError(f"--data {spec}: {weight!r} is not a number to weigh {path} by") from None
    if not 1e-4 <= weight <= 1e4:
        raise ValueError(f"--data {spec}: a weight must lie between 0.0001 and 10,000")
    return [path, weight]


def prepare_tokenizer(args, specs, device, compute_dtype, is_main):
    """The tokenizer, trained first on the same data where there is none; None where token folders need no encoding."""
    path = args.tokenizer or args.out / "dvae.pt"
    if not path.exists() and args.tokenizer is None:
        media = [source for source, _ in specs if not data.is_token_folder(source)]
        if not media:
            return None
        if is_main:
            goes_on = Path(f"{path}.training").exists()
            print(f"no tokenizer at {path}: {'going on with training' if goes_on else 'training'} one on the same data")
            dvae.train_on(media, path, args.resolution, args.stride, args.seed, device, compute_dtype)
    if dist.is_initialized():
        dist.barrier()
    return dvae.load(path, device, compute_dtype)


def prepare_sources(args, specs, tokenizer, rank, world_size):
    """{name: Tokens} for all --data; media is tokenized first, all processes sharing the work."""
    sources = {}
    for path, _ in specs:
        folder = Path(path)
        if not data.is_token_folder(path):
            shards = data.shards_of(path, args.resolution, args.stride, args.frames)
            folder = data.tokenize_cached(
                path, shards, args.out / "tokens", tokenizer, args.resolution, args.stride, rank, world_size
            )
            if world_size > 1:
                dist.barrier()
        tokens = data.Tokens(folder)
        for key, asked in args.asked.items():
            if asked not in (None, tokens.meta[key]):
                raise ValueError(f"{path}: was made with --{key} {tokens.meta[key]}, not {asked}")
        first = next(iter(sources.values()), tokens)
        for key in ("tokenizer", "grid"):
            if tokens.meta[key] != first.meta[key]:
                raise ValueError(
                    f"{path}: its {key} is {tokens.meta[key]}, but that of {first.folder} is {first.meta[key]}"
                )
        if tokenizer is not None and tokens.meta["tokenizer"] != tokenizer.fingerprint():
            raise ValueError(f"{path}: was made by another tokenizer; give the right one with --tokenizer")
        sources[path if path not in sources else f"{path} ({len(sources)})"] = tokens
    return sources


def make_optimizer(model, lr):
    """§3.2: AdamW with β = (0.9, 0.95). Not in the paper, from LLaMA: weight decay 0.1, on matrices only.

    `lr_scale` is what µP multiplies the learning rate of the blocks' matrices by (A.5, Fig. 11), 1 otherwise.
    """
    blocks = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": blocks, "weight_decay": 0.1, "lr_scale": model.config.mup_ratio},
        {"params": [model.embedding.weight], "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, args):
    """§3.2: linear warm-up, then a cosine. Not in the paper, from LLaMA: the cosine ends at a tenth of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * min(done, 1))) / 2)


def peak_flops_per_second(device, dtype):
    """The device's matrix rate, which MFU is a share of: from the table, else from a matrix product here and now."""
    if device.type == "cuda":
        for name, tflops in PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name(device) and dtype == torch.bfloat16:
                return tflops * 1e12
    n = 1024 if device.type == "cpu" else 4096
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def save(path, model, optimizer, step, plan, meta, args):
    """One file with everything that going on needs; the sampler has no state but the seed and the step.

    All processes call it, since a sharded state must be put together; the first one writes. The file is the same
    however many there are.
    """

    is_main = not dist.is_initialized() or dist.get_rank() == 0

    def whole(tensor):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.cpu() if is_main else None

    weights = {name: whole(p) for name, p in model.state_dict().items()}
    averages = {
        name: {key: whole(value) for key, value in optimizer.state[p].items()} for name, p in model.named_parameters()
    }
    if not is_main:
        return
    checkpoint = {
        "model": weights,
        "optimizer": averages,
        "step": step,
        "config": asdict(model.config),
        "plan": plan,
        "tokenizer": meta["tokenizer"],
        "resolution": meta["resolution"],
        "stride": meta["stride"],
        "frames": plan["frames"],
    }
    with dvae.atomic_open(path) as file:
        torch.save(checkpoint, file)
    if args.keep > 1:
        copy_file(path, path.with_name(f"toto-{step}.pt"))
        steps = sorted(
            int(found[1]) for p in path.parent.iterdir() if (found := re.fullmatch(r"toto-(\d+)\.pt", p.name))
        )
        for old in [s for s in steps if s > step] + [s for s in steps if s <= step][: -args.keep]:
            path.with_name(f"toto-{old}.pt").unlink()


def load_averages(model, optimizer, averages):
    """Give AdamW the averages and step numbers that `save` wrote, by the names of the weights, sharded like them."""
    for name, p in model.named_parameters():
        for key, value in averages[name].items():
            if hasattr(p, "device_mesh") and value.dim():
                value = dist.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            optimizer.state[p][key] = value.to(p.device, copy=True)


def copy_file(path, copy):
    with open(path, "rb") as source, dvae.atomic_open(copy) as file:
        shutil.copyfileobj(source, file, 2**24)


def append_log(path, entry):
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def trim_log(path, step):
    """Drop the lines of what came after the last checkpoint, and will come again; return the others."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # a line that was cut off
            continue
        if entry["step"] < step or entry["step"] == step and "validation" not in entry:
            kept.append(entry)
    with dvae.atomic_open(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return kept


@torch.no_grad()
def evaluate(model, held_out, micro_batch, device, rank=0, world_size=1, limit=64, by_position=False):
    """For each source, over up to `limit` held-out sequences:

    loss, in nats per visual token; loss_by_frame (A.1, Fig. 10), and loss_by_token if by_position; the accuracy of the
    most probable next token on all frames but the first, beside that of repeating the code at the same place of the
    frame before; and the entropy of the codes' unigram distribution, which is the loss of a model that knows nothing
    but how frequent each code is.
    """
    results = {}
    for name, source in held_out.items():
        h, w = source.tokens.meta["grid"]
        frames, n = source.n_frames, min(len(source), limit)
        if n == 0:
            continue
        sums = torch.zeros(frames * h * w, 3, device=device)  # of loss, correct and repeated, by position
        counts = torch.zeros(source.tokens.meta["vocab_size"] + toto.FIRST_CODE, dtype=torch.int64, device=device)
        order = np.linspace(0, len(source) - 1, n).round().astype(int)
        for start in range(0, n, micro_batch * world_size):
            # Every process runs the model as often as the others, which a sharded one needs: without work of its own,
            # on a sequence that does not count.
            mine = order[start + rank : start + micro_batch * world_size : world_size]
            ids = np.stack([source.sequence(k, source.images) for k in (mine if len(mine) else order[:1])])
            ids = torch.as_tensor(ids).to(device)
            logits, targets = model(ids[:, :-1])[:, :-1], ids[:, 1:-1]  # every code is a target; the end token is not
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            correct = logits.argmax(dim=-1) == targets
            repeated = torch.zeros_like(correct)
            repeated[:, h * w :] = targets[:, h * w :] == targets[:, : -h * w]
            if not len(mine):
                continue
            sums += torch.stack((loss, correct.float(), repeated.float()), dim=-1).sum(dim=0)  # (B, T, 3) -> (T, 3)
            counts += torch.bincount(targets.flatten(), minlength=len(counts))
        if world_size > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        by_token = sums / n
        mean = by_token.view(frames, h * w, 3).mean(dim=1)  # (F, 3)
        results[name] = {
            "loss": mean[:, 0].mean().item(),
            "loss_by_frame": [round(x, 4) for x in mean[:, 0].tolist()],
            "accuracy": mean[1:, 1].mean().item(),
            "repeat_accuracy": mean[1:, 2].mean().item(),
            "unigram_entropy": torch.special.entr(counts / counts.sum()).sum().item(),
        } | ({"loss_by_token": by_token[:, 0].tolist()} if by_position else {})
    return results


def print_results(results):
    for name, r in results.items():
        first, *later = r["loss_by_frame"]
        print(
            f"validation on {name}: loss {r['loss']:.3f} nats per token; the codes' unigram entropy is "
            f"{r['unigram_entropy']:.3f}\n"
            f"  first frame {first:.3f}, later frames {np.mean(later):.3f} (A.1)\n"
            f"  next-token accuracy after the first frame {r['accuracy']:.3f}; repeating the previous frame gives "
            f"{r['repeat_accuracy']:.3f}"
        )
        if "loss_by_token" in r:
            print("  by frame " + " ".join(f"{loss:.3f}" for loss in r["loss_by_frame"]))
            tokens = np.reshape(r["loss_by_token"], (len(r["loss_by_frame"]), -1)).mean(axis=0)
            print("  by place in a frame, raster order " + " ".join(f"{loss:.2f}" for loss in tokens))


def write_samples(model, tokenizer, held_out, args, n_samples=4):
    """A GIF of held-out videos (as the tokenizer keeps them) beside what the model makes of their first quarter."""
    source = max(held_out.values(), key=lambda source: source.n_videos)
    if not len(source):
        return
    h, w = source.tokens.meta["grid"]
    n_prompt = max(args.frames // 4, 1)
    device = model.embedding.weight.device
    order = range(min(n_samples, len(source)))
    ids = torch.as_tensor(np.stack([source.sequence(k, source.images) for k in order])).to(device)
    n_new = (args.frames - n_prompt) * h * w
    with tqdm(total=n_new, desc="sampling", unit="token", dynamic_ncols=True) as bar:
        generator = torch.Generator(device).manual_seed(args.seed)
        made = model.generate(
            ids[:, : 1 + n_prompt * h * w], n_new, top_p=0.95, generator=generator, progress=bar.update
        )
    rows = []
    for truth, sample in zip(ids[:, 1:-1], made[:, 1:]):
        codes = torch.stack((truth, sample)).view(2 * args.frames, h, w) - toto.FIRST_CODE
        frames = tokenizer.decode(codes).cpu().numpy()
        rows.append([("truth", frames[: args.frames]), ("model", frames[args.frames :])])
    data.write_gif(args.out / "samples.gif", rows, n_prompt)
    print(f"wrote {args.out / 'samples.gif'}: {n_prompt} given frames, then the truth beside the model's continuation")


if __name__ == "__main__":
    data.run(main)
