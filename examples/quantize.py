"""Quantize a model to 4 bits and write it as a checkpoint that inference engines load.

python quantize.py MODEL OUT [--samples 128] [--seq-len 512]
"""

import argparse

import awq

parser = argparse.ArgumentParser()
parser.add_argument("model", help="folder or hub name")
parser.add_argument("out", help="folder to make")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--seq-len", type=int, default=512)
options = parser.parse_args()

report = awq.quantize(
    options.model,
    options.out,
    awq.QuantConfig(bits=4, group_size=128),
    calib="bundled",
    samples=options.samples,
    seq_len=options.seq_len,
)
for block in report.blocks:
    print(block.line())
