"""MXFP4 of the OCP Microscaling specification: 4-bit floats, a power of two for every 32 of a row."""

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
GROUP = 32


def quantize_mxfp4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[rows, columns]` to E2M1 with a scale per 32 columns.

    Returns two codes per byte, the even column in the low half, int8 `[rows, columns / 2]`, and the float8_e8m0fnu
    scales `[rows, columns / 32]`. Of the two scales that suit a group, one clips its peak and one does not: the one
    that gives the smaller squared error is taken.
    """
    groups = matrix.detach().float().unflatten(1, (-1, GROUP))
    clipping = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    exponents = torch.where(_error(groups, clipping + 1) < _error(groups, clipping), clipping + 1, clipping)
    scaled = groups * (-exponents).exp2()
    codes = (_nearest_e2m1(scaled) + 8 * (scaled < 0)).flatten(1).to(torch.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return packed, exponents.squeeze(2).exp2().to(torch.float8_e8m0fnu)


def _error(groups: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    scaled = groups * (-exponents).exp2()
    rounding = E2M1[_nearest_e2m1(scaled)] - scaled.abs()
    return (rounding * exponents.exp2()).square().sum(dim=2, keepdim=True)


def _nearest_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(scaled.abs(), (E2M1[1:] + E2M1[:-1]) / 2)
