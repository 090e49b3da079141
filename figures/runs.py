"""Figures of several runs, from the JSON that evaluate.py wrote (seq-JEPA Figs. 8-12, 15).

    draw_heatmap(files, path)       top-1 for every M_tr and M_val (Figs. 9-12)
    draw_sweep(files, path)         R^2 and top-1 against M_tr (Fig. 8, left and middle)
    draw_transfer(files, path)      transfer: top-1 against M_val and against its cost (Fig. 15)
    draw_scatter(points, path)      top-1 against R^2, a point a method (Fig. 1)
    read_result(file)               what evaluate.py wrote; BadInput, naming the file, for any other

compare.py is their command. Checked in tests/test_figures_runs.py.
"""
import json
import math
from collections import defaultdict
from pathlib import Path

from figures.canvas import CYCLE, legend_below, plain, save, subplots
from figures.sequences import by_length
from plumbing.errors import BadInput

WORDS = ("probe", "predicts", "from", "head", "unit")       # of a row
NUMBERS = ("value", "epochs")
NUMBERS_OF_TRANSFER = ("gmac", "patch_size")
NUMBERS_OR_NONE = ("untrained", "paper")                    # --no-untrained; not in papers.csv
LARGEST = 1e9                                               # number that can be drawn


def draw_heatmap(files, path):
    """Top-1 on z_agg for every M_tr (one probes.json each) and M_val (Figs. 9-12).

    Runs that differ in neither (seeds) share a cell, which shows their mean."""
    top1 = defaultdict(list)                            # {(M_tr, M_val): per cent}
    settings = set()
    for result in map(read_result, files):
        settings.add(_setting(result["config"]))
        for M_val, row in by_length(result["rows"], "classify"):
            top1[result["config"]["views"], M_val].append(row["value"])
    refuse_nothing(top1, "classify")
    if len(settings) > 1:
        raise BadInput(f"a heatmap shows one setting, these are {len(settings)} "
                       f"({'; '.join(sorted(settings)):.150}); give the runs of one")
    trained = sorted({M_tr for M_tr, _ in top1})
    probed = sorted({M_val for _, M_val in top1})
    table = []
    for M_tr in trained:
        cells = [top1.get((M_tr, M_val), [math.nan]) for M_val in probed]
        table.append([sum(values) / len(values) for values in cells])

    width = max(3.5, 1.5 + 0.9 * len(probed))           # room for the title
    figure, axis = subplots(figsize=(width, 1.3 + 0.7 * len(trained)))
    axis.imshow(table, cmap="viridis")
    for y, values in enumerate(table):
        for x, value in enumerate(values):
            words = "-" if math.isnan(value) else f"{value:.1f}"
            axis.text(x, y, words, ha="center", va="center", color="white",
                      bbox=dict(facecolor="black", alpha=0.35, linewidth=0, pad=1.5))

    axis.set(xticks=range(len(probed)), xticklabels=probed, xlabel="M_val",
             yticks=range(len(trained)), yticklabels=trained, ylabel="M_tr",
             title="top-1 on z_agg, % (as Figs. 9-12)")
    return save(figure, path)


def _setting(c):
    """What a figure must not mix, in words.  c: the config of a run."""
    method = "" if c["method"] == "seq-jepa" else f"{plain(c['method'])}, "
    return f"{plain(c['dataset'])} {plain(c['mode'])}, {method}condition {plain(c['condition'])}"


def draw_sweep(files, path):
    """R^2 of the action, and top-1 on z_agg at fixed M_val, against M_tr (Fig. 8, left and middle).

    files: one probes.json a run. Each data set, method and condition has lines of its own.
    Where runs differ in neither, nor in M_tr (seeds), the line joins their means."""
    scores = defaultdict(lambda: defaultdict(list))     # {(setting, action): {M_tr: values}}
    top1 = defaultdict(lambda: defaultdict(list))       # {(setting, M_val): {M_tr: values}}
    for result in map(read_result, files):
        c = result["config"]
        setting = _setting(c)
        for row in result["rows"]:
            if row["probe"] == "action":
                scores[setting, row["predicts"]][c["views"]].append(row["value"])
        for M_val, row in by_length(result["rows"], "classify"):
            top1[setting, f"M_val {M_val}"][c["views"]].append(row["value"])
    refuse_nothing([*scores, *top1], "action or classify")
    settings = sorted({setting for setting, _ in [*scores, *top1]})

    height = 3.6 + 0.18 * max(len(scores), len(top1))      # a row of the legend for every line
    figure, axes = subplots(1, 2, figsize=(10, height))
    _plot_means(axes[0], scores, several_settings=len(settings) > 1)
    _plot_means(axes[1], top1, several_settings=len(settings) > 1)

    axes[0].set_ylabel("R\u00b2 of the relative action, from z")
    axes[1].set_ylabel("top-1 on z_agg, %")
    which = f": {settings[0]}" if len(settings) == 1 else ""
    figure.suptitle(f"Training length{which} (as Fig. 8, left and middle)", fontsize=11)
    return save(figure, path)


def _plot_means(axis, lines, several_settings):
    """A dot for every value, a line through the means.  lines: {(setting, what): {M_tr: values}}"""
    for i, ((setting, what), values) in enumerate(lines.items()):
        colour = CYCLE[i % len(CYCLE)]
        lengths = sorted(values)
        means = [sum(values[M_tr]) / len(values[M_tr]) for M_tr in lengths]
        label = f"{setting}: {plain(what)}" if several_settings else plain(what)
        axis.plot(lengths, means, color=colour, label=label)
        dots = [(M_tr, value) for M_tr in lengths for value in values[M_tr]]
        axis.plot(*zip(*dots), "o", color=colour)
    lengths = {M_tr for values in lines.values() for M_tr in values}
    axis.set(xlabel="observed views in training, M_tr", xticks=sorted(lengths))
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=5)


