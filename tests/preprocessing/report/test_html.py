"""The report page: every number and every example on it, nothing of the records' own markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.report.html import html_report
from support.processed import MIXED, mixed_records

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
VOID = {"meta", "rect", "line", "tr", "th", "td", "i"}  # closed by what follows, or empty


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory, wrapper) -> dict:
    directory = tmp_path_factory.mktemp("report")
    inputs = mixed_records(directory, count=80)
    evil = directory / f"{EVIL.replace('/', '')}.jsonl"
    evil.write_text(json.dumps({EVIL: EVIL}) + "\n" + json.dumps(GOOD_EVIL) + "\n")
    (directory / "empty.jsonl").write_text("")
    config = DataConfig(
        input=(str(evil), *inputs, str(directory / "empty.jsonl")),
        processed_dir=str(directory / "out"),
        **MIXED,
    )
    return json.loads((preprocess(config, wrapper).path / "report.json").read_text())


GOOD_EVIL = {"instruction": EVIL * 200, "output": f"write of {EVIL}"}


def test_nothing_of_the_records_is_markup(report):
    page = Page(html_report(report))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "onerror", "onload", "onclick"} & names
    text = "".join(page.texts)
    assert EVIL.replace("/", "") in text, "the name of an input"
    assert EVIL.split('"')[0] in text, "an excerpt of a record"


def test_every_number_and_example_is_on_the_page(report):
    text = "".join(Page(html_report(report)).texts)
    counts = report["counts"]
    for number in (counts["read"], counts["kept"], counts["train"], counts["validation"]):
        assert f"{number:,}" in text
    for name in report["sources"]:
        assert name in text
    for category in ("not_converted", "filtered", "duplicates"):
        assert counts[category], f"the data has none of {category}"
        assert all(reason in text for reason in counts[category])
    assert len(report["examples"]) >= 4
    for example in report["examples"].values():
        assert example["excerpt"] in text and f"line {example['line']}" in text
    assert "holds no record" in text


def test_the_funnel_narrows_from_read_to_kept(report):
    page = Page(html_report(report))
    styles = [value for name, value in page.attributes if name == "style"]
    widths = [float(style.split(":")[1].rstrip("%")) for style in styles[:4]]
    counts = report["counts"]
    past = counts["pairs"] - sum(counts["filtered"].values())
    steps = [counts["read"], counts["converted"], past, counts["kept"]]
    assert widths == pytest.approx([100 * step / counts["read"] for step in steps], abs=0.01)
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


def test_histograms_hold_every_pair(report):
    counts = report["counts"]
    for side in ("instruction", "response"):
        assert sum(report["lengths"][side]["kept"]) == counts["kept"]
        before = report["lengths"][side]["before"]
        assert counts["kept"] < sum(before) <= counts["pairs"]
