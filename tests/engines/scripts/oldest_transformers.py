"""OpenAWQ itself with another transformers: OUT.json FOLDER IDS.npy LOGITS.npy."""

import json
import sys

import numpy as np
import torch
import transformers

import awq

out, folder, ids, logits_file = sys.argv[1:]
model = awq.load_quantized(folder, dtype=torch.float32)
rows = torch.from_numpy(np.load(ids))
with torch.no_grad():
    np.save(logits_file, model(rows).logits.numpy())
    tokens = model.generate(rows, do_sample=False, max_new_tokens=32, min_new_tokens=32, pad_token_id=0)
with open(out, "w") as handle:
    json.dump({"version": transformers.__version__, "tokens": tokens[:, rows.shape[1] :].tolist()}, handle)
