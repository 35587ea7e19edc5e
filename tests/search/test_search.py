"""Statistics, scales, ranges and codes: exactness, and never being worse than where they start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq.search import (
    GramAccumulator,
    ScaleGrid,
    fake_quantize,
    full_range,
    gptq,
    nearest,
    output_error,
    quant_params,
    search_clip,
    search_scale,
)
from awq.search.gram import InputStats
from awq.search.rounding import inverse_factor, round_panel
from awq.search.scale import _coarse_to_fine, expand

HALF = torch.float16


def outlier_inputs(tokens: int = 400, channels: int = 64, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few loud channels, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    inputs = torch.randn(tokens, channels, generator=generator) @ (mixing + torch.eye(channels))
    inputs[:, :3] *= 20
    return inputs


def stats_of(inputs: torch.Tensor, width: int | None = None) -> InputStats:
    total = GramAccumulator(inputs.shape[-1], width)
    total.add(inputs)
    return total.finish()


def random_weight(rows: int = 48, channels: int = 64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator) * torch.rand(rows, 1, generator=generator)


def test_output_error_equals_the_error_of_the_outputs() -> None:
    inputs, delta = outlier_inputs(), random_weight()
    exact = (inputs.double() @ delta.double().t()).square().mean(0)
    torch.testing.assert_close(output_error(delta, stats_of(inputs)).double(), exact, rtol=1e-5, atol=0)


def test_statistics_add_up_over_ragged_batches_and_skip_masked_and_broken_rows() -> None:
    inputs = outlier_inputs()
    whole = stats_of(inputs)
    pieces = GramAccumulator(64)
    pieces.add(inputs[:150].view(3, 50, 64))
    padded = torch.cat([inputs[150:350], torch.full((50, 64), 7.0)]).view(5, 50, 64)
    keep = torch.ones(5, 50, dtype=torch.bool)
    keep[4] = False
    pieces.add(padded, keep)
    broken = torch.cat([inputs[350:], torch.full((1, 64), float("nan")), torch.full((1, 64), float("inf"))])
    pieces.add(broken)
    result = pieces.finish()
    assert result.tokens == 400
    assert result.dropped == 2
    torch.testing.assert_close(result.gram, whole.gram, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(result.mean_abs, whole.mean_abs, rtol=1e-5, atol=1e-5)


def test_parts_of_the_gram_matrix_are_its_diagonal() -> None:
    inputs = outlier_inputs()
    whole, parts = stats_of(inputs), stats_of(inputs, 32)
    torch.testing.assert_close(parts.gram[1], whole.gram[0, 32:, 32:], rtol=1e-4, atol=1e-3)
    assert not parts.exact
    assert whole.exact
    torch.testing.assert_close(whole.diagonal_blocks(16), parts.diagonal_blocks(16), rtol=1e-4, atol=1e-3)


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    inputs, scale = outlier_inputs(), torch.rand(64) + 0.5
    expected, got = stats_of(inputs / scale), stats_of(inputs).divided(scale)
    torch.testing.assert_close(got.gram, expected.gram, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got.mean_abs, expected.mean_abs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.sampled_from([8, 16, 32]),
    bits=st.integers(2, 8),
    spread=st.floats(1e-6, 1e3),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 10_000),
)
def test_rounding_stays_within_half_a_step(
    rows: int, groups: int, size: int, bits: int, spread: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * size, generator=generator) + shift) * spread
    low, high = full_range(weight, size)
    codes = nearest(weight, low, high, bits, HALF)
    assert int(codes.codes.max()) < 2**bits
    assert int(codes.zeros.max()) < 2**bits
    torch.testing.assert_close(
        codes.values(), fake_quantize(weight, low, high, bits, HALF), rtol=1e-5, atol=0
    )
    steps = codes.scales.float().repeat_interleave(size, dim=1)
    # Half a step for rounding; half more at the ends, where the zero point itself was rounded.
    assert bool(((codes.values() - weight).abs() <= 1.02 * steps + 1e-12).all())


@given(bits=st.integers(2, 8), shift=st.floats(-2, 2), seed=st.integers(0, 10_000))
def test_symmetric_rounding_stays_within_half_a_step_around_the_middle_code(
    bits: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 32, generator=generator) + shift
    low, high = full_range(weight, 16)
    codes = nearest(weight, low, high, bits, HALF, symmetric=True)
    assert bool((codes.zeros == 2 ** (bits - 1)).all())
    assert int(codes.codes.max()) < 2**bits
    steps = codes.scales.float().repeat_interleave(16, dim=1)
    # At the ends, the rounding of the scale to float16 comes on top.
    assert bool(((codes.values() - weight).abs() <= 0.501 * steps + 2**-10 * weight.abs()).all())


@pytest.mark.parametrize("bits", [3, 8])
def test_compensation_and_clipping_keep_symmetric_codes_symmetric_and_lessen_the_error(bits: int) -> None:
    weight, stats = random_weight(), stats_of(outlier_inputs())
    low, high = search_clip(weight, stats, bits, 32, HALF, symmetric=True)
    plain = nearest(weight, *full_range(weight, 32), bits, HALF, symmetric=True)
    ours = gptq(weight, stats, low, high, bits, HALF, symmetric=True)
    assert bool((ours.zeros == 2 ** (bits - 1)).all())
    better, worse = (output_error(codes.values() - weight, stats).sum() for codes in (ours, plain))
    assert better < worse


def test_zero_is_represented_exactly() -> None:
    weight = torch.cat([torch.zeros(4, 32), torch.rand(4, 32) + 5], dim=1)
    weight[:, 40] = 0
    values = fake_quantize(weight, *full_range(weight, 32), 4)
    assert bool((values[weight == 0] == 0).all())


def test_scales_are_rounded_to_storage_before_codes_are_chosen() -> None:
    weight = random_weight() * 3.3
    low, high = full_range(weight, 32)
    scales, zeros = quant_params(low, high, 4, torch.bfloat16)
    assert torch.equal(scales, scales.bfloat16().float())
    codes = nearest(weight, low, high, 4, torch.bfloat16)
    assert codes.scales.dtype == torch.bfloat16
    expected = torch.clamp(torch.round(weight.view(48, 2, 32) / scales[..., None]) + zeros[..., None], 0, 15)
    assert (codes.codes.view(48, 2, 32) != expected).float().mean() < 1e-3  # ties may fall either way


def test_clipping_never_hurts_and_helps_with_a_rare_large_weight() -> None:
    weight, stats = random_weight(), stats_of(outlier_inputs())
    weight[:, 40] = 6.0
    stats = InputStats(stats.gram.clone(), stats.mean_abs, stats.tokens)
    stats.gram[0, 40, :] *= 1e-3
    stats.gram[0, :, 40] *= 1e-3
    full = full_range(weight, 32)
    clipped = search_clip(weight, stats, 3, 32, HALF)

    def per_group(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        delta = (fake_quantize(weight, low, high, 3) - weight).view(48, 2, 32).transpose(0, 1)
        return (torch.bmm(delta, stats.diagonal_blocks(32)) * delta).sum(-1)

    before, after = per_group(*full), per_group(*clipped)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.8 * float(before.sum())
    assert bool((clipped[0] >= full[0]).all())
    assert bool((clipped[1] <= full[1]).all())


def test_scale_search_beats_the_identity_on_loud_channels_and_never_loses() -> None:
    weights, stats = [random_weight(seed=1), random_weight(seed=2)], stats_of(outlier_inputs())
    grid = ScaleGrid(4, 32, HALF)
    choice = search_scale(weights, stats, grid, torch.arange(64))
    assert choice.label != "identity"
    assert choice.loss < 0.8 * choice.identity_loss
    quiet = stats_of(torch.randn(500, 64, generator=torch.Generator().manual_seed(3)))
    assert (c := search_scale(weights, quiet, grid, torch.arange(64))).loss <= c.identity_loss


def test_scale_loss_is_the_true_output_error() -> None:
    weight, inputs = random_weight(), outlier_inputs()
    choice = search_scale([weight], stats_of(inputs), ScaleGrid(4, 32, HALF), torch.arange(64))
    scaled = weight * choice.scale
    rounded = fake_quantize(scaled, *full_range(scaled, 32), 4) / choice.scale
    error = (inputs @ (rounded - weight).t()).double().square().mean(0).sum()
    assert choice.loss == pytest.approx(float(error), rel=1e-3)


def test_tied_channels_share_a_scale() -> None:
    tie = torch.arange(64) % 16
    tie[5] = -1
    choice = search_scale([random_weight()], stats_of(outlier_inputs()), ScaleGrid(4, 32, HALF), tie)
    assert choice.scale.shape == (16,)
    full = expand(choice.scale, tie)
    assert full[5] == 1
    assert torch.equal(full[16:32], full[32:48])


@pytest.mark.parametrize("width", [None, 32])
def test_gptq_beats_nearest_on_correlated_inputs(width: int | None) -> None:
    weight, stats = random_weight(), stats_of(outlier_inputs(), width)
    low, high = full_range(weight, 32)
    plain = output_error(nearest(weight, low, high, 4, HALF).values() - weight, stats).sum()
    compensated = output_error(gptq(weight, stats, low, high, 4, HALF).values() - weight, stats).sum()
    assert float(compensated) < 0.8 * float(plain)


def test_gptq_without_correlations_is_rounding_to_nearest() -> None:
    weight = random_weight()
    stats = InputStats(torch.eye(64)[None], torch.ones(64), 10)
    low, high = full_range(weight, 32)
    ours, plain = gptq(weight, stats, low, high, 4, HALF), nearest(weight, low, high, 4, HALF)
    assert (ours.codes != plain.codes).float().mean() < 1e-3  # ties may fall either way
    assert torch.equal(ours.scales, plain.scales)


def test_gptq_agrees_with_the_textbook_column_by_column() -> None:
    """The published procedure, written plainly: fixed ranges, channels in order of energy."""
    weight, stats = random_weight(rows=5), stats_of(outlier_inputs())
    low, high = full_range(weight, 32)
    scales, zeros = quant_params(low, high, 4, HALF)
    gram = stats.gram[0].double()
    order = torch.argsort(stats.gram[0].diagonal(), descending=True, stable=True)
    hessian = gram[order][:, order]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.double)
    rest = weight[:, order].double()
    expected = torch.zeros(5, 64)
    inverse = torch.linalg.inv(hessian)
    for i, column in enumerate(order.tolist()):
        group = column // 32
        code = torch.clamp(torch.round(rest[:, i] / scales[:, group]) + zeros[:, group], 0, 15)
        expected[:, column] = code.float()
        error = (rest[:, i] - (code - zeros[:, group]) * scales[:, group]) / inverse[i, i]
        rest -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    ours = gptq(weight, stats, low, high, 4, HALF)
    assert (ours.codes != expected).float().mean() < 0.02


def test_panels_can_be_rounded_by_other_means() -> None:
    """What is handed in gets contiguous channels of one panel each, and its codes and errors are used."""
    weight, stats = random_weight(rows=6, channels=160), stats_of(outlier_inputs(channels=160))
    low, high = full_range(weight, 32)
    seen: list[tuple[int, ...]] = []

    def other(
        rest: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: int
    ) -> torch.Tensor:
        assert rest.is_contiguous()
        seen.append((*rest.shape, *upper.shape, levels))
        return round_panel(rest, upper, scales, zeros, levels)

    ours = gptq(weight, stats, low, high, 4, HALF, other)
    assert seen == [(128, 6, 128, 128, 15), (32, 6, 32, 32, 15)]
    assert torch.equal(ours.codes, gptq(weight, stats, low, high, 4, HALF).codes)


@pytest.mark.parametrize("gram", [torch.zeros(8, 8), torch.ones(8, 8), torch.full((8, 8), 1e-30)])
def test_degenerate_statistics_do_not_break_the_inverse(gram: torch.Tensor) -> None:
    assert bool(torch.isfinite(inverse_factor(gram)).all())


def test_an_unused_layer_is_rounded_without_statistics() -> None:
    weight = random_weight()
    stats = GramAccumulator(64).finish()
    codes = gptq(weight, stats, *full_range(weight, 32), 4, HALF)
    assert stats.tokens == 0
    torch.testing.assert_close(codes.values(), fake_quantize(weight, *full_range(weight, 32), 4))


@pytest.mark.parametrize(("steps", "best"), [(1, 0), (2, 1), (3, 2), (3, 1), (20, 0), (20, 7), (20, 19)])
def test_coarse_to_fine_ends_at_the_best_of_a_smooth_loss(steps: int, best: int) -> None:
    losses = _coarse_to_fine(steps, lambda step: float((step - best) ** 2))
    assert min(losses, key=lambda step: losses[step]) == best
    assert len(losses) <= 5 + 2 + 2
