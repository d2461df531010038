"""Killed, out of space, out of order: what was finished is kept, and the end is the same bytes."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from cdpvae import files
from cdpvae.config import DataConfig
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.report.terminal import terminal_report
from support.processed import MIXED, WORDS, files_of, mixed_records
from support.runs import REPOSITORY

SHARD = 40
# What is there when a stage has begun, and the seconds after it in which it is killed.
STAGES = {
    "prepare": ("prepare/*.arrow", 0.5),
    "deduplicate": ("prepare/stage.json", 0.03),
    "write": ("result/*/*", 0.03),
}
# Random moments of each stage in the quick suite, and in the whole one.
QUICK, ALL = 1, 7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, ...]:
    return mixed_records(tmp_path_factory.mktemp("inputs"), count=400)


def config_of(inputs, path: Path, **settings) -> DataConfig:
    return DataConfig(input=inputs, processed_dir=str(path), **{**MIXED, **settings})


@pytest.fixture(scope="module")
def saved_wrapper(tokenizer_dir) -> LlamaTokenizerWrapper:
    """As the command loads it: what it is called is in the manifest."""
    return LlamaTokenizerWrapper.from_pretrained(str(tokenizer_dir))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, saved_wrapper, inputs) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "out"
    preprocess(config_of(inputs, path, workers=1), saved_wrapper, progress=False)
    return files_of(path)


def start(config: DataConfig, tokenizer_dir: Path) -> subprocess.Popen:
    """`python -m cdpvae.preprocess` with these settings, in a process group of its own."""
    settings = Path(config.processed_dir).with_suffix(".json")
    settings.write_text(json.dumps({"data": config.model_dump(mode="json")}))
    command = [sys.executable, "-m", "cdpvae.preprocess", "--config", str(settings)]
    return subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer_dir)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_in(process: subprocess.Popen, work: Path, pattern: str, delay: float) -> bool:
    """SIGKILL `delay` seconds after something of `pattern` is there. False: it ended before."""
    while process.poll() is None and not any(work.glob(pattern)):
        time.sleep(0.005)
    time.sleep(delay)
    killed = process.poll() is None
    process.kill()
    process.communicate()
    return killed


def alive(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if entry.name.isdigit() and int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


def kills() -> list:
    """(stage, seed): one of each stage in the quick suite, twenty and more in the whole one."""
    return [
        pytest.param(stage, seed, id=f"{stage}-{seed}", marks=[pytest.mark.slow] * (seed >= QUICK))
        for stage in STAGES
        for seed in range(ALL)
    ]


@pytest.mark.parametrize(("stage", "seed"), kills())
def test_killed_and_continued_ends_in_the_same_bytes(
    tmp_path, tokenizer_dir, inputs, undisturbed, stage, seed
):
    """Killed once at a random moment, then again while it continues, then left alone."""
    draw = random.Random(seed)
    config = config_of(inputs, tmp_path / "out", workers=1 + seed % 2, shard_records=SHARD)
    work = tmp_path / ".out.work"
    pattern, most = STAGES[stage]
    for _ in range(5):
        process = start(config, tokenizer_dir)
        if kill_in(process, work, pattern, delay=draw.uniform(0, most)):
            break
        shutil.rmtree(tmp_path / "out")  # it was faster
    else:
        pytest.fail(f"{stage} was never killed")
    if seed % 3 == 2:
        kill_in(start(config, tokenizer_dir), work, "work.json", delay=draw.uniform(0, 6))
    last = start(config, tokenizer_dir)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors[-3000:]
    assert files_of(tmp_path / "out") == undisturbed
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.json"}
    assert not alive(process.pid) and not alive(last.pid)


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def few(tmp_path) -> tuple[str, ...]:
    directory = tmp_path / "inputs"
    directory.mkdir()
    return mixed_records(directory, count=60, seed=1)


def interrupt_writing(monkeypatch, number: int, error: BaseException, when: str) -> list[Path]:
    """Raise `error` at write `number`, `before` or `after` the file is there -> files written."""
    written: list[Path] = []
    write_bytes = files.write_bytes

    def interrupted(path, content):
        if len(written) == number and when == "before":
            raise error
        write_bytes(path, content)
        written.append(path)
        if len(written) == number + 1 and when == "after":
            raise error

    monkeypatch.setattr(files, "write_bytes", interrupted)
    return written


def finished_by(written: Iterable[Path]) -> list[Path]:
    """Files that need not be made again: summaries of shards, decisions, rows."""
    return [
        path
        for path in written
        if (path.parent.name in ("prepare", "deduplicate") and path.suffix == ".json")
        or path.name.startswith("data-")
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_at_every_write_and_continued(tmp_path, monkeypatch, wrapper, few, when):
    """Every file of every stage is once the first that is missing, or the last that is there."""
    settings = {"workers": 1, "shard_records": 50, "max_samples": 60}
    preprocess(config_of(few, tmp_path / "whole", **settings), wrapper, progress=False)
    expected = files_of(tmp_path / "whole")
    number = 0
    while True:
        config = config_of(few, tmp_path / f"out-{number}", **settings)
        with monkeypatch.context() as patch:
            first = interrupt_writing(patch, number, Killed(), when)
            try:
                preprocess(config, wrapper, progress=False)
                break
            except Killed:
                pass
        with monkeypatch.context() as patch:
            second = interrupt_writing(patch, -1, Killed(), when)
            preprocess(config, wrapper, progress=False)
        assert files_of(tmp_path / f"out-{number}") == expected, f"write {number}: {first[-1:]}"
        assert not set(finished_by(first)) & set(second), "finished, and made again"
        number += 1
    assert number > 12, (
        "work.json, shards, ends, cut, stage, decisions, two splits, reports, manifest"
    )


@pytest.fixture
def process(tmp_path, wrapper):
    """process(*paths, **settings) -> Processed, at tmp_path/out, in one process."""

    def run(*paths, **settings):
        config = config_of(tuple(map(str, paths)), tmp_path / "out", workers=1, **settings)
        return preprocess(config, wrapper, progress=False)

    return run


def line(number: int, **extra) -> bytes:
    """A good record, unlike every other."""
    record = {"instruction": f"{number} write of {WORDS[number % 26]}", "output": f"{number} told"}
    return json.dumps({**record, **extra}).encode()


GOOD = 8
# What stands in the middle of good lines, and how it is counted.
BAD_LINES = {
    "cut": (b'{"instruction": "write', "not valid JSON"),
    "not UTF-8": (line(90)[:-3] + b'\xff"}', "not UTF-8"),
    "NUL bytes": (line(91).replace(b"write", b"wr\0te"), "NUL"),
    "nested": (b'{"instruction": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested"),
    "nested just so": (b'{"text": ' + b'{"a":' * 120 + b"1" + b"}" * 121, "nested"),
    "key twice": (b'{"instruction": "a b c d", "output": "e", "output": "f"}', "same key twice"),
    "a lone surrogate": (b'{"instruction": "a \\ud800", "output": "b"}', "not valid Unicode"),
    "a number": (b"17", "not an object"),
    "a huge number": (b'{"instruction": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_costs_itself_and_is_counted(process, tmp_path, name):
    bad, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    good = [line(number) for number in range(GOOD)]
    path.write_bytes(b"\n".join([*good[:5], bad, *good[5:]]))
    done = process(path)
    counts = done.manifest["counts"]
    assert (counts["read"], counts["kept"]) == (GOOD + 1, GOOD)
    (counted,) = counts["not_converted"]
    assert reason in counted
    report = json.loads((done.path / "report.json").read_text())
    assert report["examples"][f"not converted: {counted}"]["line"] == 6


def test_a_line_of_50_mb_is_dropped_unread(process, tmp_path):
    """A tokenizer would need gigabytes for it."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(line(0) + b"\n" + line(1, output="x y " * 12_500_000) + b"\n" + line(2) + b"\n")
    counts = process(path).manifest["counts"]
    assert counts["filtered"] == {"response longer than 1024 tokens": 1} and counts["kept"] == 2


