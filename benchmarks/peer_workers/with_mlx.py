"""mlx-lm's learned quantization, for `peers.py`. Option `method`: `awq`, `gptq` or `dwq`.

mlx-lm quantizes the embeddings too, which every other row leaves alone: that is switched off. The result is
written as plain values, by mlx's own dequantizing: what it learns need not have whole zero points.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from job import Job


def main() -> None:
    job = Job.from_command_line()
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    mx.set_default_device(mx.cpu)
    nn.Embedding.to_quantized = lambda embedding, *_, **__: embedding
    model, config = load_model(Path(job.model))
    model.set_dtype(mx.float32)
    learn = {"awq": awq, "gptq": gptq, "dwq": dwq}[job.options["method"]]
    with job.quantizing():
        model = learn(model, config, job)
        mx.eval(model.parameters())
    # As a checkpoint holds them: scales and biases of 16 bits.
    model.set_dtype(mx.float16)
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    out = Path(job.out)
    out.mkdir()
    mx.save_safetensors(
        str(out / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "pt"}
    )
    shutil.copy(Path(job.model) / "config.json", out)
    job.finish(bits=job.bits + 32 / job.group_size)


def awq(model: Any, config: dict[str, Any], job: Job) -> Any:
    import mlx.core as mx
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    settings = AWQ_MODEL_CONFIGS[config["model_type"]]
    awq_quantize(model, mx.array(job.samples), settings, bits=job.bits, group_size=job.group_size)
    return model


def gptq(model: Any, config: dict[str, Any], job: Job) -> Any:
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize

    # Only the embeddings would fall back to these, and they stay as they are.
    model, _ = gptq_quantize(model, mx.array(job.samples), job.bits, job.group_size, 8, job.group_size)
    return model


def dwq(model: Any, config: dict[str, Any], job: Job) -> Any:
    import mlx.core as mx
    from mlx import optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    student, _ = quantize_model(
        copy.deepcopy(model), copy.deepcopy(config), job.group_size, job.bits,
        quant_predicate=lambda _, module: "Embedding" not in type(module).__name__,
    )  # fmt: skip
    samples = [(sample, 0) for sample in job.samples]
    dwq_quantize(
        student,
        lambda batch, *_, **__: model(batch),
        optimizers.Adam(learning_rate=1e-6, bias_correction=True),
        samples,
        samples[:8],
        batch_size=4,
        max_seq_length=len(job.samples[0]) + 1,
        seed=123,
        dtype=mx.float32,
    )
    return student


if __name__ == "__main__":
    main()
