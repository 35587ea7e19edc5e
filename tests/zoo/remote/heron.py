"""A language model like no other: comes with its checkpoint, and needs trust_remote_code.

Its norm is its own and calls its vectors gain and shift; keys, values and queries are interleaved in one
matrix; gate and up take turns; blocks are handed a veil and a slope, and their stream by keyword.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class HeronConfig(PretrainedConfig):
    model_type = "heron"

    def __init__(self, letters=128, width=64, depth=2, eyes=4, wings=2, leak=-1, bare=(), **kwargs):
        super().__init__(**kwargs)
        self.letters, self.width, self.depth = letters, width, depth
        self.eyes, self.wings = eyes, wings
        self.leak = leak  # a block that lets its norm's output out by another door
        self.bare = list(bare)  # blocks with no gains, no values, no gates: nothing to move a scale into


class Level(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, stream):
        return stream / stream.abs().mean(-1, keepdim=True) * self.gain + self.shift


class Bare(nn.Module):
    def forward(self, stream):
        return torch.tanh(stream)


class Gaze(nn.Module):
    def __init__(self, config, bare):
        super().__init__()
        self.eyes, self.wings, self.size = config.eyes, config.wings, config.width // config.eyes
        self.kvq = nn.Linear(config.width, (config.eyes + 2 * config.wings) * self.size)
        self.back = nn.Linear(config.width, config.width, bias=False)
        self.bare = bare

    def forward(self, stream, veil, slope):
        batch, time, _ = stream.shape
        each = self.eyes // self.wings
        parts = self.kvq(stream).view(batch, time, self.wings, each + 2, self.size)
        keys, values = (parts[..., i, :].repeat_interleave(each, 2).transpose(1, 2) for i in (0, 1))
        asked = parts[..., 2:, :].reshape(batch, time, self.eyes, self.size).transpose(1, 2)
        weights = (asked @ keys.transpose(-1, -2) / self.size**0.5 + slope).masked_fill(~veil, -1e9)
        seen = (weights.softmax(-1) @ values).transpose(1, 2).reshape(batch, time, -1)
        return self.back(torch.tanh(seen) if self.bare else seen)


class Fishing(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.bare = number in config.bare
        self.first, self.second = (Bare() if self.bare else Level(config.width) for _ in range(2))
        self.gaze = Gaze(config, self.bare)
        self.dive = nn.Linear(config.width, 4 * config.width)
        self.rise = nn.Linear(2 * config.width, config.width)
        self.number, self.leak = number, config.leak

    def forward(self, *, stream, veil, slope):
        calm = self.first(stream)
        stream = stream + self.gaze(calm, veil, slope)
        if self.number == self.leak:
            stream = stream + calm / 10
        deep = self.dive(self.second(stream))
        prey = torch.sigmoid(deep[..., 0::2]) * deep[..., 1::2]
        return (stream + self.rise(torch.tanh(prey) if self.bare else prey), None)


class HeronForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HeronConfig

    def __init__(self, config):
        super().__init__(config)
        self.sounds = nn.Embedding(config.letters, config.width)
        self.flock = nn.ModuleList([Fishing(config, number) for number in range(config.depth)])
        self.last = Level(config.width)
        self.voice = nn.Linear(config.width, config.letters, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.sounds

    def get_output_embeddings(self):
        return self.voice

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        time = input_ids.shape[1]
        places = torch.arange(time, device=input_ids.device)
        veil = (places[:, None] >= places).view(1, 1, time, time)
        if attention_mask is not None:
            veil = veil & attention_mask.bool()[:, None, None, :]
        slope = -(places[:, None] - places).abs().float() / 8
        stream = self.sounds(input_ids)
        for block in self.flock:
            stream, _ = block(stream=stream, veil=veil, slope=slope)
        return CausalLMOutput(logits=self.voice(self.last(stream)))
