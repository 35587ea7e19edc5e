"""How transformers alone reads a folder's configuration: OUT.json FOLDER."""

import importlib.util
import json
import sys

import transformers
from transformers import AutoConfig
from transformers.quantizers import AutoQuantizationConfig

out, folder = sys.argv[1:]
if "awq" in sys.modules:
    sys.exit("our package is loaded; it must not be")
entry = AutoConfig.from_pretrained(folder).quantization_config
parsed = AutoQuantizationConfig.from_dict(entry)
value = {
    "version": transformers.__version__,
    "ours_installed": importlib.util.find_spec("awq") is not None,
    "class": f"{type(parsed).__module__}.{type(parsed).__name__}",
    "fields": parsed.to_dict(),
}
with open(out, "w") as handle:
    json.dump(value, handle, default=str)
