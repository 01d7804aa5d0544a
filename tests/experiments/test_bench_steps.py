"""What benchmarks of whole steps check of the compiled program."""

import pytest

from experiments.bench.steps import check_fp8

NATIVE = """
  %a.1 = f8e4m3fn[128,256]{1,0} fusion(%x)
  %dot.1 = (bf16[128,64]{1,0}, s8[0]{0}) custom-call(%a.1, %b.1),
    custom_call_target="__cublas$lt$matmul$f8"
"""
FALLBACK = """
  %c.1 = f8e4m3fn[128,256]{1,0} parameter(0)
  %convert.7 = bf16[128,256]{1,0} convert(%c.1)
"""


def test_products_of_fp8_in_cublaslt_pass():
  check_fp8(NATIVE)


@pytest.mark.parametrize('hlo', [FALLBACK, NATIVE + FALLBACK], ids=['all', 'one of them'])
def test_a_product_that_fell_back_to_16_bits_is_an_error(hlo):
  with pytest.raises(RuntimeError, match='1 FP8 operands were converted back'):
    check_fp8(hlo)