def test_an_unreadable_and_an_empty_file_stand_beside_the_rest(process, tmp_path):
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(map(line, range(GOOD))))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b no gzip data follows")
    names = ("empty.jsonl", "broken.jsonl.gz", "good.jsonl")
    done = process(*(tmp_path / name for name in names))
    assert done.manifest["counts"]["kept"] == GOOD
    assert list(done.manifest["problems"]) == ["empty.jsonl", "broken.jsonl.gz"]
    text = terminal_report(done)
    assert "NOT READ TO ITS END: empty.jsonl: input empty.jsonl: holds no record" in text
    assert "NOT READ TO ITS END: broken.jsonl.gz:" in text and "cannot be read" in text
    assert "broken.jsonl.gz" in (done.path / "report.html").read_text().split("class=funnel")[0]


def test_a_file_cut_short_keeps_what_can_be_read(process, tmp_path):
    whole = gzip.compress(b"\n".join(line(number) for number in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    done = process(tmp_path / "a.jsonl.gz")
    assert 1000 < done.manifest["counts"]["kept"] < 5000
    assert list(done.manifest["problems"]) == ["a.jsonl.gz"]


def test_only_unreadable_files_are_an_error(process, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b no gzip data follows")
    with pytest.raises(ValueError, match="a.jsonl.gz: cannot be read"):
        process(tmp_path / "a.jsonl.gz")


def test_a_file_without_permission(process, tmp_path):
    good, secret = tmp_path / "good.jsonl", tmp_path / "secret.jsonl"
    good.write_bytes(b"\n".join(map(line, range(GOOD))))
    secret.write_bytes(line(50))
    secret.chmod(0)
    if os.access(secret, os.R_OK):
        pytest.skip("this user may read every file")
    done = process(good, secret)
    assert done.manifest["counts"]["kept"] == GOOD
    assert "Permission denied" in done.manifest["problems"]["secret.jsonl"]


@pytest.mark.parametrize("number", [0, 2, 5, 9], ids="work shards decisions data".split())
def test_a_full_disk_is_one_error_and_continuing_works(tmp_path, monkeypatch, wrapper, few, number):
    """Simulated at the system call: the bytes of one file do not reach the disk."""
    config = config_of(few, tmp_path / "out", workers=1, shard_records=50)
    calls = itertools.count()

    def fsync(handle, real=os.fsync):
        if stat.S_ISREG(os.fstat(handle).st_mode) and next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"no space for .*\n?.*run the same command") as caught:
            preprocess(config, wrapper, progress=False)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob(".writing-*")), "room taken by what is not finished"
    finished = finished_by((tmp_path / ".out.work").rglob("*"))
    assert len(finished) >= number // 2 - 1
    with monkeypatch.context() as patch:
        written = interrupt_writing(patch, -1, Killed(), "before")
        done = preprocess(config, wrapper, progress=False)
    assert not set(written) & set(finished), "finished, and made again"
    assert done.manifest["counts"]["kept"] > 50 and not (tmp_path / ".out.work").exists()


def test_a_disk_that_is_really_full(tmp_path, tokenizer_dir, few):
    """A file system of 300 KB, where one can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        config = config_of(few, small / "out", workers=2, shard_records=50)
        failed = start(config, tokenizer_dir)
        _, errors = failed.communicate(timeout=300)
        assert failed.returncode == 2 and errors.startswith("error: no space for "), errors
        assert errors.count("\n") == 1
        grow = ["mount", "-o", "remount,size=30m", str(small)]
        subprocess.run(grow, check=True)
        again = start(config, tokenizer_dir)
        _, errors = again.communicate(timeout=300)
        assert again.returncode == 0, errors
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_runs_at_once_do_not_mix(tmp_path, wrapper, few):
    config = config_of(few, tmp_path / "out", workers=1)
    with (
        files.locked(tmp_path / ".out.work"),
        pytest.raises(ValueError, match="another process works in"),
    ):
        preprocess(config, wrapper, progress=False)
    assert preprocess(config, wrapper, progress=False).manifest["counts"]["kept"] > 50


def test_work_on_something_else_is_cleared_away(tmp_path, monkeypatch, wrapper, few):
    """Also when the clearing itself was killed."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_writing(patch, 4, Killed(), "after")
        preprocess(config_of(few, tmp_path / "out", workers=1), wrapper, progress=False)
    other = config_of(few[:1], tmp_path / "out", workers=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_writing(patch, 0, Killed(), "after")
        preprocess(other, wrapper, progress=False)
    done = preprocess(other, wrapper, progress=False)
    assert list(done.manifest["sources"]) == ["mixed-0.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs", "out"]


def test_a_hidden_directory_of_something_else_is_left_alone(tmp_path, wrapper, few):
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        preprocess(config_of(few, tmp_path / "out", workers=1), wrapper, progress=False)
    assert (tmp_path / ".out.work" / "thesis.txt").read_text() == "mine"


def test_work_of_version_0_1_0_is_not_continued(tmp_path, wrapper, few):
    """Its candidates have other columns. Whoever deletes it starts anew."""
    work = tmp_path / ".out.work"
    (work / "prepare").mkdir(parents=True)
    (work / "plan.json").write_text('{"fingerprint": "", "shard_records": 50, "content": {}}')
    config = config_of(few, tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=r"\.out\.work holds unfinished work of version 0\.1\.0"):
        preprocess(config, wrapper, progress=False)
    assert sorted(p.name for p in work.iterdir()) == ["plan.json", "prepare"]
    shutil.rmtree(work)
    assert preprocess(config, wrapper, progress=False).manifest["counts"]["kept"] > 50
    # Beside a finished result such work is of no use to anyone.
    work.mkdir()
    (work / "plan.json").write_text("null")
    assert preprocess(config, wrapper, progress=False).reused and not work.exists()


def test_a_replacement_killed_half_way_loses_neither(tmp_path, wrapper, few, monkeypatch):
    """Between moving the old directory away and the new one in."""
    settings = {"workers": 1, "max_samples": 20}
    old = preprocess(config_of(few, tmp_path / "out", **settings), wrapper, progress=False)
    rename, renamed = Path.rename, []

    def killed(self, target):
        if renamed:
            raise Killed
        renamed.append(target)
        return rename(self, target)

    new = config_of(few, tmp_path / "out", workers=1, max_samples=30)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        preprocess(new, wrapper, overwrite=True, progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="was made with another max_samples"):
        preprocess(new, wrapper, progress=False)
    done = preprocess(new, wrapper, overwrite=True, progress=False)
    assert (old.manifest["counts"]["kept"], done.manifest["counts"]["kept"]) == (20, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs", "out"]
