"""Every test can fail: it asserts something, expects an exception or a warning, or calls a helper that does.

Read from the source, without running anything. What a test asserts has to depend on something, too.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXPECTING = {"raises", "warns", "deprecated_call", "fail"}
"""What of pytest makes a test fail."""


@cache
def modules():
    """Of the tests and their helpers, parsed, by dotted name."""
    paths = sorted(TESTS.rglob("*.py"))
    return {
        ".".join(("tests", *path.relative_to(TESTS).with_suffix("").parts)): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def functions(tree):
    """Of a module, by name, methods too."""
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def called(node):
    """The names and attributes that are called, or handed to somebody who may call them."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            yield inner.func.id if isinstance(inner.func, ast.Name) else getattr(inner.func, "attr", "")
            yield from (argument.id for argument in inner.args if isinstance(argument, ast.Name))


def is_constant(node):
    """Whether an expression has one value whatever the package does."""
    inside = [*ast.walk(node)]
    if any(isinstance(inner, ast.Call | ast.Await) for inner in inside):
        return False
    if isinstance(node, ast.Compare) and len({ast.dump(side) for side in (node.left, *node.comparators)}) == 1:
        return True
    return not any(isinstance(inner, ast.Name) for inner in inside)


def asserts(node):
    """Whether a function itself asserts something that can be false, or expects an exception."""
    return any(
        (isinstance(inner, ast.Assert) and not is_constant(inner.test))
        or (isinstance(inner, ast.Attribute) and inner.attr in EXPECTING)
        or (isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and "Assert" in ast.dump(inner.exc.func))
        for inner in ast.walk(node)
    ) or any(name.startswith("assert_") for name in called(node))


def silent(trees):
    """Tests that cannot fail, as (module, name); helpers are followed by their names."""
    named = [(module, name, node) for module, tree in trees.items() for name, node in functions(tree).items()]
    loud = {(module, name) for module, name, node in named if asserts(node)}
    quiet = {(module, name): {*called(node)} for module, name, node in named if (module, name) not in loud}
    heard = {name for _, name in loud}
    while more := {name for (_, name), calls in quiet.items() if name not in heard and heard & calls}:
        heard |= more
    return [each for each, calls in quiet.items() if each[1].startswith("test_") and not heard & calls]


def test_every_test_asserts_or_expects_something():
    assert silent(modules()) == []


def test_no_assertion_is_true_whatever_happens():
    found = [
        (module, node.lineno)
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and is_constant(node.test)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "can_fail"),
    [
        ("def test_a():\n    f()", False),
        ("def test_a():\n    assert f()", True),
        ("def test_a():\n    assert 1 == 1", False),
        ("def test_a():\n    x = f()\n    assert x == x", False),
        ("def test_a():\n    assert (f(), 'words')", True),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", True),
        ("def check(x):\n    assert x\ndef test_a():\n    check(f())", True),
        ("def check(x):\n    print(x)\ndef test_a():\n    check(f())", False),
        ("def check(x):\n    assert x\ndef every(x):\n    check(x)\ndef test_a():\n    every(f())", True),
        ("def test_a():\n    torch.testing.assert_close(f(), g())", True),
    ],
)
def test_a_test_without_an_assertion_is_found(source, can_fail):
    assert silent({"tests.planted": ast.parse(source)}) == ([] if can_fail else [("tests.planted", "test_a")])
