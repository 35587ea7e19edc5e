"""What mlx-lm reads and computes from a folder: OUT.json FOLDER IDS.npy LOGITS.npy WEIGHTS.npz.

WEIGHTS gets, for each layer that was loaded quantized, the values it stands for; OUT.json their group sizes.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

out, folder, ids, logits_file, weights_file = sys.argv[1:]

model, _ = load_model(Path(folder))
logits = model(mx.array(np.load(ids)))
np.save(logits_file, np.array(logits.astype(mx.float32)))
layers = {
    name: module
    for name, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    if isinstance(module, nn.QuantizedLinear)
}
values = {}
for name, layer in layers.items():
    parts = (layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32))
    values[name] = np.array(mx.dequantize(*parts, group_size=layer.group_size, bits=layer.bits))
np.savez(weights_file, **values)
with open(out, "w") as handle:
    json.dump({name: layer.group_size for name, layer in layers.items()}, handle)
