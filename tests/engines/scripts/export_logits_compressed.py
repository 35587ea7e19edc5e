"""Logits of a folder by transformers and compressed-tensors: FOLDER, IDS.npy, OUT.npy, packed or
dequantized."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

folder, ids, out, how = sys.argv[1:]
options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if how == "dequantized" else {}
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True, **options
)
problems = {key: value for key, value in info.items() if value}
if problems:
    sys.exit(f"tensors that do not fit: {problems}")
layer = model.model.layers[0].mlp.up_proj
if hasattr(layer, "weight_packed") != (how == "packed"):
    sys.exit(f"the layer was not held {how}: {sorted(dict(layer.named_parameters()))}")
with torch.no_grad():
    logits = model.eval()(torch.from_numpy(np.load(ids))).logits
np.save(out, logits.float().numpy())
