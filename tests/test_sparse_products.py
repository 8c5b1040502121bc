"""Products of packed weights on an emulated device, tensors of torch in and out."""

from pathlib import Path

import pytest
import torch

from bitwright.codegen.cuda.transposable import Product
from bitwright.errors import InvalidInput
from bitwright.gpu_emulation import EmulatedDriver
from bitwright.sparse_linear import TransposableWeight
from bitwright.sparse_products import Products, prepare, why_not
from tests.test_sparse_linear import masked


@pytest.mark.parametrize("by_columns", [False, True])
def test_products_of_torch_tensors(by_columns: bool) -> None:
    run = Products(EmulatedDriver(), "sm_80")
    for seed, (outputs, inputs, tokens) in enumerate([(24, 40, 5), (136, 64, 9)]):
        packed = TransposableWeight.pack(masked(outputs, inputs, seed, dtype=torch.float16))
        x = torch.randn(tokens, outputs if by_columns else inputs).half()
        bias = torch.randn(inputs if by_columns else outputs) if seed else None
        got = run(x, packed, by_columns, bias)
        want = x.float() @ (packed.dense() if by_columns else packed.dense().T).float()
        torch.testing.assert_close(got.float(), want + (0 if bias is None else bias), rtol=2e-3, atol=2e-3)


def test_kernels_that_were_compiled_elsewhere(tmp_path: Path) -> None:
    packed, x = TransposableWeight.pack(masked(16, 16, 0, dtype=torch.float16)), torch.ones(2, 16).half()
    prepare([Product(16, 16, 2)], "sm_80", tmp_path)
    run = Products(EmulatedDriver(), "sm_80", tmp_path)
    torch.testing.assert_close(run(x, packed, False), x @ packed.dense().T, rtol=2e-3, atol=2e-3)
    with pytest.raises(InvalidInput, match="has no kernel for this product"):
        run(x, packed, True)


def test_what_tensor_cores_do_not_take() -> None:
    packed = TransposableWeight.pack(masked(16, 16, 0))
    assert why_not(torch.ones(1, 16), packed) == "they take f16 or bf16, not torch.float32"
    odd = TransposableWeight.pack(masked(16, 20, 0, dtype=torch.float16))
    assert "multiples of 8, not 16x20" in why_not(torch.ones(1, 20).half(), odd)
    whole = TransposableWeight.pack(masked(16, 16, 0, dtype=torch.float16))
    assert why_not(torch.ones(0, 16).half(), whole) == "x is empty"
    assert not why_not(torch.ones(1, 16).half(), whole)
