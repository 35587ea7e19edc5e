"""AutoAWQ's GEMM layout against bytes worked out by hand, and back again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awq.config import QuantConfig
from awq.errors import ConfigError
from awq.formats import gemm, get_format, plain
from awq.weight import QuantizedWeight

# Sixteen outputs, four inputs, groups of two inputs. Written as the codes of all outputs for one input, then
# as the two words that hold them: from the low nibble up, a word holds columns 0 2 4 6 1 3 5 7 of its eight,
# so read from the high nibble down, as a hexadecimal number is, columns 7 5 3 1 6 4 2 0.
CODES_BY_INPUT = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [0, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8],
    [1, 2, 3, 4, 5, 6, 7, 8, 15, 15, 15, 15, 15, 15, 15, 15],
    [9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
]
QWEIGHT = [
    [0x75316420, 0xFDB9ECA8],
    [0x000F0000, 0x80000000],
    [0x86427531, 0xFFFFFFFF],
    [0x00000009, 0x00000100],
]
# The same words as they lie in a file: little-endian, input after input.
QWEIGHT_BYTES = "20643175 a8ecb9fd 00000f00 00000080 31754286 ffffffff 09000000 00010000"

ZEROS_BY_GROUP = [
    [8, 7, 8, 7, 8, 7, 8, 7, 0, 0, 0, 0, 0, 0, 0, 15],
    [0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0],
]
QZEROS = [
    [0x77778888, 0xF0000000],
    [0x75316420, 0x02461357],
]
QZEROS_BYTES = "88887777 000000f0 20643175 57134602"

# float16: 1 is 3c00, 2 is 4000, 0.5 is 3800, -0.25 is b400.
SCALES_BY_GROUP = [[1.0] * 8 + [2.0] * 8, [0.5] * 15 + [-0.25]]
SCALES_BYTES = "003c" * 8 + "0040" * 8 + "0038" * 15 + "00b4"


def golden() -> QuantizedWeight:
    return QuantizedWeight(
        torch.tensor(CODES_BY_INPUT, dtype=torch.uint8).t().contiguous(),
        torch.tensor(SCALES_BY_GROUP, dtype=torch.float16).t().contiguous(),
        torch.tensor(ZEROS_BY_GROUP, dtype=torch.uint8).t().contiguous(),
    )


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[value % 2**32 for value in row] for row in words.tolist()]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def test_packing_gives_the_golden_words_and_bytes() -> None:
    packed = gemm.pack(golden())
    assert set(packed) == {"qweight", "qzeros", "scales"}
    assert packed["qweight"].dtype == packed["qzeros"].dtype == torch.int32
    assert unsigned(packed["qweight"]) == QWEIGHT
    assert unsigned(packed["qzeros"]) == QZEROS
    assert raw(packed["qweight"]) == bytes.fromhex(QWEIGHT_BYTES)
    assert raw(packed["qzeros"]) == bytes.fromhex(QZEROS_BYTES)
    assert raw(packed["scales"]) == bytes.fromhex(SCALES_BYTES)


def test_unpacking_the_golden_bytes_gives_the_weight() -> None:
    def words(text: str, shape: tuple[int, int]) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.int32).view(shape)

    scales = torch.frombuffer(bytearray.fromhex(SCALES_BYTES), dtype=torch.float16).view(2, 16)
    tensors = {
        "qweight": words(QWEIGHT_BYTES, (4, 2)),
        "qzeros": words(QZEROS_BYTES, (2, 2)),
        "scales": scales,
    }
    weight = gemm.unpack(tensors)
    assert weight.codes.t().tolist() == CODES_BY_INPUT
    assert weight.zeros.t().tolist() == ZEROS_BY_GROUP
    assert weight.scales.t().tolist() == SCALES_BY_GROUP
    assert (weight.out_features, weight.in_features, weight.group_size, weight.bits) == (16, 4, 2, 4)


def test_values_are_code_minus_zero_times_scale() -> None:
    values = golden().dequantize()
    assert values[3].tolist() == [(3 - 7) * 1.0, (0 - 7) * 1.0, (4 - 3) * 0.5, (0 - 3) * 0.5]
    assert values[15].tolist() == [(15 - 15) * 2.0, (8 - 15) * 2.0, (15 - 0) * -0.25, (0 - 0) * -0.25]


@given(
    words=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10_000),
)
def test_unpacking_undoes_packing_exactly(
    words: int, groups: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (8 * words, groups)
    weight = QuantizedWeight(
        torch.randint(0, 16, (8 * words, groups * size), generator=generator, dtype=torch.uint8),
        torch.randn(shape, generator=generator).to(dtype),
        torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8),
    )
    packed = gemm.pack(weight)
    planned = gemm.packed_shapes(8 * words, groups * size, size, dtype)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == planned
    assert all(tensor.is_contiguous() for tensor in packed.values())
    back = gemm.unpack(packed)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.zeros, weight.zeros)
    assert torch.equal(back.scales, weight.scales)
    again = gemm.pack(back)
    assert all(torch.equal(packed[name], again[name]) for name in packed)


@given(words=st.integers(1, 4), rows=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_packing_undoes_unpacking_exactly(words: int, rows: int, seed: int) -> None:
    """Any 32 bits are eight codes: nothing of a word is lost, the sign bit included."""
    generator = torch.Generator().manual_seed(seed)
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, (n, words), generator=generator).int() for n in (2 * rows, rows)
    )
    scales = torch.rand(rows, 8 * words, generator=generator).half()
    packed = gemm.pack(gemm.unpack({"qweight": qweight, "qzeros": qzeros, "scales": scales}))
    assert torch.equal(packed["qweight"], qweight)
    assert torch.equal(packed["qzeros"], qzeros)


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ((64, 128, 128, 3), "the layout holds 4 bits, not 3"),
        ((64, 100, 32, 4), "100 input channels do not divide into groups of 32"),
        ((60, 128, 32, 4), "60 output channels do not divide by 8"),
        ((64, 128, 128, 4), None),
    ],
)
def test_layers_that_cannot_be_held_are_told_why(measures: tuple[int, ...], reason: str | None) -> None:
    assert gemm.supports(*measures) == reason


def test_a_weight_that_cannot_be_held_is_not_packed() -> None:
    scales, zeros = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8)
    weight = QuantizedWeight(torch.zeros(4, 8, dtype=torch.uint8), scales, zeros)
    with pytest.raises(ConfigError, match="4 output channels do not divide by 8"):
        gemm.pack(weight)


def test_tensors_that_do_not_belong_together_are_not_unpacked() -> None:
    packed = gemm.pack(golden())
    with pytest.raises(ConfigError, match="holds 4 bits, not 3"):
        gemm.unpack(packed, bits=3)
    with pytest.raises(ConfigError, match="do not belong together"):
        gemm.unpack(packed | {"scales": packed["scales"][:1]})
    with pytest.raises(ConfigError, match="do not cover"):
        gemm.unpack(packed | {"qweight": packed["qweight"][:3]})


def test_a_weight_whose_parts_do_not_fit_is_refused() -> None:
    codes, scales = torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 2)
    zeros = torch.zeros(8, 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"must be uint8, not torch\.int32"):
        QuantizedWeight(codes.int(), scales, zeros)
    with pytest.raises(ConfigError, match="do not belong together"):
        QuantizedWeight(codes, scales, zeros[:, :1])
    with pytest.raises(ConfigError, match="3 groups of 8 rows do not cover"):
        QuantizedWeight(codes, torch.ones(8, 3), torch.zeros(8, 3, dtype=torch.uint8))


def test_plain_weights_hold_the_values_and_give_no_codes_back() -> None:
    packed = plain.pack(golden())
    assert torch.equal(packed["weight"], golden().dequantize())
    assert plain.packed_shapes(16, 4, 2, torch.bfloat16) == {"weight": (torch.bfloat16, (16, 4))}
    assert plain.supports(7, 64, 32, 3) is None
    assert plain.supports(7, 60, 32, 3) == "60 input channels do not divide into groups of 32"
    with pytest.raises(ConfigError, match="holds no codes"):
        plain.unpack(packed)


def test_every_layout_that_a_configuration_names_exists() -> None:
    assert get_format(QuantConfig().format) is gemm
    assert get_format(QuantConfig(format="float").format) is plain
    with pytest.raises(ConfigError, match="format 'gmem' is unknown; known are: gemm"):
        get_format("gmem")
