"""Figures 2, 4, 8, 10 and 14: loss over training, accuracy over depth, and loss over positions, from what runs left.

    python paper/figures.py                                               of `python train.py` alone, in out/
    python paper/figures.py --runs tiny=out,out/seed1,out/seed2           three seeds of one model, as a band
    python paper/figures.py --runs base=out/base large=out/large          several models beside one another

Nothing is trained or evaluated here. A run's folder may hold

    log.jsonl          of train.py                  Fig. 2 (§3.1): training loss over tokens
    validation.json    of train.py --evaluate       Fig. 10 (A.1): validation loss over the tokens of a sequence
    probe.json         of probe.py --layer all      Fig. 4 (§4.1), Fig. 8 (§4.8), Fig. 14 (A.9): accuracy over depth

and --results the reports of table10_tracking.py and figure6_robots.py (Fig. 8) and of table3_tokenizers.py (Fig. 14).
What is missing is named, with the command that makes it, and the rest is drawn. Writes figure2.png … figure14.png to
--out, and figures.json with the numbers, but for Fig. 2 before the end of training and the single tokens of Fig. 10.

Bands are 95 % intervals: Student's over the seeds of a model where it has several, else those of the reports, over
clips or trials. Where there is no band there is no interval: one run's loss, or one video to track.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data
import probe

HEADS = "--layer all --pool average attention attention-mlp"
MADE_BY = {
    "log.jsonl": "python train.py --out {0}",
    "validation.json": "python train.py --evaluate --out {0}",
    "probe.json": f"python probe.py {HEADS} --checkpoint {{0}}/toto.pt --out {{0}}",
    "table3*.json": "python paper/table3_tokenizers.py",
    "table10*.json": "python paper/table10_tracking.py",
    "figure6*.json": "python paper/figure6_robots.py",
}
STANDS_FOR = {"shape": "image classification", "motion": "action recognition"}  # the built-in world's tasks in Fig. 8
PAPER = {
    "Figure 4": "best at about 50 % of the depth, for three sizes (ImageNet, attention probes)",
    "Figure 8": "best at about 50 %; for robots the last layers do as well as the middle ones",
    "Figure 14": "best near the middle, by linear and by attention probes",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes


@dataclass
class Curve:
    """A line of a figure: mean, low and high, `triples` (N, 3), at places x (N,); NaN where there is no interval."""

    label: str
    x: np.ndarray
    triples: np.ndarray
    is_floor: bool = False  # of a trunk with random weights
    is_percent: bool = True
    of_seeds: tuple = ()  # each seed's values, (seeds, N), where there are any

    def __post_init__(self):
        self.x, self.triples = np.asarray(self.x, dtype=float), np.array(self.triples, dtype=float)  # None becomes NaN
        self.triples[np.isinf(self.triples)] = np.nan  # probe.over_seeds of a single run
        self.triples = self.triples.clip(0, 100 if self.is_percent else None)

    def report(self):
        """For figures.json, which has null for NaN."""
        triples = [[None if np.isnan(value) else value for value in row] for row in self.triples.tolist()]
        report = {"label": self.label, "random weights": self.is_floor, "x": self.x.tolist(), "values": triples}
        return report | self.leads()

    def leads(self):
        """{"middle less last", "best less last"}, paired over seeds; {} of one seed.

        The first is what the paper says of all its models. The best is picked on these very seeds, which favours it.
        """
        places = {"middle": abs(self.x - 0.5).argmin(), "best": self.triples[:, 0].argmax()}
        lead = lambda place: probe.over_seeds([values[place] - values[-1] for values in self.of_seeds])
        before = {name: place for name, place in places.items() if len(self.of_seeds) > 1 and place < len(self.x) - 1}
        return {f"{name} less last": lead(place) for name, place in before.items()}


# Reading.
def parse_run(text):
    """For argparse: [LABEL=]FOLDER[,FOLDER…] -> (label, folders); the folders are seeds of one model."""
    label, _, folders = text.rpartition("=")
    if not all(folders.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: a folder is missing")
    folders = [Path(folder) for folder in folders.split(",")]
    return label or folders[0].name, folders


def find(runs, name, missing):
    """{label: paths, one a seed} of the runs that have a file of this name; the lack of others goes to `missing`."""
    found = {}
    for label, folders in runs:
        for folder in folders:
            if (folder / name).is_file():
                found.setdefault(label, []).append(folder / name)
            else:
                missing.append(f"{folder / name}; it is made by {MADE_BY[name].format(folder)}")
    return found


def read(path, what):
    """what(report) of a JSON file; ValueError if the file is damaged, or another program's."""
    try:
        return what(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise ValueError(f"{path}: {reason}; remove it and make it anew") from error


def read_log(path):
    """Tokens seen and loss, (2, S), after each step of a log.jsonl. Lines of validation, or cut off, are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            rows.append((entry["tokens"], entry["loss"]))
        except (ValueError, KeyError):
            continue
    if not rows:
        raise ValueError(f"{path}: has no step of a training; remove it and train anew")
    return np.array(rows, dtype=float).T


# From files to curves.
def running_mean(losses):
    """The mean of the last tenth of all steps so far, at least of one, after each step: (S,) -> (S,).

    Not in the paper: how its curves are smoothed. A window that grows is equally wide all along a logarithmic axis.
    """
    sums, last = np.concatenate(([0.0], np.cumsum(losses))), np.arange(1, len(losses) + 1)
    first = last - np.maximum(last // 10, 1)
    return (sums[last] - sums[first]) / (last - first)


def check_alike(paths, kinds):
    """Seeds are runs of one kind; ValueError where what should be equal, one of `kinds` for each path, is not."""
    for path, kind in zip(paths, kinds):
        if kind != kinds[0]:
            raise ValueError(f"{path}: is no other seed of what {paths[0]} is of; give it a LABEL=FOLDER of its own")


def training_curve(label, paths, n_points=400):
    """Fig. 2: the smoothed loss over tokens, for as long as all seeds have trained, at up to n_points steps."""
    logs = [read_log(path) for path in paths]
    check_alike(paths, [tokens[0] for tokens, _ in logs])
    n = min(log.shape[1] for log in logs)
    losses = np.stack([running_mean(loss[:n]) for _, loss in logs])  # (seeds, S)
    picked = np.unique(np.geomspace(1, n, n_points).round().astype(int) - 1)
    return Curve(label, logs[0][0][picked], [probe.over_seeds(losses[:, i]) for i in picked], is_percent=False)


def position_curves(label, paths):
    """A.1, Fig. 10: {source: (loss of each token (T,), a curve over frames, {what: [mean, low, high]})}, over seeds."""
    numbers = ("loss", "accuracy", "repeat_accuracy", "unigram_entropy")
    needed = (*numbers, "loss_by_frame", "loss_by_token")
    pick = lambda report: {source: {key: of[key] for key in needed} for source, of in report.items()}
    reports, curves = [read(path, pick) for path in paths], {}
    check_alike(paths, [{source: len(of["loss_by_token"]) for source, of in report.items()} for report in reports])
    for source in reports[0]:
        rows = [report[source] for report in reports]
        frames = np.array([row["loss_by_frame"] for row in rows])  # (seeds, F)
        values = {"first frame": frames[:, 0]}
        if frames.shape[1] > 1:
            later = frames[:, 1:].mean(axis=1)
            values |= {"later frames": later, "first less later": frames[:, 0] - later}
        values |= {key: [row[key] for row in rows] for key in numbers if rows[0][key] is not None}
        by_frame = Curve(label, range(frames.shape[1]), list(map(probe.over_seeds, frames.T)), is_percent=False)
        by_token = np.mean([row["loss_by_token"] for row in rows], axis=0)
        known = lambda triple: [x if np.isfinite(x) else None for x in triple]  # one seed has no interval
        curves[source] = by_token, by_frame, {what: known(probe.over_seeds(of)) for what, of in values.items()}
    return curves


def depth_curves(label, paths):
    """§4.8, Fig. 4, Fig. 8, Fig. 14: top-1 over depth, in per cent, of the probe.json of each seed.

    -> {(task, number of classes): {pool: [a curve for each model]}}. A report on several checkpoints has a
    curve for each, named by its folder, and with --baselines one for the same trunk with random weights. What has the
    same name in the seeds' reports is one curve.
    """

    def rows_of(report):
        is_one, rows = sum(", " not in name for name in report["runs"]) == 1, {}
        for row in report["accuracy"]:
            path, _, kind = row["model"].partition(", ")  # kind: "", "untrained", or "raw pixels", which have no depth
            name = label if is_one else Path(path).parent.name
            key = row["task"], len(report["classes"][row["task"]]), row["pool"], name, kind
            rows.setdefault(key, {})[row["layer"]] = [100 * value for value in (row["top1"], *row["interval"])]
        return rows

    tables, curves = [read(path, rows_of) for path in paths], {}
    check_alike(paths, [{layer for rows in table.values() for layer in rows} for table in tables])
    for key in dict.fromkeys(key for table in tables for key in table if key[-1] != "raw pixels"):
        *task, pool, name, kind = key
        seeds = [table[key] for table in tables if key in table]
        layers = sorted(seeds[0])
        of_seeds = [[seed[l][0] for l in layers] for seed in seeds]
        triples = [seeds[0][l] for l in layers] if len(seeds) == 1 else list(map(probe.over_seeds, zip(*of_seeds)))
        curve = Curve(name, np.array(layers) / layers[-1], triples, kind == "untrained", of_seeds=of_seeds)
        curves.setdefault(tuple(task), {}).setdefault(pool, []).append(curve)
    return curves


def tracking_curves(report, medium):
    """Fig. 8: J&F over depth at each resolution, with trained and random weights, of table10_tracking.py's report."""
    curves, views = [], dict.fromkeys(row["view"] for row in report["rows"])
    for view, name in [(view, name) for view in views for name in ("Toto", "untrained")]:
        rows = [r for r in report["rows"] if (r["view"], r["name"]) == (view, name) and r["layer"] is not None]
        depth = [row["layer"] / max(report["layers"]) for row in rows]
        triples = [row["J&F"] for row in rows]
        curves.append(Curve(f"{medium}, {view} pixels", depth, triples, name == "untrained"))
    return curves


def robot_curves(report, _):
    """Fig. 8: success of a cloned policy over depth, of figure6_robots.py's report; none where no layers were tried."""
    layers = {int(layer): trials for layer, trials in report.get("layers", {}).items()}
    triples = [(np.mean(trials), *probe.wilson(np.mean(trials), len(trials))) for trials in layers.values()]
    return [Curve(report["task"], np.array(list(layers)) / max(layers), 100 * np.array(triples))] if layers else []


def grid_curves(report, medium):
    """Fig. 14: linear probes over depth at two resolutions, with trained and random weights, of a table3.json."""
    curves, of_dvae = [], [row for row in report["rows"] if row["name"] == "dVAE-dVAE"]
    for row, which in [(row, which) for row in of_dvae for which in ("top1", "untrained")]:
        of_seeds = 100 * np.array(row[which])  # (seeds, L + 1)
        triples, label = list(map(probe.over_seeds, of_seeds.T)), f"{medium}, {row['side']} x {row['side']} tokens"
        curves.append(Curve(label, np.linspace(0, 1, len(triples)), triples, which == "untrained", of_seeds=of_seeds))
    return curves


# Drawing.
def plot(axis, curves, **look):
    """Curves with their bands, and a legend below; a trunk with random weights has its trained one's colour."""
    labels = list(dict.fromkeys(curve.label for curve in curves))
    for curve in curves:
        colour, (mean, low, high) = COLOURS[labels.index(curve.label) % len(COLOURS)], curve.triples.T
        style = {"linestyle": "--", "linewidth": 1} if curve.is_floor else {"label": curve.label} | look
        axis.plot(curve.x, mean, color=colour, **style)
        axis.fill_between(curve.x, low, high, color=colour, alpha=0.06 if curve.is_floor else 0.18, linewidth=0)
    n_columns = 1 if max(map(len, labels)) > 20 else 2
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=n_columns, fontsize="small", frameon=False)


