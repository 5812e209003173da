"""paper/figure9_scaling.py: its fits against curves that are known, its jobs against kills, and its claims."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dvae
import toto
import train
from conftest import PAIR, ROOT, run

sys.path.insert(0, str(ROOT / "paper"))  # its scripts are no package
import figure9_scaling as figure9

MACS = np.geomspace(1e9, 1e14, 40)
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="pip install -r paper/requirements.txt")


# Fits
@pytest.mark.parametrize("a, b", [(7.32, -0.0378), (200, -0.2)])
def test_power_law(a, b):
    assert figure9.fit_power_law(MACS, a * MACS**b) == pytest.approx((a, b, 0), rel=1e-9)


@pytest.mark.parametrize("a, b, c", [(7.32, -0.0378, 0.5), (200, -0.2, 0.08), (1e6, -0.6, 0.3), (200, -0.2, 0)])
def test_power_law_with_a_floor(a, b, c):
    found = figure9.fit_with_floor(MACS, c + a * MACS**b)
    assert found == pytest.approx((a, b, c), rel=1e-3, abs=1e-4)


def test_a_floor_is_never_negative():
    """A curve that bends downwards in log-log would ask for one; the best without is a plain power."""
    losses = 200 * MACS**-0.2 - 0.2
    a, b, c = figure9.fit_with_floor(MACS, losses)
    assert c == 0 and b < -0.2
    error = lambda a, b: (((a * MACS**b) / losses - 1) ** 2).sum()
    near = [error(a * x, b + y) for x in (0.99, 1, 1.01) for y in (-0.002, 0, 0.002)]
    assert min(near) == near[4]


def test_noise_leaves_the_fit_near():
    """The minimum of its own objective, against a search over all three on a fine grid."""
    rng = np.random.default_rng(0)
    losses = (0.1 + 200 * MACS**-0.2) * np.exp(0.03 * rng.standard_normal(len(MACS)))
    error = lambda a, b, c: (((c + a * MACS**b) / losses - 1) ** 2).sum()
    a, b, c = figure9.fit_with_floor(MACS, losses)
    assert abs(b + 0.2) < 0.02
    for _ in range(2000):  # nothing near is better
        other = a * np.exp(0.02 * rng.standard_normal()), b + 0.002 * rng.standard_normal(), c + 0.01 * rng.random()
        assert error(a, b, c) <= error(*other) + 1e-9


def test_envelope():
    """Against its definition, point by point, with ties."""
    rng = np.random.default_rng(1)
    macs, losses = rng.integers(1, 40, 200).astype(float), rng.integers(1, 40, 200).astype(float)
    kept = figure9.envelope(macs, losses)
    expected = {
        (c, l) for c, l in zip(macs, losses)
        if not any(c2 <= c and l2 <= l and (c2, l2) != (c, l) for c2, l2 in zip(macs, losses))
    }  # fmt: skip
    assert [(macs[i], losses[i]) for i in kept] == sorted(expected)


def synthetic_curves(seed, spread):
    """Runs of six models along 50 C^-0.1, each all off by a factor of its own."""
    rng, macs = np.random.default_rng(seed), 1e10 * np.geomspace(1, 4, 12)
    factors = np.exp(spread * rng.standard_normal(6))
    return [(macs * 4**i, 50 * (macs * 4**i) ** -0.1 * factor) for i, factor in enumerate(factors)]


def test_the_interval_covers_the_exponent():
    """Of 60 ladders with noise from model to model; resampled points of curves would cover less than half of them."""
    def covers(curves):
        low, high = figure9.bootstrap(curves, figure9.fit_power_law, n=200)
        return low <= -0.1 <= high

    by_model = [covers(synthetic_curves(seed, 0.02)) for seed in range(60)]
    assert np.mean(by_model) > 0.8
    low, high = figure9.bootstrap(synthetic_curves(0, 0), figure9.fit_power_law, n=200)
    assert (low, high) == pytest.approx((-0.1, -0.1))  # without noise there is nothing to doubt


def test_too_few_points_are_no_fit():
    curves = {"s1": (np.array([1.0, 2.0]), np.array([2.0, 3.0]))}
    fits = figure9.fit_all(curves)
    assert fits["all"]["a·C^b"] == (None, None)
    assert [verdict for _, verdict in figure9.judge_fits(fits, curves)] == ["cannot tell", "cannot tell"]
    three = {f"s{i}": curve for i, curve in enumerate(synthetic_curves(0, 0.03)[:3])}
    assert figure9.fit_all(three)["all"]["a·C^b"][1] is None  # three models draw hardly any other ladders
    assert set(figure9.fit_all({f"s{i}": curve for i, curve in enumerate(synthetic_curves(0, 0.03))})) == {
        "all", "without the smallest", "without the largest", "middle four"
    }  # fmt: skip


@pytest.mark.parametrize("b, spread, ends, exponent", [
    (-0.0378, 0.0005, "holds", "holds"), (-0.0378, 0.05, "holds", "cannot tell, so wide is it"),
    (-0.2, 0.01, "holds", "does not hold: steeper here"), (0.02, 0.001, "does not hold", None),
    (0.0, 0.05, "cannot tell", None),
])  # fmt: skip
def test_what_is_said_of_a_ladder(b, spread, ends, exponent):
    """Runs that end where a known law, or none, has them, off by a random factor each; all curves fall on the way."""
    rng, macs, curves = np.random.default_rng(4), 1e10 * np.geomspace(0.05, 1, 12), {}
    for i in range(6):
        last = (macs[-1] * 4.0**i) ** b * np.exp(spread * rng.standard_normal())
        slope = b if exponent else -0.3
        curves[f"s{i}"] = macs * 4.0**i, last * (macs / macs[-1]) ** slope
    judged = [verdict for _, verdict in figure9.judge_fits(figure9.fit_all(curves), curves)]
    assert judged[0] == ends and exponent in (None, judged[1])


# Figure 11
def test_best_rate_is_the_parabola_s_lowest_point():
    rates = [2.0**-k for k in range(3, 11)]
    for lowest in (-5.3, -8.0, -4.51):
        losses = [0.5 + 0.3 * (math.log2(rate) - lowest) ** 2 for rate in rates]
        rate, is_inside = figure9.best_rate(rates, losses)
        assert math.log2(rate) == pytest.approx(lowest) and is_inside
    assert figure9.best_rate(rates, list(range(8))) == (rates[0], False)
    assert figure9.best_rate(rates, list(range(8, 0, -1))) == (rates[7], False)
    assert figure9.best_rate(rates, [None, None, 1.0, 2, 3, 4, 5, 6]) == (rates[2], True)


@pytest.mark.parametrize("drift, words", [
    ({0: (2, 2.01), 1: (0.5, 0.52)}, ["holds", "holds"]),
    ({0: (0.41, 0.4), 1: (2, 2.01)}, ["does not hold", "does not hold"]),
    ({0: (0.5, 2), 1: (0.5, 2)}, ["cannot tell", "cannot tell"]), ({0: (2, 3), 1: (0.1, 0.9)}, ["cannot tell"] * 2),
])  # fmt: skip
def test_verdicts(drift, words):
    """Losses whose best rate falls, from the narrowest to the widest, by these powers of two with each seed."""
    losses = {}
    for has_mup in (False, True):
        for i, width in enumerate((16, 32, 64, 128)):
            for seed in (0, 1):
                lowest = -5.5 - drift[has_mup][seed] * i / 3
                for rate in figure9.RATES:
                    losses[has_mup, width, rate, seed] = 1 + (math.log2(rate) - lowest) ** 2
    verdicts = figure9.judge_sweep(figure9.read_sweep(losses, (0, 1)))
    assert [verdict for _, verdict, _ in verdicts] == words
    for has_mup, (_, _, shifts) in zip((False, True), verdicts):
        assert shifts == pytest.approx(drift[has_mup], abs=1e-6)
    for rate in figure9.RATES:  # a width whose loss falls to the end says nothing
        losses[True, 128, rate, 1] = rate
    assert "at an end" in figure9.judge_sweep(figure9.read_sweep(losses, (0, 1)))[1][1]


def test_rates_of_two_widths():
    """µP: eight times as wide, an eighth of the rate for the blocks' matrices, and the same for all else."""
    jobs = figure9.sweep_jobs(replace(figure9.NARROWEST["laptop"], vocab_size=36), [0], 5)
    narrow, wide = jobs[True, 16, 2**-5, 0], jobs[True, 128, 2**-5, 0]
    assert narrow is jobs[True, 16, 2**-5, 0] and narrow == jobs[False, 16, 2**-5, 0]
    assert len(set(jobs.values())) == 8 * 7 and len({job.name for job in jobs.values()}) == 8 * 7
    rates = {}
    for job in (narrow, wide, jobs[False, 128, 2**-5, 0]):
        model = toto.Toto(job.config)
        groups = train.make_optimizer(model, job.rate).param_groups
        of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        names = "blocks.0.mlp.out.weight", "embedding.weight", "norm.weight"
        rates[job.name.split("-rate")[0]] = [of[id(model.get_parameter(name))] for name in names]
    same = [(2**-5, 0.1), (2**-5, 0)]
    assert rates["standard-16"] == rates["standard-128"] == [(2**-5, 0.1), *same]
    assert rates["mup-128"][0] == pytest.approx((2**-8, 0.8)) and rates["mup-128"][1:] == same


