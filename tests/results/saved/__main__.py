"""Add what this version saves: `python -m tests.results.saved`."""

import json
import shutil
import tempfile
from pathlib import Path

import fisherviz
from tests.results.saved import EXPECTED, HERE, NUMBERS, write

target = HERE / fisherviz.__version__
if target.exists():
    raise SystemExit(f"{target} is there: what a version saved is never written again.")
write(target)
with tempfile.TemporaryDirectory() as folder:
    copy = shutil.copytree(target, f"{folder}/saved")
    found = {name: numbers(Path(copy)) for name, numbers in NUMBERS.items()}
(target / EXPECTED).write_text(json.dumps(found) + "\n")
for path in target.rglob(".lock"):
    path.unlink()
print(f"Wrote {target}; commit it.")
