"""What is true of one architecture: discovered, proved, quantized, loaded again. Every figure is measured.

The original is transformers' own model. Folding is judged on the logits of the whole model, not block by
block; the quantized checkpoint goes to disk and comes back through `AutoModelForCausalLM`, and is compared
with a plain float model that holds the dequantized weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq import QuantConfig
from awq.calibration import load_calibration
from awq.errors import AwqError
from awq.model import auto_class, find_blocks, hidden_of, open_model
from awq.model.invariance import apply, prove
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline import quantize
from awq.pipeline.discover import discover
from awq.pipeline.feed import Feed
from awq.pipeline.kinds import KindPlan
from awq.pipeline.precision import float32_by_default

CONFIG = QuantConfig(group_size=32)
# Largest change of the logits by folding random scales into every proven fold, relative to the largest logit.
INVARIANT = 1e-4
# Largest difference between a block run alone, on what the blocks before it gave, and inside its model.
STREAMED = 1e-5
# Largest difference of the loaded checkpoint's logits from the dequantized model's, relative as well.
SAME = 1e-4
_VOCABULARY, _CPU = 128, torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture's measurements.

    Args:
        kinds: of block, as `(class, how many)`.
        proposed, proved: folds in all blocks.
        change: of the logits by folding random scales into all that were proved.
        quantized: linear layers quantized.
        linears: linear layers in the blocks.
        floats: layers inside the blocks that stay float, by their names there, with the reason.
        unscaled: layers quantized without a scale, likewise.
        others: matrices in the blocks that belong to no linear layer, with what holds them.
        streamed: difference of the last block's output, block by block, from that inside the whole model.
        ratio: divergence of the quantized model from the original, relative to plain rounding's.
        differs: of the loaded model's logits from the dequantized model's.
        refused: why the model is not quantized at all; then nothing else is measured.
    """

    kinds: tuple[tuple[str, int], ...] = ()
    proposed: int = 0
    proved: int = 0
    change: float = 0.0
    quantized: int = 0
    linears: int = 0
    floats: dict[str, str] = dataclasses.field(default_factory=dict)
    unscaled: dict[str, str] = dataclasses.field(default_factory=dict)
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    streamed: float = 0.0
    ratio: float = 0.0
    differs: float = 0.0
    refused: str = ""


def measure(
    model: Any,
    source: Path,
    work: Path,
    fused: tuple[str, str, str] | None = None,
    images: Sequence[Mapping[str, Tensor]] = (),
) -> Row:
    """Take an architecture all the way.

    Args:
        model: the original, float32.
        source: its checkpoint.
        work: an empty folder for results.
        fused: see `zoo.text.Architecture`.
        images: for a vision-language model inputs with images; all but the last calibrate beside text, and
            the last one is judged by beside text.
    """
    texts = _tokens(24, 40, seed=1)
    samples = [*texts, *images[:-1]]
    try:
        folded = _folded(source, [*texts[:2], *images[:1]])
    except AwqError as error:
        return Row(refused=str(error).replace(f"{source}: ", ""))
    inputs = [{"input_ids": torch.stack(_tokens(4, 32, seed=2))}, *images[-1:]]
    original = _logits(model, inputs)
    change = _relative(_logits(folded.model, inputs), original)
    report = quantize(source, work / "awq", CONFIG, samples, device="cpu", verify=False)
    quantize(
        source, work / "rtn", dataclasses.replace(CONFIG, method="rtn"), samples, device="cpu", verify=False
    )
    loaded = _logits(_load(work / "awq"), inputs)
    rounded = _logits(_load(work / "rtn"), inputs)
    reference = _logits(_load(_dequantized(work / "awq", work / "plain", model, fused)), inputs)
    counts = Counter(map(id, folded.kinds))
    kinds = list({id(kind): kind for kind in folded.kinds}.values())
    told = [kind.describe([]) for kind in kinds]
    return Row(
        kinds=tuple((kind.name, counts[id(kind)]) for kind in kinds),
        proposed=folded.proposed,
        proved=folded.proved,
        change=change,
        quantized=len(report.plan.quantized),
        linears=sum(len(kind.layers) + len(kind.skipped) for kind in folded.kinds),
        floats={name: reason for kind in told for name, reason in kind["skipped"].items()},
        unscaled={name: reason for kind in told for name, reason in kind["unscaled"].items()},
        others={name: holder for kind in told for name, holder in kind["others"].items()},
        streamed=max(
            _relative(output, _last_output(model, folded.last, given))
            for output, given in zip(
                folded.outputs, [{"input_ids": torch.stack(texts[:2])}, *images[:1]], strict=True
            )
        ),
        ratio=_divergence(loaded, original) / _divergence(rounded, original),
        differs=_relative(loaded, reference),
    )


