"""Files whole or absent: what is left by who was killed, links that lead away, and writers at once."""

import os
import time
from multiprocessing import get_context

import pytest

from fisherviz.support import files

posix = pytest.mark.skipif(os.name != "posix", reason="links and locks as Unix has them")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_killed_writers_left_goes_with_the_next_writing(tmp_path):
    stray = tmp_path / ".page.html-0123456789ab"
    others = [tmp_path / ".page.html-mine", tmp_path / ".page.htm-0123456789ab"]
    for path in (stray, *others):
        path.write_text("half")
    files.write_whole(tmp_path / "page.html", "whole")
    assert not stray.exists()
    assert all(path.exists() for path in others)


@posix
def test_what_another_process_is_writing_is_left_to_it(tmp_path):
    theirs = tmp_path / ".page.html-0123456789ab"
    stream = files._begun(theirs)
    files.write_whole(tmp_path / "page.html", "whole")
    assert theirs.exists()
    stream.close()
    files.write_whole(tmp_path / "page.html", "again")
    assert list(contents(tmp_path)) == ["page.html"]


@posix
def test_ctrl_c_at_the_first_moment_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(stream, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "taken", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "page.html", "whole")
    assert not os.listdir(tmp_path)


def test_files_go_with_the_commit_that_drops_them(tmp_path):
    files.write_together(tmp_path, {"a": "1", "p/b": "1", "p/c": "1"})
    with files.replacing(tmp_path):
        files.commit(tmp_path, {"a": "2"}, remove=["p/b", "gone", "a"])
    assert contents(tmp_path) == {"a": "2", "p/c": "1"}


def test_a_commit_that_was_interrupted_is_finished_with_what_it_drops(tmp_path, monkeypatch):
    files.write_together(tmp_path, {"a": "1", "b": "1"})
    monkeypatch.setattr(files, "finish", lambda directory: None)
    with files.replacing(tmp_path):
        files.commit(tmp_path, {"a": "2"}, remove=["b"])
    monkeypatch.undo()
    assert files.resolve(tmp_path, "a").read_text() == "2"
    files.finish(tmp_path)
    assert contents(tmp_path) == {"a": "2"}


def test_what_cannot_be_written_together_leaves_nothing(tmp_path, monkeypatch):
    files.write_together(tmp_path, {"a": "1"})
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"cannot be written \(No space left\); make room or give another path"):
        files.write_together(tmp_path, {"a": "2", "b": "2"})
    assert contents(tmp_path) == {"a": "1"}
    assert os.listdir(tmp_path) == ["a"]


@posix
@pytest.mark.parametrize("where", ["elsewhere", "."])
def test_no_file_is_written_or_dropped_through_a_link_that_leads_away(tmp_path, where):
    inside, outside = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir(), outside.mkdir()
    (outside / "b").write_text("theirs")
    (inside / "p").symlink_to(tmp_path / where)
    for contents_, remove in (({"p/b": "mine"}, []), ({"a": "mine"}, ["p/b"])):
        with files.replacing(inside), pytest.raises(ValueError, match=r"p is a link that leaves .*; remove the link"):
            files.commit(inside, contents_, remove)
    assert contents(outside) == {"b": "theirs"}
    assert not (inside / "a").exists()


@posix
def test_a_forged_commit_moves_nothing_out_of_the_directory(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / ".commit" / "p").mkdir(parents=True), outside.mkdir()
    (inside / ".commit" / "p" / "b").write_text("theirs")
    (inside / "p").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leaves"):
        files.write_together(inside, {"a": "mine"})
    assert not os.listdir(outside)
    link = tmp_path / "other"
    link.mkdir()
    (link / ".commit").symlink_to(outside)
    with pytest.raises(ValueError, match=r"\.commit is a link, which no writing leaves; remove it"):
        files.write_together(link, {"a": "mine"})


def test_a_directory_in_the_place_of_a_file_is_named_before_anything_is_written(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="b is a directory where a file belongs; remove it"):
        files.write_together(tmp_path, {"a": "1", "b": "1"})
    assert os.listdir(tmp_path) == ["b"]


def _writes(folder, text):
    for _ in range(60):
        files.write_together(folder, {"a": text, "b": text})


@posix
def test_writers_and_readers_at_once_see_whole_results(tmp_path):
    files.write_together(tmp_path, {"a": "0", "b": "0"})
    context = get_context("fork")
    writers = [context.Process(target=_writes, args=(tmp_path, text)) for text in "12"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with files.held(tmp_path, shared=True):
            seen = [files.resolve(tmp_path, name).read_text() for name in "ab"]
        assert seen[0] == seen[1]
        time.sleep(0.001)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert set(contents(tmp_path)) == {"a", "b"}