def test_points_are_log_spaced():
    job = figure9.Job("x", figure9.SMALL["s1"], 0.1, 1200, 0, n_points=16)
    points = job.points(50)
    assert points[0] == 50 and points[-1] == 1200 and len(points) == 16
    assert np.diff(np.log(points)) == pytest.approx(np.log(24) / 15, abs=0.01)  # whole steps
    assert replace(job, n_points=1).points(50) == [1200] and replace(job, steps=4).points(50) == [1, 2, 3, 4]


def test_the_ladder():
    """From 50 K to 6 M parameters, each model larger; MACs against a count of every product by hand."""
    sizes = [replace(config, vocab_size=516) for config in figure9.SMALL.values()]
    counts = [figure9.build_without_memory(config).count_parameters() for config in sizes]
    assert counts == sorted(counts) and 45e3 < counts[0] < 55e3 and 5e6 < counts[-1] < 6e6
    task = SimpleNamespace(frames=8, grid=(6, 6), n_sequences=4)
    D, L, T = 32, 2, 288
    products = L * (4 * D * D + 3 * 4 * D * D + 2 * T * D) + 516 * D  # of a token, forwards
    norms = (2 * L + 1) * D  # 6 N counts their weights too
    assert figure9.Job("x", sizes[0], 0.1, 10, 0).macs(task, 10) == 3 * (products + norms) * 4 * T * 10


