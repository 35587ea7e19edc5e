"""Every layout: bytes that its own project wrote, round trips, and refusals.

`golden.json` holds the bytes (hexadecimal) that other programs packed from the weights described here:
AutoAWQ 0.2.9 (gemm, gemv, gemv_fast, marlin), compressed-tensors 0.20, GPTQModel 7, mlx 0.32 and gguf 0.19.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.config import FORMAT_BITS, PLAIN_FORMATS
from awq.errors import ConfigError, CorruptFileError
from awq.formats import LAYOUTS, exllama, get_format, gguf, mlx
from awq.weight import QuantizedWeight

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())
# Those that hold any 4-bit weight of a fitting size, exactly.
EXACT = ("gemm", "gemv", "gemv_fast", "llm_awq", "gptq_v2", "compressed-tensors", "mlx", "codes")


def patterned(rows: int, columns: int, group_size: int, symmetric: bool = False) -> QuantizedWeight:
    """The weight that the golden bytes were made from."""
    row, column = torch.arange(rows).view(-1, 1), torch.arange(columns)
    group = torch.arange(columns // group_size)
    zeros = (row + group * 3) % 15 + 1
    return QuantizedWeight(
        codes=((row * 5 + column * 3 + column // 8) % 16).to(torch.uint8),
        scales=((row * len(group) + group + 1).float() / 512).half(),
        zeros=(torch.full_like(zeros, 8) if symmetric else zeros).to(torch.uint8),
    )


def hexadecimal(tensor: Tensor) -> str:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    return (
        torch.equal(one.codes, other.codes)
        and torch.equal(one.scales, other.scales)
        and torch.equal(one.zeros, other.zeros)
        and one.bits == other.bits
        and one.scales.dtype == other.scales.dtype
    )


@pytest.mark.parametrize(
    ("layout", "key", "weight"),
    [
        ("gemm", "gemm", patterned(32, 32, 16)),
        ("gemv", "gemv", patterned(8, 64, 32)),
        ("gemv_fast", "gemv_fast", patterned(8, 64, 32)),
        ("marlin", "marlin", patterned(64, 16, 8, symmetric=True)),
        ("marlin", "marlin_row", patterned(64, 16, 16, symmetric=True)),
        ("compressed-tensors", "compressed-tensors", patterned(8, 64, 32)),
    ],
)
def test_the_bytes_are_those_of_the_layouts_own_project(
    layout: str, key: str, weight: QuantizedWeight
) -> None:
    packed = get_format(layout).pack(weight)
    assert {name: hexadecimal(packed[name]) for name in GOLDEN[key]} == GOLDEN[key]
    assert same(get_format(layout).unpack(packed, 4, weight.group_size), weight)


def test_llm_awq_differs_from_gemv_fast_by_a_name_alone() -> None:
    packed = get_format("llm_awq").pack(patterned(8, 64, 32))
    packed["qzeros"] = packed.pop("scaled_zeros")
    assert {name: hexadecimal(packed[name]) for name in packed} == GOLDEN["gemv_fast"]


def test_gptq_words_hold_eight_inputs_and_zero_points_minus_one() -> None:
    weight = patterned(8, 64, 32)
    for name, offset in (("gptq", 1), ("gptq_v2", 0)):
        packed = get_format(name).pack(weight)
        for word in range(8):
            codes = weight.codes[3, word * 8 : word * 8 + 8].tolist()
            expected = sum(code << (4 * i) for i, code in enumerate(codes))
            assert int(packed["qweight"][word, 3]) & 0xFFFFFFFF == expected
        for group in range(2):
            zeros = weight.zeros[:, group].tolist()
            expected = sum((zero - offset) << (4 * i) for i, zero in enumerate(zeros))
            assert int(packed["qzeros"][group, 0]) & 0xFFFFFFFF == expected
        assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32
        assert same(get_format(name).unpack(packed), weight)


def test_exllama_words_hold_eight_inputs_and_zero_points_minus_one_which_wrap() -> None:
    """The words that an ExLlama kernel reads: codes along the inputs, and the 1 that it adds again wraps."""
    weight = patterned(8, 64, 32)
    zeros = weight.zeros.clone()
    zeros[2, 0] = zeros[5, 1] = 0
    weight = QuantizedWeight(weight.codes, weight.scales, zeros)
    packed = exllama.pack(weight)
    assert set(packed) == {"qweight", "qzeros", "scales"}
    for word in range(8):
        codes = weight.codes[3, word * 8 : word * 8 + 8].tolist()
        assert int(packed["qweight"][word, 3]) & 0xFFFFFFFF == sum(c << (4 * i) for i, c in enumerate(codes))
    for group in range(2):
        stored = [15 if zero == 0 else zero - 1 for zero in zeros[:, group].tolist()]
        assert int(packed["qzeros"][group, 0]) & 0xFFFFFFFF == sum(z << (4 * i) for i, z in enumerate(stored))
    assert torch.equal(packed["scales"], weight.scales.t())
    assert same(exllama.unpack(packed), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_words_are_read_and_written_as_mlx_does_in_every_width(bits: int) -> None:
    golden = GOLDEN["mlx"][str(bits)]
    raw = {name: bytearray.fromhex(golden[name]) for name in golden}
    tensors = {
        "weight": torch.frombuffer(raw["weight"], dtype=torch.uint32).view(2, -1),
        "scales": torch.frombuffer(raw["scales"], dtype=torch.float32).view(2, 1),
        "biases": torch.frombuffer(raw["biases"], dtype=torch.float32).view(2, 1),
    }
    values = torch.frombuffer(raw["values"], dtype=torch.float32).view(2, 32)
    assert torch.allclose(mlx.dequantize(tensors, bits), values, atol=1e-6)
    weight = mlx.unpack(tensors, bits)
    assert torch.allclose(weight.dequantize(), values, atol=1e-5)
    assert hexadecimal(mlx.pack(weight)["weight"]) == golden["weight"]


def test_gguf_blocks_are_those_that_the_gguf_package_quantizes_to() -> None:
    column = torch.arange(32)
    codes = ((column * 3 + column // 8) % 16).to(torch.uint8).view(1, 32)
    scales = torch.full((1, 1), 0.25, dtype=torch.float16)
    weight = QuantizedWeight(codes, scales, torch.full((1, 1), 6, dtype=torch.uint8))
    assert hexadecimal(gguf.pack(weight)) == GOLDEN["gguf"]["blocks"]


def test_gguf_repeats_a_groups_scale_in_each_of_its_blocks() -> None:
    weight = patterned(8, 128, 64)
    back = gguf.unpack(gguf.pack(weight))
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales.repeat_interleave(2, 1))
    assert torch.equal(back.zeros, weight.zeros.repeat_interleave(2, 1))


def weights(rows: int, columns: int, group_size: int, seed: int, lowest: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    # Down to the subnormal numbers of float16, and up to the large ones.
    exponents = torch.randint(-24, 12, (rows, groups), generator=generator)
    mantissas = 1 + torch.randint(0, 1024, (rows, groups), generator=generator) / 1024
    return QuantizedWeight(
        torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        (mantissas * 2.0**exponents).half(),
        torch.randint(lowest, 16, (rows, groups), generator=generator, dtype=torch.uint8),
    )


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    group_size=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**30),
)
def test_any_weight_comes_back_as_it_was(
    name: str, rows: int, columns: int, group_size: int, seed: int
) -> None:
    layout = get_format(name)
    in_features = columns * max(64, group_size)
    weight = weights(rows * 8, in_features, group_size, seed)
    packed = layout.pack(weight)
    assert same(layout.unpack(packed, 4, group_size), weight)
    shapes = layout.packed_shapes(weight.out_features, in_features, group_size, torch.float16)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in packed.items()} == shapes
    measured = layout.measure({key: shape for key, (_, shape) in shapes.items()}, 4, group_size)
    assert (measured.out_features, measured.in_features) == (weight.out_features, in_features)
    assert measured.group_size == group_size
    assert set(layout.names) - set(layout.optional) <= set(packed) <= set(layout.names)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30), one_group=st.booleans())
def test_symmetric_weights_come_back_from_marlin(seed: int, one_group: bool) -> None:
    weight = weights(128, 64, 64 if one_group else 16, seed)
    weight = QuantizedWeight(weight.codes, weight.scales, torch.full_like(weight.zeros, 8))
    marlin = get_format("marlin")
    packed = marlin.pack(weight)
    assert same(marlin.unpack(packed), weight)
    shapes = {key: tuple(tensor.shape) for key, tensor in packed.items()}
    assert marlin.measure(shapes, 4, -1).group_size == weight.group_size


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_exllama_wraps_a_zero_point_of_zero_and_leaves_its_neighbours_alone(seed: int) -> None:
    weight = weights(16, 64, 32, seed)
    packed = exllama.pack(weight)
    stored = (packed["qzeros"].view(-1, 1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
    assert torch.equal(stored.view(2, 16).t(), (weight.zeros.int() - 1) % 16)
    assert same(exllama.unpack(packed), weight)


def of_width(bits: int, seed: int, lowest: int = 0, size: int = 32) -> QuantizedWeight:
    """A weight `[32, 64]` in groups; its scales leave room for their products with zero points."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (32, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(lowest, 2**bits, (32, 64 // size), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, weights(32, 64, size, seed).scales.clamp(max=200), zeros, bits)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (name, bits)
        for name in ("gptq", "gptq_v2", "compressed-tensors", "mlx", "codes")
        for bits in FORMAT_BITS.get(name, range(2, 9))
    ],
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**30), size=st.sampled_from([32, 64]))
def test_every_width_of_a_layout_comes_back_as_it_was(name: str, bits: int, seed: int, size: int) -> None:
    layout = get_format(name)
    weight = of_width(bits, seed, lowest=1 if name == "gptq" else 0, size=size)
    packed = layout.pack(weight)
    assert same(layout.unpack(packed, bits, size), weight)
    shapes = layout.packed_shapes(32, 64, size, torch.float16, bits)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in packed.items()} == shapes
    assert layout.measure({key: shape for key, (_, shape) in shapes.items()}, bits, size).in_features == 64


