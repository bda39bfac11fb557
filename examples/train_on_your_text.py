"""Train a small Ling-2.0 on your own text, then continue a prompt with it.

    python examples/train_on_your_text.py TEXTS OUT [STEPS]

TEXTS is a text, .jsonl or .parquet file, or a folder of them; OUT is a new folder for checkpoints and the model. The
command `python -m ling_kernels.train --data TEXTS --out OUT` is the same loop with checkpoints on the way and a
`Report` (ling_kernels.train.report), which writes metrics.jsonl and report.html.
"""

import sys

from ling_kernels.generate import Engine
from ling_kernels.model import load_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Settings, Trainer

texts, out = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200

trainer = Trainer(Settings(data=(texts,), steps=steps, seq_len=64, batch=4, warmup=5, eval_rows=8, holdout=4), out=out)
start = trainer.evaluate()["val_loss"]
while trainer.progress.step < trainer.settings.steps:
    record = trainer.step()
    if record["step"] % 10 == 0:
        print(f"step {record['step']}: loss {record['loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s")
end = trainer.evaluate()["val_loss"]
print(f"held-out loss {start:.3f} -> {end:.3f} nats per token")
trainer.save()  # Trainer.resume(out, steps=400) continues from here, bit for bit
trainer.export(f"{out}/model")  # a Hugging Face folder

model, tokenizer = load_model(f"{out}/model"), load_tokenizer(f"{out}/model")
continuation = Engine(model, cache_tokens=1024).generate([tokenizer.encode("The ")], max_new_tokens=20)[0]
print(repr("The " + tokenizer.decode(continuation)))