# Jobs
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, untrained_tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "dvae.pt"
    dvae.save(untrained_tokenizer, path)
    return path


def command(tokenizer, out, *extra):
    words = ["--tokenizer", tokenizer, "--sizes", "s1", "s2", "--steps", 6, "--rate", 0.01, "--out", out]
    return ["paper/figure9_scaling.py", *map(str, words), "--device", "cpu", *map(str, extra)]


def lines_of(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().split("\n") if line]


@needs_matplotlib
def test_a_killed_run_ends_with_the_same_numbers(tokenizer, tmp_path, monkeypatch):
    """Stopped in the middle of a model, with the last line cut off too: the same losses, bit for bit."""
    steps, take_step = [], train.take_step

    def take_step_and_stop(*inputs):
        steps.append(1)
        if len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(*inputs)

    monkeypatch.setattr(train, "take_step", take_step_and_stop)
    monkeypatch.setattr(figure9, "N_VALIDATION", 4)
    stop_at, results = 9, {}  # the second of two runs of six steps, after its third loss
    for name in ("stopped", "undisturbed"):
        monkeypatch.setattr(sys, "argv", command(tokenizer, tmp_path / name))
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                figure9.main()
            assert len(lines_of(tmp_path / name)) == 1 and (tmp_path / name / "s1.pt").exists()
            with open(tmp_path / name / "runs.jsonl", "a") as file:
                file.write('\n{"settings": {"name": "s1"')
        figure9.main()
        results[name] = json.loads((tmp_path / name / "figure9.json").read_text())["figure 9"]
        assert not list((tmp_path / name).glob("*.pt"))
    assert len(steps) == 24 and results["stopped"] == results["undisturbed"]
    figure9.main()
    assert len(steps) == 24  # all is kept


@needs_matplotlib
def test_both_figures(tokenizer, tmp_path, monkeypatch, capsys):
    """Figure 11's rate goes into Figure 9; at another rate that one alone is trained again, and no figure is lost."""
    monkeypatch.setattr(figure9, "N_VALIDATION", 4)
    monkeypatch.setattr(figure9, "RATES", [2**-5, 2**-6, 2**-7])
    words = [*command(tokenizer, tmp_path, "--sweep-steps", 1, "--seeds", 1, "--batch-tokens", 288), "--rate", "0.5"]
    monkeypatch.setattr(sys, "argv", words[: words.index("--rate")] + words[words.index("--rate") + 2 : -2])
    figure9.main()
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "figure9.json").read_text())
    losses = {(row["mup"], row["width"]): row["mean"] for row in written["figure 11"]["rows"]}
    assert losses[False, 16] == losses[True, 16] and losses[False, 128] != losses[True, 128]
    assert written["rate"] == 2**-5 and len(lines_of(tmp_path)) == 3 * 7 + 2  # one step: the fastest is best
    assert "Figure 11" in shown and "a6" in shown and "paper's exponent" in shown
    assert (tmp_path / "figure9.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", words)
    figure9.main()
    assert len(lines_of(tmp_path)) == 3 * 7 + 4


