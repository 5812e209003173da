"""Figures 11 and 9 and Table 15 (§4.9, A.5): one learning rate for all widths by µP, and loss against compute.

    python paper/figure9_scaling.py                             on the built-in world: 26 minutes of two cores
    torchrun --nproc_per_node=8 paper/figure9_scaling.py --sizes a1 a2 a3 a4 a5 a6 --data PATH[=WEIGHT] ... --steps N
    python paper/figure9_scaling.py --rate 0.03                 Figure 9 alone, at a rate that is known

Figure 11: models of four widths at learning rates a factor of two apart, in the standard parametrisation and with µP.
Figure 9: the rate that is best for the narrowest then trains the ladder of Table 15, and a power law is fitted to the
lower envelope of all validation losses. Each process trains a model by itself, and takes the next that nobody has; on a
CPU the program starts one for each core, 8 at most: unlike threads they need not wait for one another.
Not in the paper: the dVAE's codes, where §4.9 has a VQGAN's, as everywhere else here; and a rate found in short runs of
two layers, which µP as here does not carry to longer and deeper ones.

Prints the paper's numbers beside ours, and writes figure9.json and figure9.png to --out, with one line a trained model
in runs.jsonl. Run again, it trains what is not in there yet, from where that stopped.

From top to bottom: sizes, jobs, one job, Figure 11, Figure 9, tables and pictures, the program.
"""

import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import probe
import toto
import train

# Table 15: its own parameter counts, in millions. toto.SIZES has the rest, and what A.5's text says otherwise.
TABLE_15 = {"a1": 14.8, "a2": 77.2, "a3": 215, "a4": 458, "a5": 1200, "a6": 1900}
# Not in the paper: Table 15 for a laptop. An eighth of its widths, a quarter of its heads, about a fifth of its layers;
# the MLP is 4 D wide as there, and RoPE's base that of `tiny`.
SMALL = {
    f"s{i + 1}": toto.Config(dim, 4, 2 + i, 4 * dim, rope_base=toto.SIZES["tiny"].rope_base)
    for i, dim in enumerate((32, 64, 96, 128, 192, 224))
}
SIZES = SMALL | {name: toto.SIZES[name] for name in TABLE_15}
# Figure 11's narrowest model; others are 2, 4 and 8 times as wide, with as many heads and layers. Not in the paper: how
# wide and deep they are.
NARROWEST = {"laptop": replace(SMALL["s1"], dim=16, hidden=64), "paper": SIZES["a1"]}
RATES = [2.0**-k for k in range(3, 11)]  # Not in the paper, which names 2^-7 alone as the best
# §4.9: L(C) = a · C^b of the paper, which gives no unit for C; it is drawn in MACs, as Fig. 9 has. And of GPT-3 (Brown
# et al., 2020, Fig. 3.1), with C in PetaFLOP/s-days; a MAC is two FLOPs.
PAPER_LAW, GPT3_LAW, MACS_PER_PETAFLOPS_DAY = (7.32, -0.0378), (2.57, -0.048), 1e15 * 86400 / 2
N_POINTS = 16  # validation losses along a run of Figure 9
N_VALIDATION = 64  # clips
FIRST_VALIDATION = 10**7  # the world's number of the first of them; training counts from 0


