"""GPTQModel, for `peers.py`. Option `method`: `awq` or `gptq`.

Its pool of threads makes as many workers as half the cores, and then insists on two that load a model: the
driver sets `GPTQMODEL_CPU_WORKERS`.
"""

from __future__ import annotations

from job import Job


def main() -> None:
    job = Job.from_command_line()
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    kind = {"awq": AWQConfig, "gptq": GPTQConfig}[job.options["method"]]
    settings = kind(bits=job.bits, group_size=job.group_size, sym=False, device="cpu")
    # What it packs AWQ with takes 16 bits only.
    dtype = torch.float16 if job.options["method"] == "awq" else torch.float32
    model = GPTQModel.load(job.model, settings, dtype=dtype)
    rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in job.samples]
    with job.quantizing():
        model.quantize(rows, batch_size=8)
    model.save(job.out)
    job.finish()


if __name__ == "__main__":
    main()
