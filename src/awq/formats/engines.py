"""Which engines a checkpoint in the GEMM layout fits, by the sizes of its layers.

The limits are those of vLLM 0.32, SGLang 0.5.23, LMDeploy 0.18 and mlx-lm 0.32, as `docs/engines.md` tells
them. A fast kernel works on tiles; what an engine does with a layer that fits none differs, and is said here.
"""

from __future__ import annotations

from collections.abc import Mapping

from awq.formats.layout import LayerShape

# Marlin, the kernel of vLLM and SGLang on NVIDIA GPUs.
_MARLIN_GROUPS = (-1, 32, 64, 128)
# Sides of its tiles, out and in; of an expert's last layer they are the other way round.
_MARLIN_TILE = (64, 128)
_VLLM_CPU_TILE = 32
_MLX_GROUPS = (32, 64, 128)
_TURBOMIND_GROUPS = (128,)
# Layers that engines split along their inputs; all others are split along their outputs.
_SPLIT_INPUTS = ("o_proj", "out_proj", "down_proj", "fc2", "w2", "dense", "dense_4h_to_h", "c_proj", "wo")


def engine_notes(layers: Mapping[str, LayerShape], group_size: int) -> dict[str, str]:
    """What each engine does with a checkpoint: `fits`, `fits, …` with a restriction, or `no: …`.

    Args:
        layers: quantized layers by name.
        group_size: as the configuration has it; -1 for one group per row.
    """
    off_marlin = [name for name, shape in layers.items() if not _on_marlin_tiles(name, shape)]
    marlin = group_size in _MARLIN_GROUPS
    return {
        "vLLM (NVIDIA)": _marlin(marlin, off_marlin, "padded to its tiles: a little slower"),
        "vLLM (CPU)": _vllm_cpu(layers),
        "SGLang": _marlin(marlin, off_marlin, "run by a slower kernel, in float16 alone"),
        "LMDeploy TurboMind": _in_groups(group_size, _TURBOMIND_GROUPS),
        "mlx-lm": _mlx(layers, group_size),
    }


def tensor_parallel(layers: Mapping[str, LayerShape], most: int = 16) -> list[int]:
    """Numbers of GPUs, powers of two, that split every layer into whole groups and whole words of codes."""
    sizes = [2**i for i in range(1, most.bit_length())]
    return [size for size in sizes if all(_splits(name, shape, size) for name, shape in layers.items())]


def _splits(name: str, shape: LayerShape, parts: int) -> bool:
    if _splits_inputs(name):
        return shape.in_features % (parts * shape.group_size) == 0
    return shape.out_features % (parts * 8) == 0


def _splits_inputs(name: str) -> bool:
    return name.rpartition(".")[2] in _SPLIT_INPUTS


def _on_marlin_tiles(name: str, shape: LayerShape) -> bool:
    last_of_expert = ".experts." in name and _splits_inputs(name)
    out, inner = reversed(_MARLIN_TILE) if last_of_expert else _MARLIN_TILE
    return shape.out_features % out == 0 and shape.in_features % inner == 0


def _marlin(known_group: bool, off_tile: list[str], consequence: str) -> str:
    if not known_group:
        return "fits, by a slower kernel, in float16 alone: Marlin has groups of 32, 64 and 128"
    return f"fits, {len(off_tile)} layers {consequence}" if off_tile else "fits"


def _vllm_cpu(layers: Mapping[str, LayerShape]) -> str:
    odd = [name for name, s in layers.items() if (s.out_features | s.in_features) % _VLLM_CPU_TILE]
    if odd:
        return f"no: {odd[0]} has a side that does not divide by {_VLLM_CPU_TILE}"
    return "fits, experts only where the processor has AMX" if _has_experts(layers) else "fits"


def _mlx(layers: Mapping[str, LayerShape], group_size: int) -> str:
    if _has_experts(layers):
        return "no: it stacks experts before it has read their codes"
    return _in_groups(group_size, _MLX_GROUPS)


def _has_experts(layers: Mapping[str, LayerShape]) -> bool:
    return any(".experts." in name for name in layers)


def _in_groups(group_size: int, known: tuple[int, ...]) -> str:
    if group_size in known:
        return "fits"
    return f"no: it takes groups of {', '.join(map(str, known))}"
