"""From floats to codes: ranges, scales and zero points; rounding to nearest; rounding with compensation.

Asymmetric codes: a range [low, high] that contains zero is cut in 2**bits - 1 steps. Symmetric codes: zero is
the middle code 2**(bits - 1), and the step is the smallest with which both ends are in reach. Scales are
rounded to their storage dtype *before* codes are chosen, so what is stored is what was judged.

GPTQ (arXiv 2210.17323) rounds one input channel after another and moves each one's error to the channels
still to come, along the inverse of G. Ranges are fixed beforehand, so channels may be visited in any order
(the most energetic first) while groups stay contiguous on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from awq.search.gram import InputStats

# Share of the mean diagonal added to G before it is inverted.
DAMPING = 0.01
# Channels rounded before their errors are passed on together; a matter of speed alone.
_PANEL = 128
# Rounds a panel, as `round_panel` below.
Panel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class Codes(NamedTuple):
    """Codes uint8 `[out, in]`, scales `[out, groups]` in the storage dtype, zeros uint8 `[out, groups]`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """The weight the codes stand for, float32 `[out, in]`."""
        size = self.codes.shape[1] // self.scales.shape[1]
        grouped = self.codes.view(*self.scales.shape, size).float() - self.zeros.unsqueeze(-1).float()
        return (grouped * self.scales.float().unsqueeze(-1)).view(self.codes.shape)


def full_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, `[out, groups]` each, widened to contain zero."""
    grouped = weight.view(weight.shape[0], -1, group_size)
    return grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)


def quant_params(
    low: Tensor, high: Tensor, bits: int, dtype: torch.dtype, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales (float32 values representable in `dtype`) and zero points (float32 whole numbers) of ranges."""
    levels = 2**bits - 1
    tiny = torch.finfo(dtype).tiny
    if symmetric:
        middle = 2 ** (bits - 1)
        scales = torch.maximum(-low / middle, high / (levels - middle)).clamp_min(tiny).to(dtype).float()
        return scales, torch.full_like(scales, middle)
    scales = ((high - low) / levels).clamp_min(tiny).to(dtype).float()
    return scales, torch.round(-low / scales).clamp(0, levels)


def fake_quantize(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
) -> Tensor:
    """Round `weight` `[out, in]` to the codes of its groups' ranges and back to floats."""
    scales, zeros = quant_params(low, high, bits, dtype, symmetric)
    grouped = weight.view(*low.shape, -1)
    codes = torch.addcmul(zeros.unsqueeze(-1), grouped, scales.reciprocal().unsqueeze(-1))
    codes = codes.round_().clamp_(0, 2**bits - 1)
    return codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view(weight.shape)


def nearest(
    weight: Tensor, low: Tensor, high: Tensor, bits: int, dtype: torch.dtype, symmetric: bool = False
) -> Codes:
    """Round each weight to its nearest code.

    Args:
        weight: float32 `[out, in]`.
        low, high: float32 `[out, groups]`, the range of each group.
        dtype: storage dtype of the scales.
        symmetric: every zero point is the middle code.
    """
    scales, zeros = quant_params(low, high, bits, dtype, symmetric)
    grouped = weight.view(*low.shape, -1)
    codes = torch.addcmul(zeros.unsqueeze(-1), grouped, scales.reciprocal().unsqueeze(-1))
    codes = codes.round_().clamp_(0, 2**bits - 1)
    return Codes(codes.view(weight.shape).to(torch.uint8), scales.to(dtype), zeros.to(torch.uint8))


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped Gram matrix, float32 `[in, in]`.

    Damping is raised tenfold until the matrix can be factored; an all-zero G counts as the identity.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    eye = torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)
    if not mean > 0:
        return eye
    damping = DAMPING
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + damping * mean * eye)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        damping *= 10


def visiting_order(gram: Tensor) -> Tensor:
    """Channels of `gram` `[in, in]`, the most energetic first, int64 `[in]`."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def along_rows(tensor: Tensor, columns: Tensor) -> Tensor:
    """`columns` of `[out, in]` as rows, one for each: steps of a channel then pass contiguous memory."""
    return tensor.t().index_select(0, columns)


def round_panel(rest: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """Round a panel of channels one after another; each one's error moves to those behind it.

    Args:
        rest: float32 `[channels, out]`, what is to be rounded; replaced by the errors.
        upper: float32 `[channels, channels]`, the panel's part of the factor.
        scales, zeros: float32 `[channels, out]`.

    Returns:
        Codes, uint8 `[channels, out]`.
    """
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for i in range(rest.shape[0]):
        code = torch.addcdiv(zeros[i], rest[i], scales[i]).round_().clamp_(0, levels)
        codes[i] = code
        value = code.sub_(zeros[i]).mul_(scales[i])
        error = rest[i].sub_(value).div_(upper[i, i])
        if i + 1 < rest.shape[0]:
            rest[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
    return codes


def gptq(
    weight: Tensor,
    stats: InputStats,
    low: Tensor,
    high: Tensor,
    bits: int,
    dtype: torch.dtype,
    panel: Panel = round_panel,
    symmetric: bool = False,
) -> Codes:
    """Round with error compensation (GPTQ) inside fixed ranges.

    Args:
        weight: float32 `[out, in]`; rows are independent, so layers that share inputs may be stacked.
        stats: what the layer saw.
        low, high: float32 `[out, groups]`.
        dtype: storage dtype of the scales.
        panel: rounds a panel; on some devices another than this module's is faster.
        symmetric: every zero point is the middle code.
    """
    scales, zeros = quant_params(low, high, bits, dtype, symmetric)
    size = weight.shape[1] // low.shape[1]
    parts, width, _ = stats.gram.shape
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for part in range(parts):
        start = part * width
        gram = stats.gram[part]
        order = visiting_order(gram)
        upper = inverse_factor(gram[order][:, order])
        columns = order + start
        group = columns // size
        codes[:, columns] = _compensated(
            along_rows(weight, columns),
            along_rows(scales, group),
            along_rows(zeros, group),
            upper,
            2**bits - 1,
            panel,
        ).t()
    return Codes(codes, scales.to(dtype), zeros.to(torch.uint8))


def _compensated(
    rest: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, levels: int, panel: Panel
) -> Tensor:
    """Codes uint8 `[n, out]` of channels in visiting order.

    Args:
        rest: float32 `[n, out]`, the weight; used up.
        scales, zeros: float32 `[n, out]`.
        upper: float32 `[n, n]`, the factor of the inverse of G.
    """
    codes = torch.empty_like(rest, dtype=torch.uint8)
    count = rest.shape[0]
    for begin in range(0, count, _PANEL):
        end = min(begin + _PANEL, count)
        here = slice(begin, end)
        codes[here] = panel(rest[here], upper[here, here], scales[here], zeros[here], levels)
        if end < count:
            rest[end:].addmm_(upper[here, end:].t(), rest[here], alpha=-1)
    return codes
