"""The manual's page on Hugging Face models keeps its word (an optional job: transformers)."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs/use/hugging-face.md"


def test_the_pages_code_prints_what_the_page_shows():
    pytest.importorskip("transformers")
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, PAGE.name, "exec"), {})
    said, told = ([line.split() for line in part.splitlines()] for part in (printed.getvalue(), shown))
    assert said[6:] == told[6:]
    measured, written = ({name: float(value) for name, value in lines[2:6]} for lines in (said, told))
    assert measured == pytest.approx(written, rel=0.02)  # of a float32 network
