"""A sealed text with any bit flipped, or cut anywhere, is refused, or read as what it was."""

import json

import pytest
import yaml

from fisherviz.support.checksums import opened_json, opened_text, sealed_json, sealed_text

FACTS = (
    {"a": 1},
    {"loss": 0.25, "kind": "step", "seal it": [1e-3, None], "é": {"b": "0123456789abcdef"}},
    {"last": "0123456789abcdef"},
)


def damaged(content):
    """All that one flipped bit, or a cut, can make of it."""
    for place in range(len(content)):
        yield content[:place]
        for bit in range(8):
            yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("facts", FACTS)
def test_damaged_json_is_refused_or_reads_the_same(facts, indent):
    text = sealed_json(facts, indent) + "\n"
    assert opened_json(text) == facts
    assert list(json.loads(text)) == [*facts, "seal"]
    for content in damaged(text.encode()):
        try:
            found = opened_json(content.decode())
        except ValueError:
            continue
        assert found == facts


@pytest.mark.parametrize("facts", FACTS)
def test_a_damaged_yaml_file_is_refused(facts):
    lines = yaml.safe_dump(facts)
    text = sealed_text(lines)
    assert opened_text(text) == lines
    assert yaml.safe_load(text) == facts
    for content in damaged(text.encode()):
        with pytest.raises(ValueError, match=r"checksum|codec"):
            opened_text(content.decode())


def test_what_older_releases_wrote_is_taken_as_it_is():
    assert opened_json('{"a": 1, "data": {"notes": []}}\n') == {"a": 1, "data": {"notes": []}}
    assert opened_text("epochs: 2\nout: runs/a\n") == "epochs: 2\nout: runs/a\n"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_sealed(number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed_json({"a": number})