def save(figure, path):
    with data.atomic_open(path) as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")


def draw_depth(plt, name, panels, path):
    """Fig. 4, 8 or 14: {title: (curves, what is measured, chance in per cent or None)}, one panel each."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.2), squeeze=False)
    for axis, (title, (curves, measure, chance)) in zip(axes[0], panels.items()):
        plot(axis, curves, marker="o", markersize=4)
        dashed = " (dashed: random weights)" if any(curve.is_floor for curve in curves) else ""
        axis.set(title=title, ylabel=measure, ylim=(0, 102), xlabel=f"relative depth{dashed}")
        if chance:
            axis.axhline(chance, linestyle=":", color="grey", linewidth=1)
            axis.annotate("chance", (1, chance), (0, -10), textcoords="offset points", ha="right", color="grey", size=8)
    axes[0][0].annotate(name, (0, 1.15), xycoords="axes fraction", weight="bold")
    figure.subplots_adjust(wspace=0.28)
    save(figure, path)


def draw_training(plt, curves, path):
    """Fig. 2, on two logarithmic axes."""
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    plot(axis, curves)
    axis.set(xscale="log", yscale="log", title="Figure 2: training loss", xlabel="tokens")
    axis.set_ylabel("nats per token, mean of\nthe last tenth of the steps")
    axis.set_ylim(bottom=0.7 * min(curve.triples[:, 0].min() for curve in curves))  # bands may reach below zero
    save(figure, path)


def draw_positions(plt, models, path):
    """Fig. 10, of {label: position_curves}: a panel for each source, thin lines for tokens, thick ones for frames."""
    sources = list(dict.fromkeys(source for of in models.values() for source in of))
    figure, axes = plt.subplots(1, len(sources), figsize=(7 * len(sources), 3.2), squeeze=False)
    for axis, source in zip(axes[0], sources):
        steps = []
        for colour, (by_token, by_frame, _) in zip(COLOURS, (of[source] for of in models.values() if source in of)):
            axis.plot(by_token, color=colour, linewidth=0.7, alpha=0.5)
            edges = np.stack((by_frame.x, by_frame.x + 1), axis=1).ravel() * len(by_token) / len(by_frame.x)
            steps.append(replace(by_frame, x=edges, triples=by_frame.triples.repeat(2, axis=0)))
        plot(axis, steps, linewidth=2)
        axis.set(title=f"Figure 10: {source}", xlabel="token of the sequence", ylim=(0, None))
        axis.set_ylabel("nats; thick: mean of a frame")
    save(figure, path)


# The program.
def show(triple):
    mean, low, high = triple
    return f"{mean:.3g}" + ("" if low is None or np.isnan(low) else f" ({low:.3g} to {high:.3g})")


def print_depth(figure, panels):
    """What the paper found, and of each curve the best, the middle and the last layer."""
    print(f"\n{figure}, over depth. The paper: {PAPER[figure]}")
    for title, (curves, measure, _) in panels.items():
        print(f"  {title}, {measure}")
        for curve in curves:
            best, middle = int(curve.triples[:, 0].argmax()), int(abs(curve.x - 0.5).argmin())
            label = f"{curve.label}, random weights" if curve.is_floor else curve.label
            words = f"best {show(curve.triples[best])} at {curve.x[best]:.0%} of the depth"
            leads = "".join(f"; {name} {show(lead)}" for name, lead in curve.leads().items())
            print(f"    {label}: {words}; middle {show(curve.triples[middle])}; last {show(curve.triples[-1])}{leads}")


def figures_over_depth(args, missing):
    """{figure: {title of a panel: (curves, what is measured, chance in per cent or None)}}, without empty panels."""
    tasks = {}  # {(task, number of classes): {pool: the curves of all runs}}
    has_all = lambda report: all(run["layer"] == "all" for run in report["runs"].values())
    for label, paths in find(args.runs, "probe.json", missing).items():
        curved = [path for path in paths if read(path, has_all)]
        few = (f"{path} with all layers; it is made by {MADE_BY['probe.json'].format(path.parent)}" for path in paths)
        missing += [words for path, words in zip(paths, few) if path not in curved]
        for task, pools in depth_curves(label, curved).items() if curved else ():
            for pool, curves in pools.items():
                tasks.setdefault(task, {}).setdefault(pool, []).extend(curves)

    def results(pattern, curves_of):  # table10_world.json is of the medium "world"
        paths = sorted(path for folder in args.results for path in folder.glob(pattern))
        if not paths:
            missing.append(f"{pattern} in {' '.join(map(str, args.results))}; it is made by {MADE_BY[pattern]}")
        media = [path.stem.partition("_")[2].replace("_", " ") or path.parent.name for path in paths]
        return [c for path, medium in zip(paths, media) for c in read(path, lambda report: curves_of(report, medium))]

    classification, by_pooling = {}, {}
    for task, n_classes in sorted(tasks, key=lambda key: (*STANDS_FOR, key[0]).index(key[0])):
        pools, name = tasks[task, n_classes], f"{n_classes} classes" if task == "class" else task
        pairs = [(pool, curve) for pool, curves in pools.items() for curve in curves]
        is_one = len({curve.label for _, curve in pairs}) == 1
        both = [replace(curve, label=pool if is_one else f"{curve.label}, {pool}") for pool, curve in pairs]
        title = f"{STANDS_FOR.get(task, 'classification')}: {name}"
        classification[title] = pools.get("attention"), "top-1, %, attention probe", 100 / n_classes
        by_pooling[f"{name}, by pooling"] = both, "top-1, %", 100 / n_classes
    source = f" ({', '.join(map(str, args.results))})"  # that they are not of these runs
    others = {f"object tracking{source}": (results("table10*.json", tracking_curves), "J&F, %", None)}
    others[f"robots{source}"] = results("figure6*.json", robot_curves), "success of a cloned policy, %", None
    grids = {f"linear probes of images{source}": (results("table3*.json", grid_curves), "top-1, %", None)}
    first = dict(list(classification.items())[:1])
    figures = {"Figure 4": first, "Figure 8": classification | others, "Figure 14": grids | by_pooling}
    figures = {figure: {title: panel for title, panel in of.items() if panel[0]} for figure, of in figures.items()}
    return {figure: panels for figure, panels in figures.items() if panels}


def parse_arguments():
    parser = data.Parser(description=__doc__, formatter_class=data.HelpFormatter)
    add, words = parser.add_argument, "a model's folder, or with commas those of its seeds (default: tiny=out)"
    add("--runs", nargs="+", type=parse_run, metavar="[LABEL=]FOLDER", help=words)
    words = "folders with reports of other scripts of paper/"
    add("--results", nargs="+", type=Path, default=[Path("paper/results")], help=words)
    add("--out", default="out/figures", type=data.output_folder, help="folder for the pictures and figures.json")
    args = parser.parse_args()
    for folder in [folder for _, folders in args.runs or [] for folder in folders] + args.results:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    args.runs = args.runs or [("tiny", [Path("out")])]
    if len(dict(args.runs)) < len(args.runs):
        raise ValueError("--runs: two models have the same label; give each LABEL=FOLDER")
    return args


def main():
    args, plt, missing = parse_arguments(), data.pyplot(), []
    training = [training_curve(*run) for run in find(args.runs, "log.jsonl", missing).items()]
    positions = {run[0]: position_curves(*run) for run in find(args.runs, "validation.json", missing).items()}
    figures, report = figures_over_depth(args, missing), {}
    if training:
        draw_training(plt, training, args.out / "figure2.png")
        print("Figure 2, nats per token at the end of training. The paper: the larger the model, the lower")
        for curve in training:
            print(f"    {curve.label}: {show(curve.triples[-1])}, after {curve.x[-1]:,.0f} tokens")
        report["Figure 2"] = [replace(c, x=c.x[-1:], triples=c.triples[-1:]).report() for c in training]
    for figure, panels in figures.items():
        draw_depth(plt, figure, panels, args.out / f"{figure.lower().replace(' ', '')}.png")
        print_depth(figure, panels)
        report[figure] = {title: [curve.report() for curve in curves] for title, (curves, *_) in panels.items()}
    if positions:
        draw_positions(plt, positions, args.out / "figure10.png")
        print("\nFigure 10, nats per token. The paper: the first frame costs more than later ones")
        report["Figure 10"] = {}
        for label, source in [(label, source) for label, sources in positions.items() for source in sources]:
            _, by_frame, triples = positions[label][source]
            print(f"    {label}, {source}: " + ", ".join(f"{what} {show(of)}" for what, of in triples.items()))
            report["Figure 10"][f"{label}, {source}"] = triples | {"frames": by_frame.report()["values"]}
    for line in missing:
        print(f"missing: {line}")
    if not report:
        raise ValueError("there is nothing to draw; python train.py makes a first run, in out/")
    report |= {"runs": {label: list(map(str, folders)) for label, folders in args.runs}}
    data.write_json(report, args.out / "figures.json")
    print(f"wrote {', '.join(list(report)[:-1])} (figure2.png and the like) and figures.json to {args.out}")


if __name__ == "__main__":
    data.run(main)
