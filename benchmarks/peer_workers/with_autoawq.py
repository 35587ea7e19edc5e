"""AutoAWQ, for `peers.py`.

Option `copies`: let `Tensor.cpu` copy. AutoAWQ keeps the weights that it is about to change with `.cpu()`,
which on a GPU is a copy, and on a processor is the tensor itself.
"""

from __future__ import annotations

from job import Job


def main() -> None:
    job = Job.from_command_line()
    import torch

    from awq import AutoAWQForCausalLM  # AutoAWQ's: this runs in its environment

    if job.options["copies"]:
        torch.Tensor.cpu = lambda tensor, *_, **__: tensor.detach().clone()
    model = AutoAWQForCausalLM.from_pretrained(job.model, torch_dtype=torch.float32, trust_remote_code=False)
    settings = {"zero_point": True, "q_group_size": job.group_size, "w_bit": job.bits, "version": "GEMM"}
    lengths = {"max_calib_samples": len(job.samples), "max_calib_seq_len": len(job.samples[0])}
    with job.quantizing():
        model.quantize(None, settings, job.samples, **lengths)
    model.save_quantized(job.out)
    job.finish()


if __name__ == "__main__":
    main()
