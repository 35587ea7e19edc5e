"""Greedy tokens of vLLM on a mixture of experts, with the experts' arithmetic in plain PyTorch.

vLLM's own kernel for 4-bit experts on the CPU needs AMX, and rounds activations to 8 bits. Everything else is
vLLM's: which layers it takes for quantized, its names, its loader that puts each expert's codes into its
stacked parameters, its routing, attention and sampling. Arguments and result as in `vllm_generate.py`.
"""

import sys

import torch
import vllm_generate


def columns(words: torch.Tensor) -> torch.Tensor:
    """int32 `[rows, n]` as numbers 0 to 15 `[rows, 8 n]`, in AutoAWQ's order."""
    out = torch.empty(*words.shape, 8, dtype=torch.int32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        out[..., column] = (words >> (4 * nibble)) & 15
    return out.flatten(-2)


def values(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 weights `[in, out]` of one expert."""
    codes = columns(words).unflatten(0, (scales.shape[0], -1))
    return ((codes - columns(zeros)[:, None]) * scales[:, None].float()).flatten(0, 1)


def use_plain_arithmetic() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_awq

    method = auto_awq.AutoAWQMoEMethod

    def process(self, layer) -> None:
        """Nothing is repacked."""

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
        result = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            rows, place = torch.where(topk_ids == expert)
            up = values(layer.w13_qweight[expert], layer.w13_qzeros[expert], layer.w13_scales[expert])
            down = values(layer.w2_qweight[expert], layer.w2_qzeros[expert], layer.w2_scales[expert])
            gate, linear = (x[rows].float() @ up).chunk(2, dim=-1)
            out = (torch.nn.functional.silu(gate) * linear) @ down
            result.index_add_(0, rows, out * topk_weights[rows, place, None].float())
        return result.to(x.dtype)

    method.process_weights_after_loading, method.apply = process, apply
    auto_awq.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.CPU, CPUExpertsInt4)
    # What decides on GPUs between two methods with the same parameters.
    auto_awq.check_moe_marlin_supports_layer = lambda *_, **__: True


if __name__ == "__main__":
    use_plain_arithmetic()
    vllm_generate.main(*sys.argv[1:])
