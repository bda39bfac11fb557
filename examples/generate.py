"""Generate text with the serving engine.

    python examples/generate.py                      a tiny model with random weights, so the text is noise
    python examples/generate.py FOLDER "The " 64     a checkpoint folder (Hugging Face's layout), a prompt, a length

`python -m ling_kernels.generate` and the OpenAI-compatible server run the same engine: docs/serving.md.
"""

import sys

import torch

from ling_kernels.generate import Engine, Sampling, stream_text
from ling_kernels.model import Ling, LingConfig, load_model
from ling_kernels.tokenizer import load_tokenizer

folder = sys.argv[1] if len(sys.argv) > 1 else None
prompt = sys.argv[2] if len(sys.argv) > 2 else "The "
length = int(sys.argv[3]) if len(sys.argv) > 3 else 16
device = "cuda" if torch.cuda.is_available() else "cpu"

if folder:
    model = load_model(folder, device=device)
else:
    model = Ling(LingConfig.tiny())
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
tokenizer = load_tokenizer(folder)  # bytes where there is no folder
ids = tokenizer.encode(prompt)

# A stream, token by token. Draft tokens (here from the MTP layer) change the speed, not the text.
engine = Engine(model, cache_tokens=4096, draft=1)
print(prompt, end="")
for piece in stream_text(engine.stream(ids, max_new_tokens=length), tokenizer, prompt=ids):
    print(piece, end="", flush=True)
print()

# A batch: all prompts run together, and every text has the seed's own random numbers.
outputs = engine.generate([ids, ids[:1]], sampling=Sampling(temperature=0.8, top_p=0.9, seed=1), max_new_tokens=length)
for output in outputs:
    print(repr(tokenizer.decode(output)))
