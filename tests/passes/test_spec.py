"""The text form of passes: what prints parses, and mistakes are explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.ir.errors import InvalidInput
from bitwright.ir.types import F16, DType
from bitwright.passes._pass import Pass
from bitwright.passes._spec import parse_pass, parse_passes
from bitwright.passes.pipelines import RECIPES, standard
from bitwright.passes.precision.observe_ranges import ObserveRanges
from bitwright.passes.registry import PASSES, load
from bitwright.passes.sparsity.masks import Pattern
from bitwright.passes.sparsity.nm_mask import NMMask

ROUND = Path(__file__).resolve().parents[2] / "examples" / "round_weights.py"

SAMPLES: list[Pass] = [
    *(load(name)() for name in PASSES),
    NMMask(Pattern(1, 8), only="encoder.*|head", except_="fc", shared=4, skip_first=True),
    NMMask(only='odd "name", with {braces} = and \\ more'),
    NMMask(except_="a b"),
    ObserveRanges(method="percentile", percentile=99.5),
]


@pytest.mark.parametrize("p", SAMPLES, ids=str)
def test_text_reads_back(p: Pass) -> None:
    assert parse_pass(str(p)) == p


def test_a_list_reads_back() -> None:
    text = "fold-batch-norm, nm-mask{pattern=1:4 only=encoder.* except=fc}, observe-ranges, quantize-int8"
    assert ", ".join(map(str, parse_passes(text))) == text
    assert parse_passes(" fold-batch-norm ,\n nm-mask{ pattern=2:4, only=encoder.* }")[1] == NMMask(only="encoder.*")
    assert parse_passes("") == ()


def test_recipes_expand_inside_a_list() -> None:
    assert parse_passes("nm-mask, int8") == (NMMask(), *parse_passes(RECIPES["int8"]))
    assert parse_passes("float") == parse_passes("none") == ()
    for recipe in RECIPES:
        standard(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nm-msk", r"no pass or recipe is called 'nm-msk'; did you mean 'nm-mask'\?"),
        ("nm-mask{patern=2:4}", r"nm-mask has no option 'patern'; did you mean 'pattern'\?"),
        ("simplify{bits=4}", r"simplify has no option 'bits' \(it has none\)"),
        ("nm-mask{pattern=2-4}", "'2-4' is not a pattern such as 2:4"),
        ("nm-mask{pattern=5:4}", "1 <= keep <= group"),
        ("nm-mask{shared=two}", "shared takes int, not 'two'"),
        ("nm-mask{skip_first=yes}", "is true or false, not 'yes'"),
        ("nm-mask{only}", "expected option=value"),
        ("nm-mask{only=a only=b}", "given twice"),
        ("nm-mask{pattern=2:4", "separated by commas"),
        ("nm-mask int8", "separated by commas"),
        ("observe-ranges{method=mean}", "is one of minmax, percentile"),
        ("int8{frist=false}", "no pass of int8 has an option .frist.; did you mean .first."),
        ("nowhere.py:Thing", "no such file"),
        (f"{ROUND}:Missing", "has no class 'Missing'"),
        (f"{ROUND}:dataclass", "is not a pass"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_passes(text)


def test_a_pass_from_a_users_file() -> None:
    p = parse_pass(f"{ROUND}:RoundWeights{{bits=3}}")
    assert str(p) == f"{ROUND}:RoundWeights{{bits=3}}"
    assert parse_pass(str(p)) == p
    assert len(ROUND.read_text().splitlines()) < 50


def test_a_pass_class_given_by_the_caller() -> None:
    own = type(parse_pass(f"{ROUND}:RoundWeights"))
    assert parse_pass("round-weights{bits=3}", extra=[own]) == own(bits=3)  # type: ignore[call-arg]


def test_a_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(InvalidInput, match="cannot be loaded: SyntaxError"):
        parse_passes(f"{tmp_path}/broken.py:X")


def test_options_of_a_recipe_reach_the_passes_that_have_them() -> None:
    found = parse_passes("weight-only{bits=2 group=32 only=fc.*}, sparse")
    assert [str(p) for p in found[:2]] == [
        "quantize-weights{bits=2 group=32 only=fc.*}", "dynamic-quantize{only=fc.*}"
    ]  # fmt: skip
    assert str(parse_passes("weight-only{activations=f32}")[1]) == "dynamic-quantize{activations=f32}"
    with pytest.raises(InvalidInput, match="one of dynamic-s8, f32"):
        parse_passes("weight-only{activations=s8}")


def test_format_options_are_typed() -> None:
    assert isinstance(F16, DType)