# Jobs: models to train, shared among processes
@dataclass(frozen=True)
class Job:
    name: str  # of its state's file too
    config: toto.Config
    rate: float  # the peak, of what µP does not scale
    steps: int
    seed: int
    n_points: int = 1  # how many validation losses, the last one at the end

    def points(self, warmup):
        """After which steps there is a validation loss: log-spaced, from the end of the warm-up on."""
        first = max(min(warmup, self.steps // 4), 1) if self.n_points > 1 else self.steps
        return sorted({round(step) for step in np.geomspace(first, self.steps, self.n_points)})

    def macs(self, task, steps):
        """Multiply-accumulates of so many steps of training: half of the FLOPs, 6 N + 12 L D T a token."""
        n_tokens = task.frames * math.prod(task.grid)
        return build_without_memory(self.config).flops_per_token(n_tokens) / 2 * n_tokens * task.n_sequences * steps


@lru_cache
def build_without_memory(config):
    with torch.device("meta"):
        return toto.Toto(config)


def finished(path):
    """{settings as JSON: result} of the lines of runs.jsonl; one that was cut off is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            found[json.dumps(entry["settings"], sort_keys=True)] = entry["result"]
        except (ValueError, KeyError):
            continue
    return found


def results_of(jobs, task, args, device):
    """The results of all jobs, in their order; a process trains those that no other has trained or is training.

    Longest first, so that at the end nobody waits long.
    """
    path = args.out / "runs.jsonl"

    def work(i, job):
        settings = task.settings | asdict(job)
        key = json.dumps(settings, sort_keys=True)
        if key not in (done := finished(path)):
            title = f"{job.name}, {i} of {len(jobs)}"
            result = train_alone(job, task, args.out / f"{job.name}.pt", settings, title, args, device)
            with open(path, "a") as file:  # the line's end comes first: it ends a line that was cut off, too
                file.write("\n" + json.dumps({"settings": settings, "result": result}))
            (args.out / f"{job.name}.pt").unlink(missing_ok=True)
            return result
        return done[key]

    longest_first = sorted(enumerate(jobs, start=1), key=lambda pair: -pair[1].macs(task, pair[1].steps))
    results = data.share_jobs(args.out, {job.name: partial(work, i, job) for i, job in longest_first}, device)
    return [results[job.name] for job in jobs]


# One job
def train_alone(job, task, state, settings, title, args, device):
    """Train a model (§3.2) and measure its loss on the way -> {"steps": [...], "losses": [...]}, nats a token.

    The last loss is None where training diverges, which large rates may. Not in the paper: warm-up and a cosine to a
    tenth, as train.py has. On the way the rate is higher than at the end of a run that was planned to be so short, so
    all points but a run's last are somewhat too high (Hoffmann et al., 2022, appendix B).
    """
    if args.compile:
        torch.compiler.reset()  # it keeps but a few versions of a block, and this model's are new
    torch.manual_seed(job.seed)
    model = toto.Toto(job.config, data.fast_dtype(device)).to(device)
    trained, optimizer = train.distribute(model, args, device), train.make_optimizer(model, job.rate)
    points, schedule = job.points(args.warmup), SimpleNamespace(lr=job.rate, steps=job.steps, warmup=args.warmup)
    curve = torch.nn.Module()  # the losses so far, as a part of the state that is saved
    curve.register_buffer("losses", torch.full((len(points),), math.nan, dtype=torch.float64))
    of_run = SimpleNamespace(n_sequences=task.n_sequences, mixture=data.Mixture(task.sources, task.weights, job.seed))
    file = data.state_file(state, {"model": model, "optimizer": optimizer, "curve": curve}, settings, refuse=False)
    for step, bar in data.resumable_steps(title, job.steps, **file):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, schedule) * group["lr_scale"]
        batch = train.read_batch(of_run, step, device)
        loss, grad_norm = train.take_step(trained, optimizer, batch, args.micro_batch, device).tolist()
        if not math.isfinite(loss + grad_norm):
            break
        if step + 1 in points:
            curve.losses[points.index(step + 1)] = validation_loss(trained, task, args, device)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    return {"steps": points, "losses": [loss if math.isfinite(loss) else None for loss in curve.losses.tolist()]}


def validation_loss(model, task, args, device):
    """Nats a token on the held-out clips, the mean over sources by their weights."""
    with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
        results = train.evaluate(model, task.held_out, args.micro_batch, device, limit=N_VALIDATION)
    weights = [weight for weight, name in zip(task.weights, task.held_out) if name in results]
    return float(np.average([result["loss"] for result in results.values()], weights=weights))


def prepare(steps, args, device):
    """What jobs of so many steps train on and are measured on. Processes come in one by one; the first does it all."""
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "lock", "w") as lock, data.claimed(lock, "tokens", waits=True):
        specs, weights, sources, held_out = (mixed_sources if args.data else world_sources)(steps, args, device)
    if not any(len(source) for source in held_out.values()):
        raise ValueError("--data: no clip was held out of so few, so that there is no validation loss; give more")
    meta = sources[0].tokens.meta
    n_sequences = train.sequences_in_a_step(args, math.prod(meta["grid"]), 1)
    settings = {"data": specs, "clips": [len(source) for source in sources], "tokenizer": meta["tokenizer"]}
    settings |= {"grid": meta["grid"], "frames": args.frames, "stride": args.stride, "warmup": args.warmup}
    settings |= {"sequences in a step": n_sequences}
    return SimpleNamespace(sources=sources, weights=weights, held_out=held_out, grid=meta["grid"], frames=args.frames,
                           vocab_size=toto.FIRST_CODE + meta["vocab_size"], n_sequences=n_sequences,
                           settings=settings)  # fmt: skip


def mixed_sources(steps, args, device):
    """§4.9: the mixture of --data, weighed and held out as in train.py, and passed over as often as it takes."""
    specs = [train.parse_spec(spec) for spec in args.data]
    tokens = train.prepare_sources(args, specs, train.prepare_tokenizer(args, specs, device))
    read = lambda t, held_out: data.Source(t, args.frames, held_out, step=t.step(args.stride))
    held_out = {name: read(t, True) for name, t in tokens.items()}
    return specs, [weight for _, weight in specs], [read(t, False) for t in tokens.values()], held_out


def world_sources(steps, args, device):
    """The built-in world. A run sees each clip once, so that nothing can be learned by heart: as many are tokenized as
    there are sequences in it. The world has some two million different clips; a few will be alike by chance.
    """
    tokenizer = train.study_tokenizer(SimpleNamespace(**vars(args) | {"data": data.WORLD}), device)
    n = steps * train.sequences_in_a_step(args, math.prod(tokenizer.grid(args.resolution)), 1)

    def tokenized(name, first, n):
        shards = data.world_shards(range(first, first + n), args.resolution, args.frames)
        how = tokenizer, args.resolution, args.stride
        return data.Source(data.tokenize_cached(name, shards, args.out / "tokens", *how), args.frames, share=0.0)

    source = tokenized(f"{data.WORLD}-{n}", 0, n)
    check_no_repeats(n, source)
    return data.WORLD, [1.0], [source], {data.WORLD: tokenized("world-validation", FIRST_VALIDATION, N_VALIDATION)}


def check_no_repeats(n, source):
    if n > len(source):
        raise ValueError(f"{source.tokens.folder}: {n:,} sequences are asked for, and it has {len(source):,} clips; "
                         "remove it to tokenize again")  # fmt: skip


# Figure 11: the best rate by width
def sweep_jobs(narrowest, seeds, steps):
    """{(has µP, width, rate, seed): Job}. At the narrowest width, µP's base, both are the same and trained once."""
    jobs = {}
    for has_mup in (False, True):
        for width in [narrowest.dim * factor for factor in (1, 2, 4, 8)]:
            mup_width = narrowest.dim if has_mup and width > narrowest.dim else 0
            config = replace(narrowest, dim=width, hidden=4 * width, mup_width=mup_width)
            for rate in RATES:
                for seed in seeds:
                    name = f"{'mup' if mup_width else 'standard'}-{width}-rate-{rate:g}-seed-{seed}"
                    jobs[has_mup, width, rate, seed] = Job(name, config, rate, steps, seed)
    return jobs


def best_rate(rates, losses):
    """The rate of least loss and whether it lies inside: the lowest point of the parabola through the least of the
    losses and its two neighbours, over the logarithm of equally spaced rates. At an end, or beside a run that diverged
    (None), that of the least loss itself.
    """
    losses = [math.inf if loss is None else loss for loss in losses]
    i = int(np.argmin(losses))
    if not 0 < i < len(losses) - 1:
        return rates[i], False
    before, least, after = losses[i - 1 : i + 2]
    bend = before - 2 * least + after
    if not math.isfinite(bend) or bend == 0:
        return rates[i], True
    return rates[i] * (rates[i + 1] / rates[i]) ** ((before - after) / (2 * bend)), True


def read_sweep(losses, seeds):
    """{has µP, width, rate, seed: loss} -> a row for each parametrisation and width: losses and best rates.

    A row's "best" holds that of the mean over seeds and then that of each seed, each with whether it lies inside.
    """
    rows = []
    for has_mup, width in sorted({key[:2] for key in losses}):
        of_seeds = [[losses[has_mup, width, rate, seed] for rate in RATES] for seed in seeds]
        mean = [None if None in column else float(np.mean(column)) for column in zip(*of_seeds)]
        best = [best_rate(RATES, values) for values in (mean, *of_seeds)]
        rows.append({"mup": has_mup, "width": width, "mean": mean, "seeds": of_seeds, "best": best})
    return rows


def judge_sweep(rows):
    """Fig. 11's claim, and its reverse without µP -> [(claim, verdict, shift of each seed in factors of two)].

    With µP, a shift is how far apart the best rates of all widths lie; without, how far they fall from the narrowest to
    the widest. The verdict follows from Student's 95 % interval over seeds.
    """
    verdicts = []
    for has_mup, claim in ((False, "standard: the best rate falls by more than a factor of two, narrowest to widest"),
                           (True, "µP: the best rates of all widths lie within a factor of two")):  # fmt: skip
        of_widths = [row["best"][1:] for row in rows if row["mup"] == has_mup]
        is_inside = all(inside for best in of_widths for _, inside in best)
        rates = np.log2([[rate for rate, _ in best] for best in of_widths])  # (widths, seeds)
        shifts = np.ptp(rates, axis=0) if has_mup else rates[0] - rates[-1]
        _, low, high = probe.over_seeds(shifts)
        words = probe.verdict(1 - high, 1 - low) if has_mup else probe.verdict(low - 1, high - 1)
        verdicts.append((claim, words if is_inside else "cannot tell (a best rate at an end)", shifts.tolist()))
    return verdicts


# Figure 9: loss against compute
def envelope(macs, losses):
    """Indices of the points that no other undercuts at as few MACs or fewer, in the order of their MACs."""
    kept, least = [], math.inf
    for i in np.lexsort((losses, macs)):  # by MACs, then by loss
        if losses[i] < least:
            kept.append(int(i))
            least = losses[i]
    return kept


def fit_power_law(macs, losses):
    """§4.9, Fig. 9: L = a · C^b, by least squares of log L over log C -> (a, b, 0)."""
    b, log_a = np.polyfit(np.log(macs), np.log(losses), 1)
    return math.exp(log_a), float(b), 0.0


def fit_with_floor(macs, losses):
    """L = c + a · C^b, c >= 0 -> (a, b, c). Not in the paper: c is what no compute takes away (Henighan et al., 2020).

    Least squares of relative errors, Σ ((c + a C^b) / L - 1)². For a given b that is linear in a and c, so that only b
    is searched for: on a grid, then by golden section between the neighbours of the best.
    """
    centre = math.exp(np.log(macs).mean())  # C^b for numbers near 1

    def solve(b):
        columns = np.stack(((macs / centre) ** b, np.ones(len(macs))), axis=1) / losses[:, None]
        (a, c), *_ = np.linalg.lstsq(columns, np.ones(len(macs)), rcond=None)
        if c < 0:
            a, c = columns[:, 0].sum() / (columns[:, 0] ** 2).sum(), 0.0
        return float(((columns @ (a, c) - 1) ** 2).sum()), float(a), float(c)

    grid = -np.geomspace(1e-3, 4, 60)
    i = int(np.argmin([solve(b)[0] for b in grid]))
    low, high = grid[min(i + 1, len(grid) - 1)], grid[max(i - 1, 0)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if solve(left)[0] < solve(right)[0] else (left, high)
    b = (low + high) / 2
    _, a, c = solve(b)
    return a * centre**-b, float(b), c


def fit_envelope(curves, fit):
    """`fit` on the lower envelope of several models' curves, each (MACs, losses) -> (a, b, c), or None of too few."""
    macs, losses = (np.concatenate(parts) for parts in zip(*curves))
    kept = envelope(macs, losses)
    return fit(macs[kept], losses[kept]) if len(kept) > 3 else None


def bootstrap(curves, fit, n=1000):
    """The 95 % interval of the exponent b, over which models there happened to be: they are drawn again, as many as
    there are, each with its whole curve. Points of one curve go together and would make it much too narrow by
    themselves. A model that is drawn twice changes no envelope. With so few models such an interval has the truth in it
    in about 90 of 100 simulated ladders, not 95. None of fewer than four, or where hardly any draw can be fitted.
    """
    if len(curves) < 4:
        return None
    rng = np.random.default_rng(0)
    fit_of = lru_cache(maxsize=None)(lambda drawn: fit_envelope([curves[i] for i in drawn], fit))
    fits = [fit_of(tuple(sorted(set(rng.integers(len(curves), size=len(curves)).tolist())))) for _ in range(n)]
    slopes = [found[1] for found in fits if found]
    return np.percentile(slopes, [2.5, 97.5]).tolist() if len(slopes) > n / 2 else None


def fit_all(curves):
    """{models: {form: (fit, interval of b)}}: of all models, and of fewer, which shows how much the ends decide."""
    names = list(curves)
    subsets = {"all": names, "without the smallest": names[1:], "without the largest": names[:-1]}
    subsets |= {"middle four": names[1:-1]} if len(names) == 6 else {}
    forms = {"a·C^b": fit_power_law, "c + a·C^b": fit_with_floor}
    large = {words: subset for words, subset in subsets.items() if len(subset) > 1 or words == "all"}
    chosen = {words: [curves[name] for name in subset] for words, subset in large.items()}
    return {words: {form: (fit_envelope(some, fit), bootstrap(some, fit)) for form, fit in forms.items()}
            for words, some in chosen.items()}  # fmt: skip


# Tables and pictures
def print_sweep(rows, verdicts, args):
    print(f"\nFigure 11 (A.5): loss after {args.sweep_steps:,} steps by learning rate, mean of {args.seeds} seed(s)")
    print(f"{'':<16}" + "".join(f"{f'2^{math.log2(rate):.0f}':>8}" for rate in RATES) + "   best rate, each seed's")
    for row in rows:
        losses = "".join(f"{'-' if loss is None else f'{loss:.3f}':>8}" for loss in row["mean"])
        best = [f"2^{math.log2(rate):.2f}" + ("" if inside else " (at an end)") for rate, inside in row["best"]]
        print(f"{'µP' if row['mup'] else 'standard':<10}{row['width']:<6}{losses}   {best[0]}, {' '.join(best[1:])}")
    for claim, verdict, shifts in verdicts:
        print(f"{claim}: {verdict}; by 2^" + ", 2^".join(f"{shift:.2f}" for shift in shifts) + ", seed by seed")
    print("The paper's best rate, 2^-7 for all widths, is in units of its own base width, which it does not name.")


def print_table_15(rows):
    print("\nTable 15: the paper's models (here: as toto.py has them), then those of this run.")
    print("A.5's text contradicts the table: widths of 64 to 1,536, and 12 to 48 layers.")
    line = "{:<6}{:>14}{:>8}{:>7}{:>8}{:>16}{:>12}{:>12}"
    print(line.format("", "parameters", "width", "heads", "layers", "training MACs", "loss", "best loss"))
    for name, millions in TABLE_15.items():
        c, ours = toto.SIZES[name], build_without_memory(toto.SIZES[name]).count_parameters() / 1e6
        print(line.format(name, f"{millions:g} M", c.dim, c.n_heads, c.n_layers, "", "", "") + f"  here {ours:,.1f} M")
    for row in rows:
        c, losses = row["config"], [loss for loss in row["losses"] if loss is not None]
        last, least = row["losses"][-1], f"{min(losses):.4f}" if losses else "-"
        loss = "diverged" if last is None else f"{last:.4f}"
        count = f"{row['parameters'] / 1e6:.3f} M"
        cells = count, c["dim"], c["n_heads"], c["n_layers"], f"{row['macs'][-1]:.2e}", loss, least
        print(line.format(row["name"], *cells))


def print_fits(fits, verdicts):
    print("\nFigure 9 (§4.9): validation loss L in nats a token, C in MACs; fits of the lower envelope, 95 % of b")
    print(f"{'paper':<22}L = 7.32 · C^-0.0378, the unit of C not said")
    print(f"{'GPT-3':<22}L = 2.57 · C^-0.048, C in PetaFLOP/s-days (Brown et al., 2020)")
    for words, of_form in fits.items():
        for form, (found, interval) in of_form.items():
            if found is None or interval is None:
                print(f"{words:<22}{form:<12}too few points for a fit")
                continue
            (a, b, c), (low, high) = found, interval
            law = f"{a:.4g} · C^{b:.4f} ({low:.4f} to {high:.4f})"
            print(f"{words:<22}L = " + (f"{c:.4f} + {law}" if form.startswith("c") else law))
    for claim, verdict in verdicts:
        print(f"{claim}: {verdict}")


def judge_fits(fits, curves):
    """[(claim, verdict)]. Whether more compute helps is judged by the ends of runs: an envelope falls by its making.

    That the paper's exponent lies in the interval says something only if that is narrow: if it has neither 0 nor the
    exponent of language (GPT-3's) in it.
    """
    ends = [(macs[-1:], losses[-1:]) for macs, losses in curves.values() if len(macs)]
    line = lambda ends: np.polyfit(*np.log(np.concatenate([np.stack(end) for end in ends], axis=1)), 1)[0]
    rng, slopes = np.random.default_rng(0), []
    for _ in range(1000):
        drawn = rng.integers(len(ends), size=len(ends))
        if len(set(drawn.tolist())) > 2:
            slopes.append(line([ends[i] for i in drawn]))
    low, high = np.percentile(slopes, [2.5, 97.5]) if slopes else (-math.inf, math.inf)
    judged = [("more compute gives a lower loss at the end", probe.verdict(-high, -low))]
    b, claim = PAPER_LAW[1], f"the paper's exponent {PAPER_LAW[1]} lies in the interval"
    found, interval = fits["all"]["a·C^b"]
    if found is None or interval is None:
        return [*judged, (claim, "cannot tell")]
    low, high = interval
    if not low <= b <= high:
        return [*judged, (claim, f"does not hold: {'steeper' if high < b else 'flatter'} here")]
    return [*judged, (claim, "holds" if GPT3_LAW[1] < low and high < 0 else "cannot tell, so wide is it")]


def draw(plt, sweep, rows, fits, path):
    """Figure 11 without and with µP, a curve a width through the means, a dot a seed; Figure 9 with its fits."""
    n_panels = 3 if sweep else 1
    figure, axes = plt.subplots(1, n_panels, figsize=(5 * n_panels + 2, 4), squeeze=False)
    for has_mup, panel in zip((False, True), axes[0, :-1]):
        for i, row in enumerate(row for row in sweep if row["mup"] == has_mup):
            mean = [math.nan if loss is None else loss for loss in row["mean"]]
            panel.plot(RATES, mean, color=f"C{i}", label=f"width {row['width']}")
            for losses in row["seeds"]:
                points = [(rate, loss) for rate, loss in zip(RATES, losses) if loss is not None]
                panel.plot(*zip(*points), ".", color=f"C{i}")
            if row["best"][0][1]:
                panel.axvline(row["best"][0][0], color=f"C{i}", linestyle=":", linewidth=0.8)
        title = f"Figure 11, {'µP' if has_mup else 'standard parametrisation'}"
        panel.set(xlabel="peak learning rate", ylabel="loss, nats a token", title=title, yscale="log")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize="small", frameon=False)
    panel = axes[0, -1]
    for row in rows:
        macs, losses = curve_of(row)
        panel.plot(macs, losses, marker=".", label=f"{row['name']}, {row['parameters'] / 1e6:.2g} M")
    macs = np.geomspace(min(row["macs"][0] for row in rows), max(row["macs"][-1] for row in rows), 100)
    for form, (found, _) in fits["all"].items():
        if found:
            a, b, c = found
            words = f"{a:.3g} · C^{b:.3f}" if form == "a·C^b" else f"{c:.3f} + {a:.3g} · C^{b:.3f}"
            panel.plot(macs, c + a * macs**b, "k-" if form == "a·C^b" else "k--", linewidth=0.8, label=words)
    panel.plot(macs, PAPER_LAW[0] * macs ** PAPER_LAW[1], "-", color="grey", label="paper: 7.32 · C^-0.0378")
    gpt3 = GPT3_LAW[0] * (macs / MACS_PER_PETAFLOPS_DAY) ** GPT3_LAW[1]
    panel.plot(macs, gpt3, ":", color="grey", label="GPT-3: 2.57 · C^-0.048, C in PF-days")
    panel.set(xscale="log", yscale="log", xlabel="training MACs", ylabel="loss, nats a token", title="Figure 9")
    panel.legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def curve_of(row):
    """(MACs, losses) of a row of Figure 9, without what comes after it diverged."""
    pairs = [(macs, loss) for macs, loss in zip(row["macs"], row["losses"]) if loss is not None]
    return np.array(pairs).reshape(-1, 2).T


# The program
def parse_arguments():
    parser = data.make_parser(__doc__)
    add, count, positive = parser.add_argument, data.number(int, at_least=1), data.number(float, above=0)
    about = lambda name, small: f"(default: {small:,}, or {train.PAPER[name]:,} for a1 to a6)"
    words = "s1 to s6, or Table 15's a1 to a6"
    add("--sizes", nargs="+", default=list(SMALL), choices=SIZES, metavar="SIZE", help=words)
    add("--data", nargs="+", metavar="PATH[=WEIGHT]", help="token or media folders (default: the built-in world)")
    add("--tokenizer", type=Path, help="dvae.pt, or OpenAI's folder (default: out/dvae.pt, or of --data that in --out)")
    add("--rate", type=positive, help="peak learning rate of Figure 9 (default: what Figure 11 finds, trained first)")
    add("--steps", type=data.number(int, at_least=4), help=f"of each run of Figure 9 {about('steps', 1500)}")
    add("--sweep-steps", type=count, help="of each run of Figure 11 (default: 250, or a tenth of --steps for a1 to a6)")
    add("--seeds", type=count, default=3, help="runs at each rate of Figure 11, from --seed on; Figure 9 has --seed's")
    about_batch = about("batch_tokens", train.LAPTOP["batch_tokens"])
    add("--batch-tokens", type=count, help=f"visual tokens in a step {about_batch}")
    add("--micro-batch", type=count, default=4, help="sequences in one forward pass")
    add("--out", default="out/figure9", type=data.output_folder, help="folder for results, runs, and cached tokens")
    args = parser.parse_args()
    args.is_small = args.sizes[0] in SMALL
    if any((name in SMALL) != args.is_small for name in args.sizes):
        raise ValueError("--sizes: s1 to s6 and a1 to a6 are two ladders; give sizes of one")
    if not args.is_small and not args.data:
        raise ValueError("--sizes: a1 to a6 need --data; the built-in world has too few different clips for them")
    args.sizes = sorted(set(args.sizes), key=list(SIZES).index)
    for name, value in (train.LAPTOP | {"steps": 1500} if args.is_small else train.PAPER).items():
        setattr(args, name, getattr(args, name, None) or value)
    args.sweep_steps = args.sweep_steps or (250 if args.is_small else max(args.steps // 10, 1))
    args.asked, args.stride = {"resolution": None}, 4
    args.shard, args.recompute = False, False
    return args


def sweep(narrowest, args, device):
    """Figure 11 -> its rows, the verdicts, and the rate for Figure 9."""
    task, seeds = prepare(args.sweep_steps, args, device), range(args.seed, args.seed + args.seeds)
    jobs = sweep_jobs(replace(narrowest, vocab_size=task.vocab_size), seeds, args.sweep_steps)
    different = list(dict.fromkeys(jobs.values()))
    results = dict(zip(different, results_of(different, task, args, device)))
    rows = read_sweep({key: results[job]["losses"][-1] for key, job in jobs.items()}, seeds)
    narrow = next(row for row in rows if row["mup"])  # the narrowest
    if all(loss is None for loss in narrow["mean"]):
        raise ValueError("all rates of Figure 11 diverge; give a --rate")
    if not narrow["best"][0][1]:
        print("the narrowest model's best rate is at an end of those tried: Figure 9's may be too far", file=sys.stderr)
    return rows, judge_sweep(rows), narrow["best"][0][0]


def ladder(narrowest, rate, args, device):
    """Figure 9's runs -> a row for each size of Table 15: settings, MACs and loss along the run."""
    task = prepare(args.steps, args, device)
    config = lambda name: replace(SIZES[name], vocab_size=task.vocab_size, mup_width=narrowest.dim)
    jobs = [Job(name, config(name), rate, args.steps, args.seed, N_POINTS) for name in args.sizes]
    rows = []
    for job, result in zip(jobs, results_of(jobs, task, args, device)):
        macs = [job.macs(task, steps) for steps in result["steps"]]
        row = {"name": job.name, "parameters": build_without_memory(job.config).count_parameters(), "macs": macs}
        rows.append(row | {"config": asdict(job.config)} | result)
    return rows


def main():
    args, plt = parse_arguments(), data.pyplot()
    device = data.pick_device(args.device)
    args.compile = device.type == "cuda"
    narrowest = NARROWEST["laptop" if args.is_small else "paper"]
    rows, verdicts, rate = ([], [], args.rate) if args.rate else sweep(narrowest, args, device)
    models = ladder(narrowest, rate, args, device)
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's variables are all they need: they train apart
        return
    curves = {row["name"]: curve_of(row) for row in models}
    fits = fit_all(curves)
    fits_verdicts = judge_fits(fits, curves)
    if rows:
        print_sweep(rows, verdicts, args)
    print_table_15(models)
    print(f"all with µP of base width {narrowest.dim} and the peak rate {rate:.4g}, 2^{math.log2(rate):.2f}")
    print_fits(fits, fits_verdicts)
    result = {"figure 11": {"rates": RATES, "rows": rows, "verdicts": verdicts}, "rate": rate, "figure 9": models}
    result |= {"fits": fits, "verdicts": fits_verdicts, "paper": PAPER_LAW, "GPT-3": GPT3_LAW}
    result["shifts"] = {claim: probe.over_seeds(shifts) for claim, _, shifts in verdicts if len(shifts) > 1}
    pairs = [(f"{words}, {form}", *of) for words, of_form in fits.items() for form, of in of_form.items()]
    result["exponents"] = {name: {"b": [f[1], *interval], "c": f[2]} for name, f, interval in pairs if f and interval}
    data.write_json(result, args.out / "figure9.json")
    draw(plt, rows, models, fits, args.out / "figure9.png")
    print(f"wrote {args.out / 'figure9.json'} and {args.out / 'figure9.png'}")


if __name__ == "__main__":
    data.run(main)
