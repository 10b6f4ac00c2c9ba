"""mnist.py, predict.py and report.py in a notebook: its cells run in a kernel of Jupyter."""

from pathlib import Path

import mnist

import nbclient
import nbformat
import pytest

ROOT = Path(mnist.__file__).parent
CELLS = {
    "run": f'%run "{ROOT}/mnist.py" --dry-run',
    "import": f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mnist; from tools import predict, report",
    "bar": "mnist.main(['--dry-run'])['test_accuracy']",
    "thread": "import threading; t = threading.Thread(target=mnist.main, args=(['--dry-run'],)); t.start(); t.join()",
    "predict": f"predict.main([{str(ROOT / 'assets' / 'seven.png')!r}])[0]['digit']",
    "report": "report.main(['--out', 'report.pdf'])",
    "defaults": "mnist.fit = lambda *_: [{'test_loss': 9, 'test_accuracy': 99}]; mnist.main()['settings']['epochs']",
    "error": "mnist.main(['--epochs', '0'])",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each of the CELLS gives, as text, one after the other in one kernel."""
    mnist.load_mnist(mnist.DATA_DIR)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS.values()])
    resources = {"metadata": {"path": tmp_path_factory.mktemp("notebook")}}
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True, resources=resources).execute()
    return {name: str(cell["outputs"]) for name, cell in zip(CELLS, notebook.cells, strict=True)}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("run", "Trained in"),
        ("bar", "%|"),
        ("thread", "Trained in"),
        ("predict", "seven.png: 7"),
        ("report", "Wrote report.pdf"),
        ("defaults", "'text/plain': '3'"),
    ],
)
def test_cell(cell, expected, outputs):
    assert "Traceback" not in outputs[cell]
    assert "'output_type': 'error'" not in outputs[cell]
    assert expected in outputs[cell]


def test_no_widgets_are_asked_for(outputs):
    assert "IProgress" not in str(outputs)


def test_wrong_usage_names_the_option(outputs):
    assert "argument --epochs: 0 is not from 1 to 1000000" in outputs["error"]
