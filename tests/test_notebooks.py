"""notebooks/: kept without what they printed, so that a diff shows what was written. .ci/run runs them."""

import json
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert all(not cell["metadata"] for cell in cells)
