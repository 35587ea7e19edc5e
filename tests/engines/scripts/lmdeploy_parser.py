"""What LMDeploy makes of a folder: OUT.json FOLDER TENSORS.safetensors VALUES.npy.

Its two parsers run as they are: `QuantizationConfig.from_config` of the PyTorch engine, and `get_tm_config`
of TurboMind, which also builds TurboMind's model of the folder. TurboMind's CUDA extension cannot be loaded
without a GPU: an object that does nothing stands in for it, and the question which dtypes the GPU computes in
is answered with both. TENSORS hold one layer's `qweight`, `qzeros` and `scales`; VALUES gets the weight
`[in, out]` that TurboMind's reader makes of them.
"""

import json
import sys
from unittest.mock import MagicMock

import numpy as np
import torch
from lmdeploy import turbomind
from safetensors.torch import load_file

turbomind._tm = MagicMock(name="_turbomind")
from lmdeploy.archs import get_model_arch  # noqa: E402
from lmdeploy.messages import TurbomindEngineConfig  # noqa: E402
from lmdeploy.pytorch.config import QuantizationConfig  # noqa: E402
from lmdeploy.turbomind import converter  # noqa: E402
from lmdeploy.turbomind.weight_format import AWQFormat  # noqa: E402

out, folder, tensors_file, values_file = sys.argv[1:]
converter._get_executable_dtypes = lambda *_: {"float16", "bfloat16"}
parsed = QuantizationConfig.from_config(get_model_arch(folder)[1])
value = {"pytorch": [parsed.quant_method, parsed.bits, parsed.group_size, list(parsed.ignored_layers)]}
engine = TurbomindEngineConfig(devices=[0])
try:
    model, _, _ = converter.get_tm_config(folder, engine)
    value["turbomind"] = [type(model).__name__, engine.model_format, engine.dtype]
except ValueError as error:
    value["refused"] = str(error)
layout = AWQFormat(block_in=parsed.group_size)
stored = {f".{name}": tensor for name, tensor in load_file(tensors_file).items()}
value["accepts"] = layout.accepts(stored)
kinds = {suffix: layout.suffix_map[suffix] for suffix in stored}
normal = {kinds[suffix]: layout.normalize(tensor, kinds[suffix]).float() for suffix, tensor in stored.items()}
np.save(values_file, layout.dequant(normal, torch.float32)["weight"].numpy())
with open(out, "w") as handle:
    json.dump(value, handle)
