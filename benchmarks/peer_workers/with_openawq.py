"""OpenAWQ, for `peers.py`. Options are those of `QuantConfig`, and `preset`."""

from __future__ import annotations

from job import Job


def main() -> None:
    job = Job.from_command_line()
    from awq import QuantConfig
    from awq.pipeline import quantize

    options = dict(job.options)
    preset = options.pop("preset")
    config = QuantConfig.preset(preset, bits=job.bits, group_size=job.group_size, **options)
    lengths = {"samples": len(job.samples), "seq_len": len(job.samples[0])}
    with job.quantizing():  # opening and writing included: blocks are read and written as they are quantized
        quantize(job.model, job.out, config, job.samples, **lengths, verify=False)
    job.finish()


if __name__ == "__main__":
    main()
