"""YAML and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.trust.hostile_files.case import CANARY, Case, beside, holding


def yaml_texts() -> Iterator[Case]:
    """Configurations."""
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(97 + k)}: &{chr(97 + k)} [{', '.join(['*' + chr(96 + k)] * 9)}]\n" for k in range(1, 12)
    )
    tag = "tag:yaml.org,2002:python/"
    texts = {
        "python/object/apply": f"dataset: !!python/object/apply:os.system ['touch {CANARY}']",
        "python/object/new": f"dataset: !!python/object/new:os.system ['touch {CANARY}']",
        "python/object": "dataset: !!python/object:subprocess.Popen {}",
        "python/name": "dataset: !!python/name:os.system",
        "python/module": "dataset: !!python/module:antigravity",
        "python/tuple": "dataset: !!python/tuple [1]",
        "a verbatim tag": f"dataset: !<{tag}object/apply:os.system> ['touch {CANARY}']",
        "a tag by a directive": f"%TAG !e! {tag}\n---\ndataset: !e!object/apply:os.system ['touch {CANARY}']",
        "a tag of one's own": "dataset: !exec 'x'",
        "a billion laughs in options": "model_options:\n" + "".join("  " + x + "\n" for x in laughs.splitlines()),
        "a billion laughs": laughs,
        "a list that holds itself": "monitor_methods: &a [*a]",
        "a mapping that holds itself": "model_options: &a {x: *a}",
        "lists 100,000 deep": "model_options: " + "[" * 100_000,
        "lists 100,000 deep and closed": "model_options: " + "[" * 100_000 + "]" * 100_000,
        "mappings 10,000 deep": "model_options: " + "{a: " * 10_000 + "1" + "}" * 10_000,
        "blocks 2,000 deep": "".join(" " * k + "a:\n" for k in range(700)),
        "questions 10,000 deep": "? " * 10_000,
        "dashes 10,000 deep": "- " * 10_000,
        "a merge of a billion": "model_options:\n  a: &a {x: 1}\n"
        + "".join(f"  {chr(98 + k)}: &{chr(98 + k)} {{<<: [*{chr(97 + k)}, *{chr(97 + k)}]}}\n" for k in range(20))
        + "seed: -1\n",
        "an integer of 5,000 digits": "seed: " + "9" * 5000,
        "an integer of 100,000 hexadecimal digits": "seed: 0x" + "f" * 100_000,
        "a sexagesimal integer": "seed: " + ":".join(["1"] * 3000),
        "a date that is none": "dataset: 2026-99-99",
        "bytes that are none": "dataset: !!binary '*'",
        "a float that is none": "holdout: .nan",
        "infinity": "holdout: .inf",
        "a key twice": "seed: 1\nseed: 2",
        "a list as a key": "? [a]\n: 1",
        "a set": "!!set {seed, epochs}",
        "a megabyte": "# " + "x" * 2**20,
        "a control character": "dataset: \x1b[2J",
        "bytes that are no text": b"dataset: \xff\xfe\xfa",
        "two documents": "seed: 1\n---\nseed: 2",
        "a list": "- 1",
        "a text": "x",
        "an alias of nothing": "seed: *a",
        "a module of Python as network": f"model: os:system\nmodel_options: {{command: touch {CANARY}}}",
        "a function of Python as data": f"dataset: subprocess:getoutput\nmodel_options: {{cmd: touch {CANARY}}}",
        "a name inside a module": "model: torch.hub:os.system\nmodel_options: {command: touch executed}",
        "a class of Python as optimizer": f"optimizer: os:system\noptimizer_options: {{command: touch {CANARY}}}",
    }
    for name, text in texts.items():
        content = text.encode() if isinstance(text, str) else text
        yield Case("YAML", name, ("config", "sweep config", "run", "resume config"), holding("config.yaml", content))
    for flag in ("-O", "-M", "--over"):
        for name in (
            "python/object/apply",
            "a list that holds itself",
            "an integer of 5,000 digits",
            "a date that is none",
        ):
            value = str(texts[name]).partition(": ")[2]
            yield Case(
                "YAML", f"{name} after {flag}", (f"flag {flag}",), holding("value", f"lr={value}".encode()), named=flag
            )


def json_texts() -> Iterator[Case]:
    """The facts of comparisons and runs, and what a report says of itself."""
    texts: dict[str, str | bytes] = {
        "lists 100,000 deep": "[" * 100_000 + "]" * 100_000,
        "mappings 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "an integer of 5,000 digits": '{"format": ' + "9" * 5000 + "}",
        "NaN": '{"format": NaN}',
        "infinity": '{"format": Infinity}',
        "a number beyond all": '{"format": 1e999, "sha256": {}, "meta": {}}',
        "a format in words": '{"format": "2", "sha256": {}, "meta": {}}',
        "sums as a list": '{"format": 2, "sha256": [], "meta": {}}',
        "facts as a list": "[1, 2]",
        "facts as a text": '"x"',
        "nothing": "",
        "half a surrogate": '{"format": "\\ud800"}',
        "bytes that are no text": b'{"\xff": 1}',
        "a byte order mark": b"\xef\xbb\xbf{}",
        "code": "__import__('os').system('touch executed')",
    }
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        for file, doors in (
            ("comparison.json", ("comparison", "against")),
            ("report.json", ("against",)),
            ("summary.json", ("run",)),
            ("metrics.jsonl", ("run",)),
        ):
            line = content + (b"\n" if file == "metrics.jsonl" else b"")
            if (file == "metrics.jsonl" and not content) or (file == "report.json" and b'"format": "2"' in content):
                continue
            yield Case("JSON", f"{name} as {file}", doors, beside(file, line))
    for name, meta in {
        "layers as numbers": {"layers": [1, 2]},
        "layers without names": {"layers": [{}]},
        "notes as a number": {"notes": 7},
        "settings as a list": {"settings": [1]},
        "parameters in words": {"parameters": "many"},
    }.items():
        yield Case("JSON", f"meta with {name}", ("page",), _with_meta(meta))
    for folder in ("../..", "/etc", "..", "a/../../b"):
        text = json.dumps({"sections": [{"title": "x", "folder": folder}], "files": ["index.html"]})
        yield Case("JSON", f"a section in {folder}", ("against",), beside("report.json", text.encode()))


def _with_meta(meta: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "comparison.json"
        facts = json.loads(path.read_text())
        facts.pop("sealed", None)
        path.write_text(json.dumps({**facts, "meta": meta}))
        return folder

    return write