@pytest.mark.parametrize(
    ("layout", "bits"),
    [("compressed-tensors", 2), ("compressed-tensors", 8), ("gptq_v2", 2), ("gptq_v2", 3), ("gptq_v2", 8)],
)
def test_the_bytes_of_other_widths_are_those_of_the_layouts_own_project(layout: str, bits: int) -> None:
    row, column, group = torch.arange(32).view(-1, 1), torch.arange(64), torch.arange(2)
    # GPTQModel's packer wants none that is 0.
    lowest = 0 if layout == "compressed-tensors" else 1
    zeros = (row + group * 3) % (2**bits - lowest) + lowest
    weight = QuantizedWeight(
        ((row * 5 + column * 3 + column // 8) % 2**bits).to(torch.uint8),
        ((row * 2 + group + 1).float() / 512).half(),
        zeros.to(torch.uint8),
        bits,
    )
    golden = GOLDEN[f"{layout} widths"][str(bits)]
    packed = get_format(layout).pack(weight)
    assert {name: hexadecimal(packed[name]) for name in golden} == golden


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gptq_words_of_other_widths_are_one_row_of_bits(bits: int) -> None:
    weight = of_width(bits, 1)
    packed = get_format("gptq_v2").pack(weight)
    for row in (0, 31):
        words = [int(word) & 0xFFFFFFFF for word in packed["qweight"][:, row]]
        stream = sum(word << (32 * i) for i, word in enumerate(words))
        codes = [(stream >> (bits * i)) & (2**bits - 1) for i in range(64)]
        assert codes == weight.codes[row].tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_compressed_tensors_have_no_zero_points(bits: int) -> None:
    weight = of_width(bits, 2)
    layout = get_format("compressed-tensors", symmetric=True)
    with pytest.raises(ConfigError, match="middle code"):
        layout.pack(weight)
    weight.zeros.fill_(2 ** (bits - 1))
    packed = layout.pack(weight)
    assert set(packed) == set(layout.packed_shapes(32, 64, 32, torch.float16, bits))
    assert "weight_zero_point" not in packed
    assert same(layout.unpack(packed, bits), weight)


@pytest.mark.parametrize("name", ["gemv_fast", "mlx"])
def test_an_offset_that_is_no_zero_point_is_refused(name: str) -> None:
    layout = get_format(name)
    zeros = "biases" if name == "mlx" else "qzeros"
    for factor, shift in ((1.0, 0.4), (-1.0, 0.0), (3.0, 0.0)):
        packed = layout.pack(patterned(8, 64, 32))
        packed[zeros] = (packed[zeros].float() * factor + packed["scales"].float() * shift).half()
        with pytest.raises(CorruptFileError, match="no zero point"):
            layout.unpack(packed, 4, 32)


def test_a_dead_group_loses_its_zero_point_and_nothing_else() -> None:
    weight = patterned(8, 64, 32)
    weight.scales[2, 1] = 0
    back = mlx.unpack(mlx.pack(weight))
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert int(back.zeros[2, 1]) == 0


def test_the_first_gptq_version_refuses_a_zero_point_of_zero_both_ways() -> None:
    weight = patterned(8, 64, 32)
    weight.zeros[5, 0] = 0
    with pytest.raises(ConfigError, match="gptq_v2"):
        get_format("gptq").pack(weight)
    packed = get_format("gptq_v2").pack(weight)
    packed["qzeros"] = exllama.pack(weight)["qzeros"]
    with pytest.raises(CorruptFileError, match="for 0 or for 16"):
        get_format("gptq").unpack(packed)


def test_act_order_is_refused_and_reordered_groups_are_undone() -> None:
    weight = patterned(8, 64, 32)
    gptq = get_format("gptq")
    packed = gptq.pack(weight)
    packed["g_idx"] = torch.arange(64, dtype=torch.int32) % 2
    with pytest.raises(CorruptFileError, match="act-order"):
        gptq.unpack(packed)
    swapped = gptq.pack(QuantizedWeight(weight.codes, weight.scales.flip(1), weight.zeros.flip(1)))
    swapped["g_idx"] = torch.tensor([1] * 32 + [0] * 32, dtype=torch.int32)
    assert same(gptq.unpack(swapped), weight)
    del packed["g_idx"]
    assert same(gptq.unpack(packed), weight)


def test_symmetric_compressed_tensors_have_eight_for_their_zero_point() -> None:
    layout = get_format("compressed-tensors")
    weight = patterned(8, 64, 32, symmetric=True)
    packed = layout.pack(weight)
    del packed["weight_zero_point"]
    assert same(layout.unpack(packed), weight)
    packed["weight_shape"] = torch.tensor([8, 63])
    with pytest.raises(CorruptFileError, match="weight_shape"):
        layout.unpack(packed)


def test_a_wrong_group_size_is_noticed_where_scales_are_padded() -> None:
    for name in ("gemv", "gemv_fast"):
        layout = get_format(name)
        packed = layout.pack(patterned(8, 256, 32))
        with pytest.raises(CorruptFileError, match="group size"):
            layout.unpack(packed, 4, 64)
        with pytest.raises(CorruptFileError, match="group size"):
            layout.unpack(packed, 4)
        shapes = {key: tuple(tensor.shape) for key, tensor in packed.items()}
        shapes["scales"] = (5, 5)
        with pytest.raises(CorruptFileError, match=r"\(5, 5\)"):
            layout.measure(shapes, 4, 32)


def test_what_a_layout_cannot_hold_is_refused_with_the_reason() -> None:
    asymmetric = patterned(64, 64, 32)
    with pytest.raises(ConfigError, match="symmetric"):
        get_format("marlin").pack(asymmetric)
    coarse = QuantizedWeight(asymmetric.codes, torch.full((64, 2), 2.0**-30).bfloat16(), asymmetric.zeros)
    with pytest.raises(ConfigError, match="float16"):
        get_format("gemv").pack(coarse)
    large = QuantizedWeight(asymmetric.codes, torch.full((64, 2), 60000.0).half(), asymmetric.zeros)
    with pytest.raises(ConfigError, match="too large"):
        mlx.pack(large)
    assert "48" in str(mlx.supports(64, 96, 48, 4))
    assert "48" in str(get_format("gemv").supports(64, 96, 48, 4))
    assert "Q4_1" in str(gguf.supports(64, 64, 64, 3))
    for name, layout in LAYOUTS.items():
        if name not in PLAIN_FORMATS:
            assert "bit" in str(layout.supports(64, 64, 64, 9)), name
        assert "divide" in str(layout.supports(64, 100, 64, 4)), name
