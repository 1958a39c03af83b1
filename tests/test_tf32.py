"""TF32 is off where exactness is promised, and comes back."""

import torch

from memsave.tf32 import allows_tf32, without_tf32


def test_tf32_is_off_inside_and_restored_outside():
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, convolution.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert allows_tf32(torch.device("cuda"))
        assert not allows_tf32(torch.device("cpu"))
        with without_tf32():
            assert not allows_tf32(torch.device("cuda"))
            assert convolution.fp32_precision == "ieee"
        assert (matmul.fp32_precision, convolution.fp32_precision) == ("tf32", before[1])
    finally:
        matmul.fp32_precision = before[0]
