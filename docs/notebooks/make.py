"""Runs the notebooks of this folder and stores them with their outputs: `python
docs/notebooks/make.py` (needs the extra `docs`).

The source of a notebook is the script of the same name, in jupytext's percent format.
"""

import base64
import io
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image


HERE = Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path != Path(__file__))


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook of a script, run from top to bottom; a cell that raises ends it with a
    `CellExecutionError`.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random by default
        cell.metadata.pop("execution", None)  # when it ran
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
        # progress bars and warnings of libraries are not what a cell says
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


def _smaller(png: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    for source in SOURCES:
        path = source.with_suffix(".ipynb")
        nbformat.write(executed(source), path)
        print(path, f"{path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
