"""Load a quantized model and let it continue a prompt.

python generate.py MODEL "Once upon a time"
"""

import sys

from transformers import AutoTokenizer, TextStreamer

import awq

folder, prompt = sys.argv[1:]
model = awq.load_quantized(folder, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
model.generate(**inputs, max_new_tokens=32, streamer=TextStreamer(tokenizer))
