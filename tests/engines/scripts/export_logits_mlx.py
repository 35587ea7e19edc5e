"""Logits of a folder by mlx-lm: FOLDER, IDS.npy, OUT.npy."""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load

folder, ids, out = sys.argv[1:]
model, _ = load(folder)
logits = model(mx.array(np.load(ids)))
np.save(out, np.array(logits.astype(mx.float32)))
