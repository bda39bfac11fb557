"""The tiny checkpoints of tests/data as a user of transformers has them, and what the official model computes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"
NAMES = ("base", "yarn", "mtp1")
TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # fp32 against fp32, summed in another order


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(DATA / name / "expected.safetensors")


def checkpoint(name: str, folder: Path, **fields) -> Path:
    """The weights, and the config.json with the model_type that the published ones have."""
    shutil.copy(DATA / name / "model.safetensors", folder)
    content = json.loads((DATA / name / "config.json").read_text()) | {"model_type": "bailing_moe"} | fields
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def greedy(model, prompt: torch.Tensor, **kwargs) -> torch.Tensor:
    """The prompt and 12 more tokens."""
    mask = kwargs.pop("attention_mask", torch.ones_like(prompt))
    return model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
                          pad_token_id=0, **kwargs)  # fmt: skip


def last_logits_of_left_padded(model, of: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = of["leftpad.mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=of["leftpad.input_ids"], attention_mask=mask, position_ids=positions).logits[:, -1]
