"""Run notebooks from a clean kernel and keep what they show, small enough for the repository.

`python notebooks/refresh.py` refreshes all of them, `python notebooks/refresh.py NAME...` some. Warnings on stderr and
progress bars are not kept, pictures lose size rather than content. With `--check`, which `make notebooks` gives,
notebooks only have to run, and to hold outputs that are small enough; nothing is written.
"""

import argparse
import asyncio
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

from fisherviz.support.files import write_whole

HERE = Path(__file__).parent
LARGEST = 300_000  # bytes of one notebook
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # sums in one order, and no fight for two cores
WIDTH, COLOURS = 900, 192  # of a kept picture
COVER = Image.Quantize.MAXCOVERAGE  # rare colours, such as those of a scale's top, count like frequent ones


async def run(path: Path) -> NotebookNode:
    """The notebook, executed in a kernel of its own with one thread."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    )
    await client.async_execute(env=os.environ | ONE_THREAD)
    return notebook


async def check(path: Path) -> None:
    """Run one notebook; what is kept of it must be complete and small."""
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    if any(cell.execution_count != place for place, cell in enumerate(code, 1)):
        raise ValueError(f"{path.name} does not hold the outputs of one whole run; refresh it.")
    require_small(path.name, path.read_bytes())
    await run(path)


async def refresh(path: Path) -> None:
    """Execute one notebook and write it back with small outputs."""
    notebook = await run(path)
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
    text = nbformat.writes(notebook) + "\n"
    require_small(path.name, text.encode())
    write_whole(path, text)


def require_small(name: str, content: bytes) -> None:
    """Refuse a notebook that is too large for the repository."""
    if len(content) > LARGEST:
        raise ValueError(f"{name} has {len(content):,} bytes of at most {LARGEST:,}; show less or lower WIDTH.")


def shrunk(encoded: str) -> str:
    """A base64 PNG with few colours and at most `WIDTH` pixels across."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.quantize(COLOURS, method=COVER, dither=Image.Dither.NONE).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode() + "\n"


async def work(paths: list[Path], only_check: bool) -> list[str]:
    """Refresh or check notebooks, two at a time; what went wrong, a text per notebook."""
    turns, failed = asyncio.Semaphore(2), list[str]()

    async def one(path: Path) -> None:
        async with turns:
            began = time.perf_counter()
            try:
                await (check if only_check else refresh)(path)
            except (CellExecutionError, DeadKernelError, ValueError) as error:
                failed.append(f"{path.name}: {error}")
            print(f"{path.name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size:,} bytes", flush=True)

    await asyncio.gather(*map(one, paths))
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="which of them; all without any")
    parser.add_argument("--check", action="store_true", help="only run them, and write nothing")
    given = parser.parse_args()
    if found := asyncio.run(work(given.notebooks or sorted(HERE.glob("*.ipynb")), given.check)):
        sys.exit("\n".join(found))
