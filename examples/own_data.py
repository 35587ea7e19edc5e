"""Calibrate on your own texts: the ones that the model will really see.

python own_data.py MODEL OUT TEXTS.jsonl
"""

import json
import sys
from pathlib import Path

import awq

model, out, texts = sys.argv[1:]

# A list of texts, of token ids, or of chats. A .jsonl file with a `text` column could be given by its name.
documents = [json.loads(line)["text"] for line in Path(texts).read_text("utf-8").splitlines()]
report = awq.quantize(model, out, calib=documents, samples=64, seq_len=128)
print(report.plan.calibration)
