"""tutorial.ipynb runs from top to bottom, and its saved outputs are what a reader should see.

To save new outputs after a change of the notebook or of the code:  python tests/test_tutorial.py
"""
import base64
import io
import json
import os
import re
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"
QUIET = ("import os", "difference =")           # how the cells begin that have nothing to show
LARGEST = 1.5e6                                 # bytes
FOLDERS = r"/(home|root|tmp|mnt|opt|usr|var|Users)/|[A-Z]:\\"

ASK = """
import json
print(json.dumps(dict(
    by_hand=loss.item(), model=loss_of_model.item(), tokens=list(tokens.shape), losses=losses,
    right=loss_right, wrong_actions=loss_wrong_actions, wrong_views=loss_wrong_views,
    own_place=share_below(nearest), other_place=share_below(nearest.roll(1, 0)),
    position=[position_r2[head] for head in heads], knn=class_knn["trained"],
    patches=[int((rank == k).sum()) for k in range(1, N + 1)])))
"""


def execute(notebook, folder):
    """Run every cell in a kernel that works in `folder`, and leave nothing elsewhere.

    Raises: CellExecutionError."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        os.environ[name] = str(folder / ".jupyter")
    try:
        client = NotebookClient(notebook, kernel_name="python3", timeout=900, record_timing=False,
                                coalesce_streams=True, resources=dict(metadata=dict(path=folder)))
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """PNG images among the outputs, as arrays."""
    found = []
    for output in [output for cell in code_cells(notebook) for output in cell.outputs]:
        if "image/png" in output.get("data", {}):
            png = io.BytesIO(base64.b64decode(output.data["image/png"]))
            found.append(np.asarray(Image.open(png).convert("RGB")))
    return found


def kinds(notebook):
    """What each code cell puts out, in order."""
    def kind(output):
        return output.get("name", output.output_type)
    return [list(map(kind, cell.outputs)) for cell in code_cells(notebook)]


@pytest.fixture
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_and_finds_what_it_says(saved, tmp_path):
    fresh = nbformat.from_dict(json.loads(json.dumps(saved)))
    fresh.cells.append(nbformat.v4.new_code_cell(ASK))
    execute(fresh, tmp_path)
    said = json.loads(code_cells(fresh)[-1].outputs[0].text)

    assert said["by_hand"] == said["model"]
    assert said["tokens"] == [64, 1 + 4, 128 + 32]
    assert np.mean(said["losses"][-50:]) < 0.7 * np.mean(said["losses"][:10])
    assert said["right"] + 0.1 < min(said["wrong_actions"], said["wrong_views"])
    assert said["own_place"] > 65 and abs(said["other_place"] - 50) < 10
    untrained, trained, few = said["position"]
    assert few < 0 < untrained and untrained + 0.05 < trained < 1
    assert 100 / 16 < said["knn"]["z_agg M=1"] < said["knn"]["z_agg M=6"]
    assert sum(said["patches"]) == 12 * 12 and said["patches"][0] > 0

    assert kinds(saved) == kinds(fresh)[:-1], "the saved outputs are of another notebook"
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", ".jupyter"}


def test_saved_outputs_are_complete(saved):
    cells = code_cells(saved)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell.source for cell in cells if not cell.outputs]
    assert len(silent) == len(QUIET) and all(map(str.startswith, silent, QUIET))
    assert set(sum(kinds(saved), [])) == {"stdout", "display_data"}
    shown = pictures(saved)
    assert len(shown) == 7
    assert all(picture.std() > 10 and min(picture.shape[:2]) > 150 for picture in shown)


def test_saved_file_is_small_and_of_no_machine(saved):
    text = NOTEBOOK.read_text()
    assert len(text) < LARGEST
    printed = [output.get("text", "") for cell in code_cells(saved) for output in cell.outputs]
    words = "\n".join([cell.source for cell in saved.cells] + printed)
    assert not re.search(FOLDERS, words) and str(ROOT) not in text
    assert not re.search("warning|error|it/s", "\n".join(printed), re.IGNORECASE)
    assert saved.metadata.kernelspec.name == "python3"


def test_links_lead_somewhere(saved):
    prose = "\n".join(cell.source for cell in saved.cells if cell.cell_type == "markdown")
    files = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith("http")]
    assert len(files) > 10 and all((ROOT / file).exists() for file in files)
    folders = re.findall(r"`(\w+)/`", prose)
    assert {"plumbing", "sources", "benchmarks"} <= set(folders)


def test_cells_are_narrow_enough_to_read(saved):
    source = "\n".join(cell.source for cell in code_cells(saved))
    assert max(map(len, source.splitlines())) <= 100


def save_outputs():
    """Execute the notebook and write it back with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    notebook.metadata.language_info = dict(name="python")       # without this machine's version
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    save_outputs()
