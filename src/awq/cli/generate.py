"""`awq generate`: continue a prompt, printing words as they come."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from awq.cli.common import console, load_model, load_tokenizer, quiet_libraries
from awq.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name; float or quantized.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from the standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option(help="Format the prompt with the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
    kernel: Annotated[str | None, typer.Option(help="Insist on a kernel for the quantized layers.")] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="8 rounds the output head of a quantized model, on a CPU.")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fewer calls for each token of a quantized model.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Generate text from a prompt."""
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError("--max-new-tokens must be at least 1, --temperature at least 0, --top-p in (0, 1]")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("the prompt is empty")
    import torch
    from transformers import TextStreamer

    quiet_libraries()
    loaded = load_model(
        model, dtype, device, trust_remote_code, kernel=kernel, head_bits=head_bits, fuse=fuse
    )
    tokenizer = load_tokenizer(model, trust_remote_code)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError(f"{model} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    ids = inputs["input_ids"].to(loaded.device)
    room = _room(loaded, ids.shape[1])
    if room < max_new_tokens:
        console("-").print(
            f"the model's context has room for {room} tokens behind the prompt", style="yellow"
        )
    if seed is not None:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    started = time.perf_counter()
    output = loaded.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, room),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **options,
    )
    seconds = time.perf_counter() - started
    new = output.shape[1] - ids.shape[1]
    console("-").print(f"{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s", style="dim")


def _room(model: Any, tokens: int) -> int:
    """Tokens that can follow `tokens` of prompt in the model's context.

    Raises:
        ConfigError: none can.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return sys.maxsize
    if tokens >= limit:
        raise ConfigError(f"the prompt has {tokens} tokens, and the model's context ends at {limit}")
    return limit - tokens
