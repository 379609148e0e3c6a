"""Run notebooks from a clean kernel and keep what they show, small enough for the repository.

`python notebooks/refresh.py` refreshes all of them. Warnings on stderr and progress bars are not kept, pictures lose
size rather than content. `make notebooks` only checks that they run.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from fisherviz.support.files import write_whole

HERE = Path(__file__).parent
LARGEST = 300_000  # bytes of one notebook
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars
WIDTH, COLOURS = 900, 192  # of a kept picture
COVER = Image.Quantize.MAXCOVERAGE  # rare colours, such as those of a scale's top, count like frequent ones


def refresh(path: Path) -> int:
    """Execute one notebook and write it back with small outputs; return its size in bytes."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            kept = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = [out for out in kept if WIDGET not in out.get("data", {})]
            for out in cell.outputs:
                if "image/png" in out.get("data", {}):
                    out.data["image/png"] = shrunk(out.data["image/png"])
                    out.metadata.pop("image/png", None)
    text = nbformat.writes(notebook)
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{path.name} would have {len(text.encode()):,} bytes; show less or lower WIDTH.")
    write_whole(path, text + "\n")
    return len(text.encode())


def shrunk(encoded: str) -> str:
    """A base64 PNG with few colours and at most `WIDTH` pixels across."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.quantize(COLOURS, method=COVER, dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode() + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, HERE.glob("*.ipynb"))):
        print(f"{name}: {refresh(Path(name)):,} bytes")