@dataclasses.dataclass
class _Folded:
    """A model with random scales folded into every proven fold of every block.

    `outputs` are what its last block, whose name is `last`, gave for the samples before the folding.
    """

    model: Any
    kinds: list[KindPlan]
    last: str
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    proposed: int = 0
    proved: int = 0


@torch.no_grad()
@float32_by_default()
def _folded(source: Path, samples: list[Any]) -> _Folded:
    skeleton = open_model(source)
    name, blocks = find_blocks(skeleton.model)
    read = load_calibration(samples, None).samples
    feed = Feed(skeleton, name, read, 128, _CPU)
    _, kinds = discover(skeleton, name, blocks, feed, CONFIG, _CPU)
    out = _Folded(skeleton.model, kinds, f"{name}.{len(blocks) - 1}")
    generator = torch.Generator().manual_seed(3)
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        skeleton.load(block, f"{name}.{index}", _CPU)
        probe, single = feed.probes_at(index)
        out.proposed += len(kind.structure.folds)
        proofs = prove(block, kind.structure.folds, lambda b=block, p=probe: p.whole(b, _CPU))
        behind = [batch.run(block, _CPU, keep=True) for batch in (*feed.at(index), probe, single)]
        for proof in proofs:
            if proof.holds:
                out.proved += 1
                scale = (torch.rand(len(proof.fold.rows), generator=generator) * 2 - 1).exp()
                apply(block, proof.fold, scale)
        feed.hidden = behind
    out.outputs = feed.hidden[:-2]  # without the probes
    around = [(path, m) for path, m in skeleton.model.named_modules() if not path.startswith(f"{name}.")]
    skeleton.load_modules(around, _CPU)
    return out


@torch.no_grad()
def _last_output(model: Any, block: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a block gives for an input inside the whole model."""
    seen: list[Any] = []
    handle = model.get_submodule(block).register_forward_hook(lambda *args: seen.append(args[2]))
    model(**inputs, use_cache=False)
    handle.remove()
    return hidden_of(seen[0])


def _dequantized(quantized: Path, out: Path, model: Any, fused: tuple[str, str, str] | None) -> Path:
    """A float checkpoint with the values that the codes stand for; `model` is the original."""
    turned = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    shutil.copytree(quantized, out)
    checkpoint = QuantizedCheckpoint(quantized)
    tensors = load_file(quantized / "model.safetensors")
    for name in checkpoint.layers:
        for leaf in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{leaf}"]
        values = checkpoint.weight(name).dequantize()
        tensors[f"{name}.weight"] = values.t().contiguous() if name in turned else values
    if fused is not None:
        fuse(tensors, *fused)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def fuse(tensors: dict[str, Tensor], gate_up: str, down: str, how: str) -> None:
    """Put experts' projections together as the hub keeps them, in place.

    Args:
        tensors: a checkpoint's; projections are `[out, in]`.
        gate_up, down: names of the fused tensors, beside the experts.
        how: `rows` stacks gate and up, `columns` transposes the stack, `alternating columns` also lets the
            rows of gate and up take turns.
    """
    pattern = re.compile(r"(.+\.)experts\.(\d+)\.(\w+)_proj\.weight")
    found: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key in list(tensors):
        if match := pattern.fullmatch(key):
            found.setdefault(match[1], {})[int(match[2]), match[3]] = tensors.pop(key)
    for stem, parts in found.items():
        numbers = sorted({number for number, _ in parts})
        pairs = [(parts[n, "gate"], parts[n, "up"]) for n in numbers]
        if how == "alternating columns":
            stacks = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]
        else:
            stacks = [torch.cat(pair) for pair in pairs]
        downs = [parts[n, "down"] for n in numbers]
        turned = how != "rows"
        for name, weights in ((gate_up, stacks), (down, downs)):
            tensors[f"{stem}{name}"] = torch.stack([w.t() if turned else w for w in weights]).contiguous()


def _load(folder: Path) -> Any:
    """Through transformers alone, computing in float32; a missing or unexpected key fails."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        config.quantization_config["backend"] = "torch"
    model, info = auto_class(config).from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def _tokens(rows: int, length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, _VOCABULARY, (rows, length), generator=generator))


@torch.no_grad()
def _logits(model: Any, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """float32 `[tokens of all inputs, vocabulary]`."""
    each = [model(**given, use_cache=False).logits.float() for given in inputs]
    return torch.cat([logits.flatten(0, -2) for logits in each])


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def _divergence(logits: Tensor, original: Tensor) -> float:
    """Mean divergence of next-token distributions, in nats."""
    ours, theirs = logits.double().log_softmax(-1), original.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
