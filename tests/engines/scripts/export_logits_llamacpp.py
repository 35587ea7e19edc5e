"""Logits of a GGUF file by llama.cpp: FILE, IDS.npy, OUT.npy; and the tokens of TEXTS.json, in OUT.json."""

import json
import sys

import numpy as np
from llama_cpp import Llama

file, ids, out, *texts = sys.argv[1:]
model = Llama(file, n_ctx=512, logits_all=True, n_threads=2, verbose=False)
rows = np.load(ids)
logits = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    logits.append(np.array(model.scores[: len(row)]))
np.save(out, np.stack(logits))
if texts:
    with open(texts[0], encoding="utf-8") as handle:
        pieces = json.load(handle)
    tokens = [model.tokenize(piece.encode(), add_bos=True, special=False) for piece in pieces]
    with open(texts[1], "w", encoding="utf-8") as handle:
        json.dump(tokens, handle)