@needs_matplotlib
def test_processes_share_the_models(tokenizer, tmp_path, monkeypatch):
    """Two processes: no model is trained twice, one of them reports, and the losses are those of one process."""
    extra = ["--steps", 4, "--batch-tokens", 288]
    done = run(command(tokenizer, tmp_path / "two", "--sizes", "s1", "s2", "s3", *extra), PAIR)
    assert sorted(line["settings"]["name"] for line in lines_of(tmp_path / "two")) == ["s1", "s2", "s3"]
    assert done.stdout.count("Figure 9") == 1
    assert all(f"{name}, {i} of 3" in done.stderr for i, name in enumerate(("s1", "s2", "s3"), start=1))
    monkeypatch.setattr(sys, "argv", command(tokenizer, tmp_path / "one", *extra, "--sizes", "s1"))
    figure9.main()
    of_s1 = lambda out: [line["result"] for line in lines_of(tmp_path / out) if line["settings"]["name"] == "s1"]
    assert of_s1("one") == of_s1("two")


@needs_matplotlib
def test_a_run_that_diverges_is_recorded(tokenizer, tmp_path, monkeypatch):
    """Its last losses are None, the others stay, and the table and the fits do without."""
    take_step, steps = train.take_step, []

    def diverge(*inputs):
        steps.append(1)
        return take_step(*inputs) * (math.nan if len(steps) == 5 else 1)

    monkeypatch.setattr(train, "take_step", diverge)
    monkeypatch.setattr(figure9, "N_VALIDATION", 4)
    monkeypatch.setattr(sys, "argv", command(tokenizer, tmp_path))
    figure9.main()
    models = json.loads((tmp_path / "figure9.json").read_text())["figure 9"]
    assert [loss is None for loss in models[1]["losses"]] == [False] * 4 + [True] * 2  # the largest is trained first
    assert None not in models[0]["losses"] and len(figure9.curve_of(models[1])[0]) == 4


def test_no_clip_is_seen_twice(tokenizer, tmp_path):
    """The sequences of all steps differ, as do those that the loss is measured on; too few clips are refused."""
    args = SimpleNamespace(data=None, tokenizer=tokenizer, out=tmp_path, resolution=48, frames=8, stride=4,
                           batch_tokens=1024, micro_batch=4, warmup=50, seed=0)  # fmt: skip
    task = figure9.prepare(50, args, torch.device("cpu"))
    source, seen = task.sources[0], []
    of_run = SimpleNamespace(n_sequences=task.n_sequences, mixture=data.Mixture(task.sources, [1.0], 3))
    clips, codes = [], source.tokens.codes
    source.tokens.codes = lambda clip, *rest: clips.append(source.tokens.names[clip]) or codes(clip, *rest)
    for step in range(50):
        seen += [row.tobytes() for row in train.read_batch(of_run, step, torch.device("cpu")).numpy()]
    assert len(seen) == 200 == len(set(clips))
    assert not set(clips) & set(task.held_out[data.WORLD].tokens.names)
    with pytest.raises(ValueError, match="201 sequences are asked for, and it has 200 clips"):
        figure9.check_no_repeats(201, source)


def test_two_ladders_do_not_mix(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figure9_scaling.py", "--sizes", "s1", "a1"])
    with pytest.raises(ValueError, match="give sizes of one"):
        figure9.parse_arguments()


def test_defaults_are_the_papers(monkeypatch):
    words = ["figure9_scaling.py", "--sizes", "a2", "a1", "--steps", "1000"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="a1 to a6 need --data"):
        figure9.parse_arguments()
    monkeypatch.setattr(sys, "argv", [*words, "--data", "tokens"])
    args = figure9.parse_arguments()
    assert (args.sizes, args.steps, args.sweep_steps) == (["a1", "a2"], 1000, 100)
    assert (args.resolution, args.frames, args.batch_tokens, args.warmup) == (128, 16, 2**20, 2000)
