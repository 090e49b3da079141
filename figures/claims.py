"""The figure of claims.py: for every claim what was compared, seed by seed, and the verdict.

    draw_claims(rows, path)     rows: those of claims.json

Checked in tests/test_claims.py.
"""
from figures.canvas import BLUE, GREEN, ORANGE, RED, legend_below, plain, save, subplots

COLOURS = {"holds": GREEN, "does not": RED, "undecided": "grey"}
KINDS = (("with", BLUE, "o"), ("without", ORANGE, "s"), ("untrained", "black", "|"))


def draw_claims(rows, path):
    """Two panels, top-1 and R^2, a line a claim; a dot a seed, its mean in full colour."""
    panels = [("top-1, %", [row for row in rows if row["unit"] == "top-1 %"]),
              ("R\u00b2", [row for row in rows if row["unit"] == "R2"])]
    panels = [(unit, mine) for unit, mine in panels if mine]
    lines = [len(mine) for _, mine in panels]
    figure, axes = subplots(len(panels), 1, figsize=(10, 1.5 + 0.52 * sum(lines)), squeeze=False,
                            height_ratios=lines)
    for axis, (unit, mine) in zip(axes[:, 0], panels):
        _draw_panel(axis, unit, mine)
    figure.suptitle("What the papers claim, measured here", fontsize=12)
    legend_below(figure, axes[0, 0])
    return save(figure, path)


def _draw_panel(axis, unit, rows):
    for y, row in enumerate(rows):
        ends = (row["with"], row["without"])
        axis.plot(ends, (y, y), color=COLOURS[row["verdict"]], linewidth=5, alpha=0.35, zorder=1)
        for key, colour, marker in KINDS:
            seeds = row["values"][key]
            name = {"with": "first named", "without": "second named"}.get(key, key)
            axis.plot(seeds, [y] * len(seeds), marker, color=colour, alpha=0.4, markersize=6)
            axis.plot([row[key]], [y], marker, color=colour, markersize=10, markeredgewidth=2,
                      label=name if y == 0 else None)
        axis.text(1.01, y, row["verdict"], transform=axis.get_yaxis_transform(), va="center",
                  color=COLOURS[row["verdict"]], fontsize=9)
    words = [f"{plain(row['measure'])}\n{' / '.join(map(plain, row['compared']))} "
             f"({plain(row['where'])})" for row in rows]
    axis.set(yticks=range(len(rows)), yticklabels=words, xlabel=unit, ylim=(len(rows) - 0.5, -0.5))
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
