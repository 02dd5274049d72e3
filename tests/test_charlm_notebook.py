"""docs/charlm.ipynb runs from the first cell to the last, here on small settings."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "charlm.ipynb"
SMALL = {"characters_used": 1500, "epochs": 1, "hidden": 17, "repeats": 2}


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    names = {line.split(" = ")[0] for line in parameters.source.splitlines()}
    assert names == set(SMALL)
    parameters.source = "\n".join(f"{name} = {value}" for name, value in SMALL.items())
    # Sizes this small gain nothing from a second thread, and lose much on a busy machine.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CHARLM_DATA", raising=False)
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})  # fmt: skip
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code"
               for output in cell.outputs]  # fmt: skip
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    text = "".join(output.get("text", "") for output in outputs)
    assert "gives the same" in text and "Epoch 1/1, Loss: " in text and "wrote letter.png" in text


def test_the_notebook_is_committed_with_small_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 200_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    words = NOTEBOOK.read_text(encoding="utf-8")
    assert "/root/" not in words and "/home/" not in words, "a path of one machine"
