"""README and docs keep up with the code: links lead somewhere, commands parse, flags exist, and no
page is long."""
import re
import shlex
from pathlib import Path

import pytest

import claims
import compare
import config as settings
import evaluate
from benchmarks import bench, probe_memory, smoke
from figures import regions

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 2200           # of a page of docs/

SCRIPTS = {"train.py": settings.from_command_line, "evaluate.py": evaluate.parse,
           "compare.py": compare.parse, "claims.py": claims.parse, "benchmarks.bench": bench.parse,
           "benchmarks.smoke": smoke.parse, "benchmarks.probe_memory": probe_memory.parse,
           "figures.regions": regions.parse}
COMMAND = re.compile(rf"(?:python|torchrun)\b.*? ({'|'.join(map(re.escape, SCRIPTS))})\b(.*)")
# What stands for something that the reader chooses. `...` stands for flags, or for none.
CHOSEN = {"--method METHOD": "--method equimod", "--method M": "--method sie", "$SEED": "0",
          "$M": "2", "...": ""}
OF_TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
               "--max-restarts"}
MEASURED = re.compile(r"(?m)^## Files\n.*", re.DOTALL)      # of results/: commands of their day


def name(page):
    return str(page.relative_to(ROOT))


def anchor(heading):
    """What GitHub calls a heading in a link."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return "#" + re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def code(text):
    """All that is set as code: spans, and the lines of blocks."""
    text = re.sub(r"\\\n *", " ", text)                                    # one command, two lines
    fenced = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
    lines = "".join(fenced.findall(text)).splitlines() + re.findall(r"(?m)^ {4,}(\S.*)$", text)
    spans = re.findall(r"`([^`]+)`", fenced.sub("", text))
    return [line.split("  #")[0].strip() for line in lines] + [" ".join(s.split()) for s in spans]


def commands(text):
    """(script, arguments) of every command of ours."""
    for span in code(text):
        for words, chosen in CHOSEN.items():
            span = span.replace(words, chosen)
        found = COMMAND.fullmatch(span.strip())
        if found:
            yield found[1], shlex.split(re.split(r" {3,}", found[2])[0])    # then comes a remark


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if heading:
            headings = re.findall(r"(?m)^#+ (.*)$", there.read_text())
            assert f"#{heading}" in map(anchor, headings), target


def test_what_docstrings_say_of_docs_is_there():
    # Not **/*.py, under which a virtual environment lies too.
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        for page in re.findall(r"\b(?:docs|results)/\w+\.md", path.read_text()):
            assert (ROOT / page).exists(), f"{path}: {page}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses(page):
    for script, arguments in commands(page.read_text()):
        SCRIPTS[script](arguments)


def test_commands_are_found():
    found = [script for page in PAGES for script, _ in commands(page.read_text())]
    assert set(found) == set(SCRIPTS) and found.count("evaluate.py") > 15


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_exists(page):
    known = {settings.flags.name_of(field) for field in settings.Config.__dataclass_fields__}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("benchmarks/*.py")]:
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    known |= {flag.replace("--", "--no-", 1) for flag in known} | OF_TORCHRUN | {"--help"}
    text = MEASURED.sub("", page.read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(code(text)))) <= known


@pytest.mark.parametrize("page", PAGES[2:], ids=name)
def test_a_page_is_short(page):
    assert len(page.read_text().split()) <= MOST_WORDS
