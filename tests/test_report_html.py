"""The HTML report: one well-formed page, everything in it escaped, nothing fetched from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitwright.ir.errors import BitwrightError
from bitwright.runtime.html import page, write_html
from bitwright.runtime.report import Formats, Layer, PassRow, Refusal, Report

VOID = {"meta", "br", "line", "rect", "circle", "link", "img"}


def sample() -> Report:
    sparse = Layer(
        name="encoder.0.fc<1>", op="linear", origin="model.py:41", shape=("b", 768),
        formats=Formats(x="u8", w="s8", acc="s32", out="u8"), pattern="nm<2:4, axis=1>", density=0.5,
        kernel="contract_u8s8_nm24", reason="1.3 times dense", bytes=294_912, operations=2_000_000,
        predicted_seconds=11e-6, measured_seconds=12e-6, share_of_limit=0.8, error=0.004,
    )  # fmt: skip
    plain = Layer(name="head", op="linear", formats=Formats(x="f32", w="f32"), notes=["kept in float: last layer"])
    return Report(
        model='evil "<script>alert(1)</script>"',
        target="host",
        layers=[sparse, plain],
        passes=[
            PassRow(
                index=1,
                name="nm-mask",
                options="pattern=2:4",
                seconds=0.2,
                changed=True,
                error=0.01,
                diff="--- before\n+++ after\n+  %w = weight <new>\n",
            )
        ],
        refusals=[Refusal(pass_name="nm-mask", place="stem", reason="9 is not a multiple of 4", cure="exclude stem")],
        figures={"latency_seconds": 0.0003, "unknown": None},
        machine={"processor": "AMD EPYC"},
        versions={"bitwright": "0.1.0"},
    )


class _Checker(HTMLParser):
    """Every tag closes; collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "data", "srcset", "action")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def checked(text: str) -> _Checker:
    checker = _Checker()
    checker.feed(text)
    checker.close()
    assert checker.stack == []
    return checker


def test_page_is_well_formed_and_fetches_nothing() -> None:
    text = page([sample()])
    assert checked(text).fetched == []
    assert not re.search(r"https?://|url\(|@import", text)


def test_names_are_escaped() -> None:
    text = page([sample()])
    assert checked(text).tags.count("script") == 1
    assert "encoder.0.fc&lt;1&gt;" in text


@pytest.mark.parametrize(
    "figure",
    ["u8 x s8 → s32 → u8", "nm&lt;2:4, axis=1&gt;", "50 % kept", "contract_u8s8_nm24", "295 kB", "11.0 µs", "12.0 µs",
     "80 %", "0.4 %", "1.3 times dense", "kept in float: last layer", "9 is not a multiple of 4", "exclude stem",
     "model.py:41", "%w = weight &lt;new&gt;", "nm-mask{pattern=2:4}", "200 ms", "AMD EPYC", "300 µs"],
)  # fmt: skip
def test_page_shows(figure: str) -> None:
    assert figure in page([sample()])


def test_plots_are_drawn_only_from_figures() -> None:
    assert page([sample()]).count("<svg") == 3
    assert page([Report(model="empty")]).count("<svg") == 0


def test_several_reports_stand_on_one_page() -> None:
    text = page([Report(model="one"), Report(model="two")])
    assert [m for m in re.findall(r"<h1>(.*?)</h1>", text)] == ["one", "two"]


def test_a_large_model_adds_up_what_it_does_not_draw() -> None:
    layers = [Layer(name=f"layer{i}", measured_seconds=1e-6 * (i + 1)) for i in range(100)]
    assert "64 others" in page([Report(layers=layers)])


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    sample().to_html(tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(BitwrightError, match="cannot write"):
        write_html(sample(), tmp_path / "missing" / "report.html")


def test_the_front_of_cost_against_loss_is_drawn_and_tabled() -> None:
    report = sample()
    points = [[0.125, 0.04], [0.16, 0.01], [0.25, 0.002], [1.0, 0.0]]
    report.facts["precision-front"] = {"cost_of": "size", "points": points, "chosen": [0.16, 0.01]}
    text = page([report])
    _Checker().feed(text)
    assert "size against loss" in text
    assert text.count("taken: ") == 1
    drawn = text[text.index("size against loss") :].split("</svg>")[0]
    assert drawn.count('r="4"') == 3  # what has no loss has no place on a logarithmic axis
    assert "100 % at loss 0" in text  # but is in the list
    xs = [float(pair.split(",")[0]) for pair in re.search(r'points="([^"]+)"', drawn)[1].split()]  # type: ignore[index]
    assert xs == sorted(xs)


def test_a_front_of_one_point_is_not_drawn() -> None:
    report = sample()
    report.facts["precision-front"] = {"cost_of": "size", "points": [[0.2, 0.1]], "chosen": [0.2, 0.1]}
    assert "against loss" not in page([report])
