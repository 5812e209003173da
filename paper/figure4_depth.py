"""Figure 4 (§4.8): which layer's features are best? Accuracy over depth, drawn from a report of probe.py.

    python probe.py --layer all          writes out/probe.json
    python paper/figure4_depth.py        draws it: paper/figure4_depth.png

One panel for each task, one line for each way of pooling and each model; bands are the 95 % intervals of the report,
the dotted line is chance. The paper finds the best layer near the middle of its models, for images (Fig. 4) as for
actions and tracking (Fig. 8).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six scripts lie in the folder above

import data


def draw(plt, report, path):
    """Write a PNG of a report, the dictionary of probe.json, to path."""
    tasks = list(report["classes"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        rows = [row for row in report["accuracy"] if row["task"] == task]
        lines = list(dict.fromkeys((row["model"], row["pool"]) for row in rows))
        has_one_model = len({model for model, _ in lines}) == 1
        for model, pool in lines:
            line = [row for row in rows if (row["model"], row["pool"]) == (model, pool)]
            line.sort(key=lambda row: row["layer"])
            layers, top1 = [row["layer"] for row in line], [100 * row["top1"] for row in line]
            low, high = zip(*[(100 * row["interval"][0], 100 * row["interval"][1]) for row in line])
            axis.plot(layers, top1, marker="o", markersize=3, label=pool if has_one_model else f"{pool}, {model}")
            axis.fill_between(layers, low, high, alpha=0.2)
        axis.axhline(100 / len(report["classes"][task]), linestyle=":", color="grey")
        axis.set(title=task, xlabel="layer (0: the embedding)", ylabel="top-1 accuracy, %", ylim=(0, 100))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].legend(fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Draw accuracy over depth from a report of probe.py.")
    parser.add_argument("--report", default="out/probe.json", type=Path, help="written by probe.py --layer all")
    parser.add_argument("--out", default="paper/figure4_depth.png", type=Path, help="the picture")
    args, plt = parser.parse_args(), data.pyplot()
    if not args.report.is_file():
        raise ValueError(f"{args.report}: no such file; python probe.py --layer all makes one")
    draw(plt, json.loads(args.report.read_text()), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    data.run(main)
