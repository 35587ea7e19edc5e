"""AutoAWQ 0.2.9's modules, and the fate of each name in them."""

from __future__ import annotations

_PACKAGES = {
    "": "evaluation models modules quantize utils",
    "evaluation": "eval_utils humaneval_utils kl_divergence",
    "models": (
        "_config aquila auto baichuan base bloom cohere deepseek_v2 deepseek_v3 exaone falcon gemma gemma2 "
        "gpt_bigcode gpt_neox gptj internlm2 llama llava llava_next minicpm minicpm3 mistral mixtral mpt opt "
        "phi3 phi3_v qwen qwen2 qwen2_5_omni qwen2_5_vl qwen2vl qwen3 qwen3_moe stablelm starcoder2 yi"
    ),
    "modules": "act fused linear triton",
    "modules.fused": "attn block cache mlp model moe norm",
    "modules.linear": "exllama exllamav2 gemm gemm_ipex gemv gemv_fast marlin",
    "modules.triton": "gemm",
    "quantize": "quantizer scale",
    "utils": "calib_data fused_utils module packing_utils parallel quant_utils qwen_vl_utils utils",
}
MODULES = frozenset(
    ".".join(filter(None, ("awq", package, name)))
    for package, names in _PACKAGES.items()
    for name in names.split()
)

_OBJECTS = "awq.legacy.objects"
# AutoAWQ's modules import names from one another, and people import them from wherever they saw them; a name
# means the same in all.
_TARGETS = {
    "AutoAWQForCausalLM": "awq.auto:AutoAWQForCausalLM",
    "BaseAWQForCausalLM": "awq.auto_model:AWQModel",
    "AwqConfig": "awq.legacy.config:AwqConfig",
    **{
        name: f"{_OBJECTS}:{name}"
        for name in (
            "AWQ_CAUSAL_LM_MODEL_MAP",
            "AwqQuantizer",
            "WQLinear_Exllama",
            "WQLinear_ExllamaV2",
            "WQLinear_GEMM",
            "WQLinear_GEMV",
            "WQLinear_GEMVFast",
            "WQLinear_IPEX",
            "WQLinear_Marlin",
            "check_and_get_model_type",
            "clear_memory",
            "dequantize_gemm",
            "get_best_device",
            "get_calib_dataset",
            "ipex_available",
            "triton_available",
        )
    },
    "get_device": f"{_OBJECTS}:get_best_device",
    **{
        name: f"awq.legacy.evaluation:{name}"
        for name in ("eval_librispeech", "eval_mmlu", "evaluate_perplexity")
    },
}

_FUSED = (
    "layers are not rebuilt from other classes; the model that from_quantized returns keeps transformers' "
    "own, and generate() takes any batch and any length"
)
_KERNELS = "awq.nn.QuantLinear chooses its kernel and prepares itself when it is loaded"
_SEARCH = (
    "the search is made of pure functions (awq.search.search_scale, search_clip, gptq, nearest), and "
    "awq.quantize(model, out, config, calib) runs it"
)
_MODULE_TOOLS = "torch has it: named_modules(), get_submodule(name), set_submodule(name, module)"
_PACKING = "awq.formats.gemm.pack and unpack go between a weight's codes and the checkpoint's tensors"
_TASKS = (
    "run it with `awq eval MODEL --tasks …`, through lm-evaluation-harness (pip install 'openawq[lm-eval]')"
)

# By name, else by the longest module path.
_REASONS = {
    "ScaledActivation": "scales are not folded through activation functions: engines cannot load such layers",
    "WQLinearMMFunction": _KERNELS,
    "TRANSFORMERS_AUTO_MAPPING_DICT": "the class is found from the model's own config.json",
    "get_lowest_memory_device_index": "device_map='auto' of from_quantized spreads a model over the devices",
    "simple_dispatch_model": "device_map of from_quantized places a model",
    "compute_memory_used_pct": "torch.cuda.max_memory_allocated(device) tells",
    "get_module_by_name_suffix": _MODULE_TOOLS,
    "set_module_name": _MODULE_TOOLS,
    "try_import": "the kernels need no compiled extension",
    "exclude_layers_to_not_quantize": "modules_to_not_convert of awq.QuantConfig leaves layers alone",
    "append_str_prefix": "the names in awq_report.json are full names",
    "awq.evaluation.humaneval_utils": _TASKS.replace("…", "humaneval"),
    "awq.evaluation.kl_divergence": (
        "awq.evaluate.compare(model, reference, ids) and `awq eval MODEL --against ORIGINAL` measure it"
    ),
    "awq.evaluation": _TASKS,
    "awq.models": _FUSED,
    "awq.modules.fused": _FUSED,
    "awq.modules.linear": _KERNELS,
    "awq.modules.triton": _KERNELS,
    "awq.quantize": _SEARCH,
    "awq.utils.fused_utils": _FUSED,
    "awq.utils.module": _MODULE_TOOLS,
    "awq.utils.packing_utils": _PACKING,
    "awq.utils.quant_utils": _PACKING,
    "awq.utils.parallel": "device_map of from_quantized places a model; quantizing takes one device",
    "awq.utils.qwen_vl_utils": (
        "it is a copy of a package of its own: pip install qwen-vl-utils; from qwen_vl_utils import "
        "process_vision_info"
    ),
    "awq": "see the migration page of the documentation",
}


def target(name: str) -> str | None:
    """Where a name of AutoAWQ's leads, as `module:attribute`; None if it leads nowhere."""
    if name.endswith(("AWQForCausalLM", "AWQForConditionalGeneration")):
        return _TARGETS.get(name, _TARGETS["BaseAWQForCausalLM"])  # one class serves every architecture
    return _TARGETS.get(name)


def reason(module: str, name: str) -> str:
    """Why a name of an old module leads nowhere, and what does that work now."""
    if name in _REASONS:
        return _REASONS[name]
    while module not in _REASONS:
        module = module.rpartition(".")[0]
    return _REASONS[module]
