"""Figures 2, 4, 8, 10 and 14: curves against closed forms, files that are missing or damaged, the whole program."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "paper"))

import figures


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def a_log(path, losses, tokens=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i + 1, "tokens": tokens * (i + 1), "loss": loss}) for i, loss in enumerate(losses)]
    validation = json.dumps({"step": 2, "validation": {}, "validation_loss": 99.0})
    path.write_text("\n".join([*lines[:2], validation, *lines[2:], '{"step": 9, "tok']))  # a line that was cut off
    return path


def a_probe(path, shift=0.0, checkpoints=("out/toto.pt",), pools=("attention", "average"), layer="all"):
    """probe.json of three layers, with the top-1 of 0.3, 0.6, 0.5 and `shift` for attention, 0.1 less for others."""
    models = [name for checkpoint in checkpoints for name in (checkpoint, f"{checkpoint}, untrained")]
    rows = [
        {"model": model, "task": task, "pool": pool, "layer": l, "top1": top1, "interval": [top1 - 0.04, top1 + 0.05]}
        for model in models
        for task in ("motion", "shape")
        for pool in pools
        for l, value in ((2, 0.5), (0, 0.3), (1, 0.6))  # in any order
        for top1 in [value + shift - 0.1 * (pool == "average") - 0.2 * model.endswith("untrained")]
    ]
    classes = {"motion": ["up", "down"], "shape": list("abcd")}
    return write(path, {"runs": {model: {"layer": layer} for model in models}, "classes": classes, "accuracy": rows})


def a_validation(path, first=3.0, source="world"):
    by_token = [first - 1, first + 1, 1.5, 2.5, 1.5, 0.5]
    numbers = {"loss": 1.0, "accuracy": 0.5, "repeat_accuracy": 0.25, "unigram_entropy": 4.0}
    return write(path, {source: numbers | {"loss_by_frame": [first, 2.0, 1.0], "loss_by_token": by_token}})


def test_the_running_mean_is_of_the_last_tenth():
    losses = np.random.default_rng(0).random(57)
    expected = [losses[s - max(s // 10, 1) : s].mean() for s in range(1, 58)]
    np.testing.assert_allclose(figures.running_mean(losses), expected, rtol=1e-12)


def test_training_is_averaged_over_seeds_as_far_as_all_have_trained(tmp_path):
    paths = [a_log(tmp_path / "a", [4.0, 2.0, 1.0]), a_log(tmp_path / "b", [5.0, 3.0, 2.0, 0.0])]
    curve = figures.training_curve("tiny", paths)
    assert curve.x.tolist() == [10, 20, 30]
    half = 12.706 * 0.5  # Student's, of two runs that are 1 apart: t · (1 / √2) / √2
    np.testing.assert_allclose(curve.triples[:, 0], [4.5, 2.5, 1.5])
    np.testing.assert_allclose(curve.triples[:, 2] - curve.triples[:, 0], half)
    assert (curve.triples[:, 1] == 0).all()  # no loss is below 0
    alone = figures.training_curve("tiny", paths[:1])
    assert np.isnan(alone.triples[:, 1:]).all() and alone.triples[:, 0].tolist() == [4.0, 2.0, 1.0]


def test_a_long_log_is_thinned_and_keeps_its_ends(tmp_path):
    curve = figures.training_curve("tiny", [a_log(tmp_path / "log", np.arange(5000.0))], n_points=50)
    assert len(curve.x) <= 50 and (curve.x[0], curve.x[-1]) == (10, 50_000)
    assert curve.triples[-1, 0] == np.arange(4500, 5000).mean()


def test_accuracy_over_depth_has_the_report_s_interval_or_that_over_seeds(tmp_path):
    paths = [a_probe(tmp_path / str(i) / "probe.json", shift) for i, shift in enumerate((0.0, 0.02, 0.04))]
    (trained, untrained) = figures.depth_curves("tiny", paths[:1])["shape", 4]["attention"]
    assert (trained.label, trained.is_floor, untrained.is_floor) == ("tiny", False, True)
    assert trained.x.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(trained.triples, [[30, 26, 35], [60, 56, 65], [50, 46, 55]])
    np.testing.assert_allclose(untrained.triples[:, 0], [10, 40, 30])
    over = figures.depth_curves("tiny", paths)["motion", 2]["average"][0]
    half = 4.303 * 2 / np.sqrt(3)  # three runs with a standard deviation of 2
    np.testing.assert_allclose(over.triples, [[x, x - half, x + half] for x in (22, 52, 42)])
    # Paired: what the seeds have in common goes.
    np.testing.assert_allclose(over.leads()["best less last"], [10, 10, 10])
    assert "best less last" in over.report() and "best less last" not in trained.report()


def test_several_checkpoints_of_one_report_are_named_by_their_folders(tmp_path):
    path = a_probe(tmp_path / "probe.json", checkpoints=("out/base/toto.pt", "out/large/toto.pt"))
    curves = figures.depth_curves("ignored", [path])["shape", 4]["attention"]
    assert [(c.label, c.is_floor) for c in curves] == [(n, f) for n in ("base", "large") for f in (False, True)]


def test_positions_are_means_over_seeds(tmp_path):
    paths = [a_validation(tmp_path / str(first), first) for first in (3.0, 5.0)]
    by_token, by_frame, stated = figures.position_curves("tiny", paths)["world"]
    np.testing.assert_allclose(by_token, [3, 5, 1.5, 2.5, 1.5, 0.5])
    np.testing.assert_allclose(by_frame.triples[:, 0], [4, 2, 1])
    assert stated["first less later"][0] == 2.5 and stated["later frames"] == [1.5, 1.5, 1.5]
    assert figures.position_curves("tiny", paths[:1])["world"][2]["first frame"] == [3.0, None, None]
    easy = figures.position_curves("tiny", [a_validation(tmp_path / "easy", first=1.0)])["world"][2]
    assert easy["first less later"] == [-0.5, None, None]  # not cut at 0


def test_tracking_and_robots_keep_their_layers_apart():
    rows = [{"view": "128", "name": "raw RGB patches", "layer": None, "J&F": [99, 98, 100]}]
    for shift, name in ((0, "Toto"), (5, "untrained")):
        rows += [{"view": "128", "name": name, "layer": l, "J&F": [10 * l + shift, None, None]} for l in (0, 2, 4)]
    trained, untrained = figures.tracking_curves({"rows": rows, "layers": [0, 2, 4]}, "world")
    assert trained.triples[:, 0].tolist() == [0, 20, 40] and untrained.triples[:, 0].tolist() == [5, 25, 45]
    assert trained.x.tolist() == [0, 0.5, 1] and np.isnan(trained.triples[:, 1:]).all()

    trials = {"0": [True, False, False, False], "2": [True] * 4}
    (robots,) = figures.robot_curves({"task": "carry", "layers": trials}, "")
    # Wilson's interval of 4 successes in 4 trials is from n / (n + z²) to 1.
    np.testing.assert_allclose(robots.triples[1], [100, 100 * 4 / (4 + 1.96**2), 100])
    assert robots.triples[0, 0] == 25 and figures.robot_curves({"task": "pick"}, "") == []


def test_linear_probes_at_two_resolutions():
    of = lambda name, side, top1: {"name": name, "side": side, "top1": top1, "untrained": [[0.1, 0.1]]}
    rows = [of("dVAE-dVAE", 6, [[0.2, 0.3], [0.4, 0.3]]), of("VQGAN-VQGAN", 6, [[0.9, 0.9]])]
    trained, untrained = figures.grid_curves({"rows": rows}, "world")
    np.testing.assert_allclose(trained.triples[:, 0], [30, 30])
    np.testing.assert_allclose(trained.triples[1], [30, 30, 30])
    assert trained.triples[0].tolist()[1:] == [0, 100]  # cut at what is possible
    assert untrained.is_floor and np.isnan(untrained.triples[:, 1:]).all()


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("probe.json", '{"runs"', "cannot be read"),
        ("probe.json", "[1]", "cannot be read"),
        ("validation.json", '{"world": {"loss": 1}}', "has no 'accuracy'"),
        ("log.jsonl", '{"step": 1, "validation": {}}\n', "has no step of a training"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, words, monkeypatch):
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        figures.main()
    assert not (tmp_path / "out").exists()


def test_missing_runs_are_named_and_the_rest_is_drawn(tmp_path):
    a_log(tmp_path / "base" / "log.jsonl", [3.0, 2.0])
    a_validation(tmp_path / "large" / "validation.json")
    a_probe(tmp_path / "base" / "probe.json")
    a_probe(tmp_path / "large" / "probe.json", layer="mid")
    runs = [str(tmp_path / "base"), f"l={tmp_path}/large"]
    done = run(["paper/figures.py", "--runs", *runs, "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"missing: {tmp_path}/large/log.jsonl; it is made by python train.py --out {tmp_path}/large\n" in done.stdout
    assert f"missing: {tmp_path}/base/validation.json; it is made by python train.py --evaluate" in done.stdout
    command = "python probe.py --layer all"
    assert f"missing: {tmp_path}/large/probe.json with all layers; it is made by {command}" in done.stdout
    assert "missing: table10*.json" in done.stdout and "python paper/figure6_robots.py" in done.stdout
    assert "base: best 60 (56 to 65) at 50% of the depth; middle 60 (56 to 65); last 50 (46 to 55)" in done.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"figures.json"} | {f"figure{n}.png" for n in (2, 4, 8, 10, 14)}
    report = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert list(report["Figure 4"]) == ["image classification: shape"]  # recognition comes first
    assert report["Figure 10"]["l, world"]["first less later"] == [1.5, None, None]
    assert report["Figure 2"][0]["values"] == [[2.0, None, None]]


@pytest.mark.parametrize("runs, words", [
    (["nowhere"], "^nowhere: no such folder$"), (["."], "nothing to draw"), (["a=.", "a=."], "same label"),
])  # fmt: skip
def test_nothing_to_draw_and_equal_labels_are_refused(tmp_path, runs, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", *runs, *where])
    with pytest.raises(ValueError, match=words):
        figures.main()


def test_seeds_of_different_kinds_are_refused(tmp_path):
    logs = [a_log(tmp_path / str(tokens), [1.0, 2.0], tokens) for tokens in (10, 20)]
    with pytest.raises(ValueError, match="20: is no other seed of what .*10 is of"):
        figures.training_curve("tiny", logs)
    with pytest.raises(ValueError, match="no other seed"):
        sources = [a_validation(tmp_path / source, source=source) for source in ("world", "kinetics")]
        figures.position_curves("tiny", sources)


def test_tasks_of_two_folders_have_panels_of_their_own(tmp_path):
    for n in (3, 4):
        report = json.loads(a_probe(tmp_path / str(n) / "probe.json").read_text())
        rows = [row | {"task": "class"} for row in report["accuracy"] if row["task"] == "shape"]
        write(tmp_path / str(n) / "probe.json", report | {"accuracy": rows, "classes": {"class": list(range(n))}})
    args = figures.argparse.Namespace(runs=[(f"of {n}", [tmp_path / str(n)]) for n in (3, 4)], results=[tmp_path])
    panels = figures.figures_over_depth(args, [])
    assert list(panels["Figure 4"]) == ["classification: 3 classes"]
    assert list(panels["Figure 8"]) == ["classification: 3 classes", "classification: 4 classes"]
    assert {curve.label for curve in panels["Figure 14"]["4 classes, by pooling"][0]} == {"attention", "average"}


def test_runs_are_parsed():
    assert figures.parse_run("tiny=out,out/seed1") == ("tiny", [Path("out"), Path("out/seed1")])
    assert figures.parse_run("out/large") == ("large", [Path("out/large")])
