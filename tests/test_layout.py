"""The house stays in order: few files at the root, drawers that depend on nothing above them, no
circles."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DRAWERS = ("plumbing", "sources", "figures", "dense", "benchmarks")
NAMED = "encoder aggregator predictor datasets saccades regions train evaluate".split()
ROOT_LIMIT = 22


def module_name(path):
    """plumbing/runs.py -> plumbing.runs"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {
    module_name(p): p
    for p in [*ROOT.glob("*.py"), *(p for d in DRAWERS for p in (ROOT / d).glob("*.py"))]
}


def imports(module):
    """The project's modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys() - {*DRAWERS, *(f"{d}.__init__" for d in DRAWERS)}


def drawer(module):
    return module.split(".")[0] if "." in module else "root"


def test_the_root_holds_what_the_papers_talk_about():
    at_root = {module for module in FILES if drawer(module) == "root"}
    assert set(NAMED) <= at_root
    assert len(at_root) <= ROOT_LIMIT, "too many at the root: a fork may raise ROOT_LIMIT"


@pytest.mark.parametrize("name", DRAWERS)
def test_a_drawer_says_in_one_sentence_what_is_not_in_it(name):
    text = (ROOT / name / "__init__.py").read_text()
    assert text.startswith('"""Nothing of the papers') and text.count("\n") <= 3
    assert not [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_there_is_no_circle():
    """Take away modules that import nothing that is left, until nothing is left."""
    left = {module: imports(module) for module in FILES}
    while left:
        ground = {module for module, needs in left.items() if not needs & left.keys()}
        assert ground, f"a circle among {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in ground}


@pytest.mark.parametrize("module", [m for m in FILES if "." in m])
def test_drawers_look_only_down(module):
    """plumbing knows nothing of JEPA; sources know images; figures may draw anything; dense
    tasks use all but the scripts that call them; nobody but a user opens benchmarks."""
    allowed = {"plumbing": {"plumbing"}, "sources": {"plumbing", "sources"}}
    if drawer(module) in allowed:
        above = {m for m in imports(module) if drawer(m) not in allowed[drawer(module)]}
        assert above <= ({"images"} if drawer(module) == "sources" else set())
    elif drawer(module) == "dense":
        assert not imports(module) & {"evaluate", "train", "compare", "claims"}
    elif drawer(module) == "benchmarks":
        assert not [m for m in FILES if drawer(m) != "benchmarks" and module in imports(m)]


def test_the_loop_fits_a_screen_and_speaks_of_learning_only():
    source = (ROOT / "train.py").read_text()
    assert source.count("\n") < 200
    loop = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    assert loop.end_lineno - loop.lineno + 1 < 35
    words = ast.get_source_segment(source, loop).lower()
    assert not [w for w in ("rank", "signal", "meter", "checkpoint", "probe") if w in words]


def test_readme_is_a_page():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 130 and len(text.split()) <= 1300