def draw_transfer(files, path):
    """Top-1 on another data set's classes (Fig. 15) against M_val, and against what it costs (B.6).

    files: one probes-transfer-*.json a line."""
    results = [read_result(file) for file in files]
    refuse_nothing(results, "transfer")
    height = 3.6 + 0.18 * len(results)
    figure, axes = subplots(1, 2, figsize=(10, height), sharey=True)
    for i, result in enumerate(results):
        colour = CYCLE[i % len(CYCLE)]
        measured = by_length(result["rows"], "transfer")
        refuse_nothing(measured, "transfer")
        lengths = [M for M, _ in measured]
        rows = [r for _, r in measured]
        costs = [r["gmac"] for r in rows]
        name = f"{plain(result['config']['name'])}, patches of {rows[0]['patch_size']} px"
        trained = [r["value"] for r in rows]
        untrained = [r.get("untrained") for r in rows]
        for axis, x in zip(axes, (lengths, costs)):
            axis.plot(x, trained, "-o", color=colour, label=name)
            if None not in untrained:                       # evaluate.py --no-untrained
                axis.plot(x, untrained, ":", color=colour, label=f"{name}, untrained")

    axes[0].set(xlabel="observed views M_val", ylabel="top-1 on z_agg, %")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[1].set(xlabel="multiply-adds an image, billions")
    for axis in axes:
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0])
    figure.suptitle(f"Transfer to {plain(result['dataset'])} (as Fig. 15)", fontsize=11)
    return save(figure, path)


def draw_scatter(points, path):
    """Top-1 against R^2 of the action, a panel for each of its parts (Fig. 1).

    points: [(name, source, top1, {part: r2})]. source: what the class is read from; top1 and r2:
    (mean, standard deviation or None). A part that never varies in the data, as hues may, has R^2 0
    in all of them and no panel."""
    refuse_nothing(points, "classify and action")
    parts = []
    for *_, scores in points:
        parts += [part for part, (mean, _) in scores.items() if mean != 0 and part not in parts]
    parts = parts or list(points[0][3])
    height = max(4.0, 1.2 + 0.36 * len(points))             # two lines of words a point
    figure, axes = subplots(1, len(parts), figsize=(3 + 3.2 * len(parts), height), sharey=True,
                            squeeze=False)
    for axis, part in zip(axes[0], parts):
        for i, (*_, top1, scores) in enumerate(points):
            if part in scores:
                axis.errorbar(scores[part][0], top1[0], xerr=scores[part][1], yerr=top1[1],
                              capsize=3, **_look(i))
        axis.set_xlabel(f"R\u00b2 of the relative {plain(part)}, from z")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("top-1 of the class, %")
    _name_points(axes[0, -1], points, parts[-1])
    figure.suptitle("Recognition against prediction of the action (as Fig. 1)", fontsize=11)
    return save(figure, path)


def _look(i):
    """Colour and marker of the i-th point; the first 48 all differ."""
    return dict(color=CYCLE[i % len(CYCLE)], marker="osD^vP"[i // len(CYCLE) % 6], linestyle="")


def _name_points(axis, points, part):
    """Names right of the axis, a line from each to its point.

    Evenly spaced in the order of the points' heights: no name covers another, whatever the points
    are, and few lines cross."""
    by_height = sorted(range(len(points)), key=lambda i: points[i][2][0])
    right = axis.get_xlim()[1]
    for rank, i in enumerate(by_height):
        name, source, top1, scores = points[i]
        x = scores[part][0] if part in scores else right
        y = (rank + 0.5) / len(points)                      # of the axis' height
        axis.annotate("", xy=(x, top1[0]), xytext=(1.05, y), textcoords="axes fraction",
                      annotation_clip=False, arrowprops=dict(
                          arrowstyle="-", color=_look(i)["color"], alpha=0.5, linewidth=0.8))
        axis.plot(1.05, y, transform=axis.transAxes, clip_on=False, **_look(i))
        axis.text(1.09, y, f"{plain(name)}\nclass from {plain(source)}", va="center", fontsize=8,
                  transform=axis.transAxes)


def refuse_nothing(found, probe):
    """Raises BadInput if no file has rows of this probe."""
    if not found:
        raise BadInput(f"no row of --probe {probe} to draw; give the JSON that evaluate.py writes")


def read_result(file):
    """What evaluate.py wrote.

    Raises: BadInput if the file holds anything else."""
    path = Path(file)
    if not path.is_file():
        raise BadInput(f"{path}: not found; expected the probes.json of a run")
    try:
        result = json.loads(path.read_text())
        whole = _whole(result)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError):
        whole = False                   # no JSON, or of another structure
    if not whole:
        raise BadInput(f"{path}: not what evaluate.py writes; give the probes.json of a run")
    return result


def _whole(result):
    """Whether all that is drawn is there, words and finite numbers.

    An error that it raises means that something is not there."""
    c = result["config"]
    words = [result.get("dataset", "")]
    words += [c[key] for key in ("dataset", "mode", "method", "condition", "name")]
    numbers = [c["views"]]
    for row in result["rows"]:
        words += [row[key] for key in WORDS]
        numbers += [row[key] for key in NUMBERS]
        numbers += [row[key] for key in NUMBERS_OR_NONE if row.get(key) is not None]
        if row["probe"] == "transfer":
            numbers += [row[key] for key in NUMBERS_OF_TRANSFER]
    for value in c.values():
        if not isinstance(value, (str, type(None))) and not abs(value) < math.inf:
            return False
    in_reach = [abs(number) < LARGEST for number in numbers]
    return all(in_reach) and all(isinstance(word, str) for word in words)
