"""llm-compressor, for `peers.py`.

Option `method`: `awq` or `gptq`. AWQ pins memory for a GPU that need not be there; that call is left out.
"""

from __future__ import annotations

from typing import Any

from job import Job


def main() -> None:
    job = Job.from_command_line()
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    IntermediatesCache.pin_memory = lambda *_, **__: None
    weights = QuantizationArgs(
        num_bits=job.bits, symmetric=False, strategy="group", group_size=job.group_size
    )
    where: dict[str, Any] = {
        "ignore": ["lm_head"],
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
    }
    if job.options["method"] == "awq":
        recipe = [AWQModifier(), QuantizationModifier(**where)]
    else:
        recipe = [GPTQModifier(**where)]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rows = {"input_ids": job.samples, "attention_mask": [[1] * len(sample) for sample in job.samples]}
    with job.quantizing():
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            num_calibration_samples=len(job.samples),
            max_seq_length=len(job.samples[0]),
            shuffle_calibration_samples=False,
        )
    model.to(torch.float16).save_pretrained(job.out, save_compressed=True)
    job.finish()


if __name__ == "__main__":
    main()
