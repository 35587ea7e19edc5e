"""What SGLang makes of a quantization_config and of a layer's tensors: OUT.json REQUEST.json.

The request holds `config` and `layers`, `{name: [in, [out, …]]}`; the result SGLang's reading of the config,
and for each layer the dtype and shape of every tensor that SGLang has place for.

Its module is imported as it is. `torchvision`, which it wants on the way and which there is no build of for
every torch, is stood in for by an object that does nothing.
"""

import importlib.abc
import importlib.machinery
import json
import sys
from unittest.mock import MagicMock

import torch
import transformers  # noqa: F401 (looks for torchvision before it is stood in for)


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[])

    def exec_module(self, module) -> None:
        """There is nothing to run."""


sys.meta_path.insert(0, StandIn())
from sglang.srt.layers.quantization import get_quantization_config  # noqa: E402
from sglang.srt.layers.quantization.awq.awq import is_layer_skipped_awq  # noqa: E402
from sglang.srt.layers.quantization.awq.schemes import AWQLinearScheme  # noqa: E402

out, request_file = sys.argv[1:]
with open(request_file) as handle:
    request = json.load(handle)
config = get_quantization_config("awq").from_config(request["config"])
shapes = {}
for name, (inputs, outputs) in request["layers"].items():
    layer = torch.nn.Module()
    AWQLinearScheme(config).create_weights(
        layer=layer,
        input_size_per_partition=inputs,
        output_partition_sizes=outputs,
        params_dtype=torch.float16,
        weight_loader=None,
    )
    shapes[name] = {key: [str(p.dtype), list(p.shape)] for key, p in layer.named_parameters()}
value = {
    "bits": config.weight_bits,
    "group_size": config.group_size,
    "zero_point": config.zero_point,
    "skipped": [
        name for name in request["layers"] if is_layer_skipped_awq(name, config.modules_to_not_convert)
    ],
    "shapes": shapes,
}
with open(out, "w") as handle:
    json.dump(value, handle)
