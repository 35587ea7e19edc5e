"""Logits of a folder by GPTQModel's plain PyTorch kernel: FOLDER, IDS.npy, OUT.npy."""

import sys

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

folder, ids, out = sys.argv[1:]
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
layer = type(model.model.layers[0].mlp.up_proj).__name__
if layer != "TorchLinear":
    sys.exit(f"the layer was loaded as {layer}")
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(ids))).logits
np.save(out, logits.float().numpy())
