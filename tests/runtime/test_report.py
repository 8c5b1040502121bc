"""The report: round trips, measured seconds, files from elsewhere."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from bitwright.ir.errors import InvalidInput
from bitwright.runtime.report import Formats, Layer, PassRow, Refusal, Report


@pytest.fixture
def report() -> Report:
    formats = Formats(x="u8", w="s8", acc="s32", out="u8")
    return Report(
        model="net",
        layers=[
            Layer(name="fc1", op="linear", shape=("b", 768), formats=formats, pattern="2:4", density=0.5,
                  kernel="k", reason="twice as fast", predicted_seconds=1e-3, notes=["padded"]),
            Layer(name="fc2"),
        ],
        passes=[PassRow(index=0, name="nm-mask", options="pattern=2:4", nodes_before=3, nodes_after=4, changed=True)],
        refusals=[Refusal(pass_name="nm-mask", place="embed", reason="not a contraction", cure="exclude it")],
    )  # fmt: skip


def test_it_comes_back_from_a_dict_and_from_json(report: Report) -> None:
    assert Report.from_dict(report.to_dict()) == report
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(b"{}") == Report()
    assert report.layer("fc1").shape == ("b", 768)
    with pytest.raises(KeyError):
        report.layer("fc9")


def test_measured_seconds_go_to_the_layers_of_that_name(report: Report) -> None:
    measured = report.with_seconds({"fc2": 0.5, "other": 1})
    assert [row.measured_seconds for row in measured.layers] == [None, 0.5]
    assert report.layers[1].measured_seconds is None


def test_what_is_not_a_number_becomes_nothing() -> None:
    report = Report(layers=[Layer(name="a", error=math.nan, predicted_seconds=math.inf)])
    back = Report.from_json(report.to_json())
    assert (back.layers[0].error, back.layers[0].predicted_seconds) == (None, None)


def test_wrong_rows_fail_where_they_are_made() -> None:
    with pytest.raises(ValidationError):
        Layer(name="a", densty=1)  # type: ignore[call-arg]
    row = Layer(name="a")
    with pytest.raises(ValidationError):
        row.density = "much"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [{"op": "x"}]}', r"layers\.0\.name: Field required"),
        ('{"schema_version": 2}', "schema 2, this bitwright reads up to 1"),
        ("{", "not a bitwright report"),
        ("[]", "not a bitwright report"),
    ],
)
def test_files_that_are_no_reports_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Report.from_json(text)
    if text != "{":
        with pytest.raises(InvalidInput, match=message):
            Report.from_dict(json.loads(text))
