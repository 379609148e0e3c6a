"""Files of others: nothing is run, sizes are held against bytes, whatever is wrong is a ValueError."""

import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import random
import zipfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import ParquetFile

from benchmarks.trust.injection import forked
from fisherviz.support import footer
from fisherviz.support.opening import UNPACKED, arrays, decompressed, most, table
from fisherviz.support.pickles import tensors
from fisherviz.support.plain import DEEPEST, from_json, from_yaml


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "nested": [{"step": 3, "lr": 1e-3, "name": "x", "flag": True, "none": None}, (1, 2)],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "empty": torch.zeros(0),
    "counts": {2**40: torch.Size([2, 3])},
}


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_of_weights_and_trainers_comes_back(zipped):
    shared = torch.arange(8.0)
    state = STATE | {"view": shared[2:4], "same": shared, "strided": shared.reshape(2, 4).T}
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state |= {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    found = tensors(saved(state, _use_new_zipfile_serialization=zipped))
    for name in ("a", "half", "parameter", "view", "same", "strided", "empty"):
        assert torch.equal(found[name], state[name])
    assert found["nested"] == STATE["nested"]
    assert found["counts"] == STATE["counts"]
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state[net.weight]["exp_avg"])
    assert found["view"].untyped_storage().data_ptr() == found["same"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "function", [(exec, "1"), (bytearray, 2**36), (torch.Tensor, 2**34), (torch.UntypedStorage, 2**36), (eval, "1")]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_calls_nothing_that_runs_or_takes_memory(function, zipped):
    with pytest.raises(ValueError, match=r"it holds .*, which weights have no use for"):
        tensors(saved({"a": Calls(*function)}, _use_new_zipfile_serialization=zipped))


def test_a_storage_is_no_larger_than_its_place_in_the_file():
    good = saved({"a": torch.arange(4.0)})
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name].replace(b"K\x04tq", b"J\x00\x00\x00\x10tq")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for each, content in entries.items():
            archive.writestr(each, content)
    with pytest.raises(ValueError, match="claims 268,435,456 numbers where 16 bytes are"):
        tensors(stream.getvalue())


def test_a_compressed_archive_of_tensors_is_refused_before_it_unfolds():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(2**20))
    with pytest.raises(ValueError, match="compressed"):
        tensors(stream.getvalue())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_changed_bytes_of_tensors_are_a_value_error_or_are_read(data, zipped):
    content = bytearray(saved(STATE, _use_new_zipfile_serialization=zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        tensors(bytes(content))


def npz(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
@pytest.mark.parametrize("order", "CF")
def test_arrays_come_back(shape, order):
    array = np.asarray(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), order=order)
    found = arrays(npz(a=npy(array), b=npy(array.astype(bool))))
    assert found["a"].dtype == np.float32
    assert np.array_equal(found["a"], array)
    assert np.array_equal(found["b"], array.astype(bool))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz(a=npy(np.array([Calls(exec, "1")], dtype=object), allow_pickle=True)), "object, not numbers"),
        (npz(a=npy(np.zeros(4)).replace(b"(4,)", b"(9,)")), "does not fit"),
        (npz(a=npy(np.zeros(4)).replace(b"(4,)", b"(-4,)")), "does not fit"),
        (npz(a=npy(np.array(["x"]))), "not numbers"),
        (npz(a=b"hello"), "magic string"),
        (b"hello", "not a zip file"),
        (npz(a=npy(np.zeros(2**23))[:80] + bytes(most(0) + 1)), "would unfold to"),
    ],
)
def test_what_is_no_archive_of_numbers_is_told(content, message):
    with pytest.raises(ValueError, match=message):
        arrays(content)


FRAME = pd.DataFrame({"word": ["a", "b", "a"], "value": [1.0, 2.0, np.inf]})


def parquet(frame, **options):
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False, **options)
    return stream.getvalue()


def test_a_table_comes_back():
    found = table(parquet(FRAME), ["word"], ["value", "absent"])
    assert list(found["word"]) == list(FRAME["word"])
    assert list(found["value"]) == list(FRAME["value"])
    assert table(parquet(FRAME[:0].astype({"word": str})), ["word"], ["value"]).empty


