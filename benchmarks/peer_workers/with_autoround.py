"""AutoRound, for `peers.py`. Options: `sym`, and those of `AutoRound` itself."""

from __future__ import annotations

from job import Job


def main() -> None:
    job = Job.from_command_line()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        dataset=[{"input_ids": torch.tensor([sample])} for sample in job.samples],
        nsamples=len(job.samples),
        seqlen=len(job.samples[0]),
        device_map="cpu",
        **job.options,
    )
    with job.quantizing():
        rounder.quantize()
    # AutoAWQ's layout has no place for symmetric codes.
    rounder.save_quantized(job.out, format="auto_gptq" if job.options["sym"] else "auto_awq")
    job.finish()


if __name__ == "__main__":
    main()
