"""Files and directories are whole or not there, whatever fails on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cdpvae import files


def failing(*_):
    raise OSError("disk full")


@pytest.fixture
def finished(tmp_path) -> Path:
    """A directory with a file in it and one below, to be published."""
    path = tmp_path / ".finished"
    (path / "below").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"content")
    (path / "below" / "b.bin").write_bytes(b"more")
    return path


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old ü")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", failing)
        files.write_text(path, "new")
    assert path.read_text() == "old ü" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_published_directory_replaces_the_old_one(tmp_path, finished):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old.bin").write_bytes(b"old")
    files.publish(finished, final)
    files.verify(final)
    manifest = json.loads((final / "manifest.json").read_text())
    assert set(manifest) == {"a.bin", "below/b.bin"}
    assert manifest["a.bin"]["bytes"] == 7 and len(manifest["a.bin"]["sha256"]) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "a.bin").unlink(), "a.bin is missing"),
        (lambda p: (p / "a.bin").write_bytes(b"cont"), r"a.bin is damaged \(4 bytes, expected 7"),
        (lambda p: (p / "below" / "b.bin").write_bytes(b"mare"), "below/b.bin is damaged"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    ],
    ids=["missing", "truncated", "one byte", "no manifest"],
)
def test_damage_is_found(tmp_path, finished, damage, message):
    files.publish(finished, tmp_path / "final")
    damage(tmp_path / "final")
    with pytest.raises(ValueError, match=message):
        files.verify(tmp_path / "final")


def test_a_publication_that_fails_leaves_the_old_directory(tmp_path, monkeypatch, finished):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old.bin").write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(files, "flush", failing)
        files.publish(finished, final)
    assert [p.name for p in final.iterdir()] == ["old.bin"]


def test_a_replacement_killed_half_way_is_undone(tmp_path, finished):
    """After the old directory has been moved aside, before the new one is in place."""
    final = tmp_path / "final"
    final.mkdir()
    (final / "old.bin").write_bytes(b"old")
    final.rename(tmp_path / ".final.replaced")
    assert files.restore_directory(final) and (final / "old.bin").exists()
    assert not files.restore_directory(final)
    files.replace_directory(final, finished)
    assert (final / "a.bin").exists() and not (final / "old.bin").exists()
    assert not files.restore_directory(final)