@pytest.mark.parametrize("options", [{}, {"compression": None}, {"compression": "gzip"}, {"row_group_size": 2}])
def test_a_footer_says_what_pyarrow_reads_in_it(options):
    content = parquet(pd.concat([FRAME] * 40).assign(more=np.arange(120.0), whole=3, flag=True), **options)
    groups = ParquetFile(io.BytesIO(content)).metadata
    columns = [groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(groups.num_columns)]
    assert footer.parts(content) == [
        (c.compression, c.total_compressed_size, c.total_uncompressed_size) for c in columns
    ]


@pytest.mark.parametrize("nested", [b"\x19" * 5000, b"\x1c" * 5000, b"\x19" + b"\x1c" * 5000])
def test_a_footer_of_lists_and_structures_in_one_another_is_damaged(nested):
    with pytest.raises(ValueError, match="its footer is damaged"):
        footer.parts(footer.MARK + nested + len(nested).to_bytes(4, "little") + footer.MARK)


def flipped(seeds):
    """How a good table opens in which bits of the footer are flipped."""
    good, ends = parquet(FRAME), Counter()
    length = int.from_bytes(good[-8:-4], "little")
    for seed in seeds:
        content, draw = bytearray(good), random.Random(seed)
        for _ in range(draw.choice((1, 1, 1, 2))):
            content[draw.randrange(len(good) - 8 - length, len(good) - 8)] ^= 1 << draw.randrange(8)
        try:
            table(bytes(content), ["word"], ["value"])
            ends["taken"] += 1
        except ValueError:
            ends["refused"] += 1
    return ends


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what ends a process is tried in a fork")
def test_no_footer_ends_the_process():
    """pyarrow does, asked for a column of some."""
    end = forked(lambda: flipped(range(1000)))
    assert end.how == "done", end
    assert sum(end.found.values()) == 1000
    assert end.found["refused"] > 400


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (FRAME, {"compression": "zstd"}, "compressed by ZSTD"),
        (FRAME.assign(word=[1, 2, 3]), {}, "not words"),
        (FRAME.assign(value=["1", "2", "3"]), {}, "not numbers"),
        (FRAME.rename(columns={"word": "other"}), {}, "word"),
        (pd.DataFrame({"word": ["a"] * 6_000_000, "value": 0.0}), {}, "would unfold to"),
        (pd.DataFrame({"word": ["x" * 2**17] * 600, "value": 0.0}), {}, "would unfold to"),
    ],
)
def test_what_is_no_table_is_told(frame, options, message):
    with pytest.raises(ValueError, match=message):
        table(parquet(frame, **options), ["word"], ["value"])


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_compressed_file_unfolds_to_what_a_data_set_has_and_no_more(tmp_path, suffix):
    path, pack = tmp_path / f"a.{suffix}", gzip.compress if suffix == "gz" else lzma.compress
    path.write_bytes(pack(b"hello"))
    assert decompressed(path) == b"hello"
    for content in (pack(b"hello")[:-5], b"hello", pack(b"hello") + b"more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"gzip|xz|ended|end|Input"):
            decompressed(path)


@pytest.mark.soak
@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_bomb_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((gzip.compress if suffix == "gz" else lzma.compress)(bytes(UNPACKED + 1)))
    with pytest.raises(ValueError, match="unfolds to more than"):
        decompressed(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: &x [*x]", "alias"),
        ("[" * (DEEPEST + 1), "deep"),
        ("- " * 10_000, "deep"),
        ("a: 1\na: 2", "comes twice"),
        ("a: " + "9" * 5000, "limit"),
        ("a: 0x" + "f" * 17, "64 bits"),
        ("a: 2026-99-99", "month"),
        ("# " + "x" * 2**20, "characters"),
        ("a: \x1b", "special characters"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_yaml_is_plain_values_of_the_size_that_it_has(text, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        (b'{"\xff": 1}', "decode"),
        ("", "Expecting value"),
    ],
)
def test_json_is_plain_values(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text)


ONE = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]))
)  # fmt: skip


@given(
    st.recursive(ONE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3))
)
@settings(max_examples=60, deadline=None)
def test_plain_values_come_back_from_what_is_written(value):
    assert from_yaml(yaml.safe_dump(value)) == value
    assert from_json(json.dumps(value)) == value
