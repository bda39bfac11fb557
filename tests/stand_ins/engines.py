"""vLLM's and SGLang's engines: what they are given, and as many tokens as were asked for."""

import json
from pathlib import Path
from types import SimpleNamespace

GIVEN: dict = {}  # of the engine made last


def configuration(folder: str) -> dict:
    """What AutoConfig would read, with the code beside it."""
    given = json.loads(Path(folder, "config.json").read_text())
    module, name = given["auto_map"]["AutoConfig"].split(".")
    space = {}
    code = Path(folder, f"{module}.py").read_text().replace("from transformers import PretrainedConfig", "")
    exec(code, dict(PretrainedConfig=type("PretrainedConfig", (), {})), space)
    assert space[name].model_type == given["model_type"]
    return given


class SamplingParams:
    def __init__(self, *, temperature=1.0, max_tokens=16, ignore_eos=False, detokenize=True):
        assert temperature == 0 and ignore_eos and not detokenize
        self.max_tokens = max_tokens


class LLM:
    def __init__(
        self, model, *, skip_tokenizer_init=False, trust_remote_code=False, dtype="auto", max_model_len=None,
        load_format="auto", max_num_seqs=None, enable_prefix_caching=None,
    ):  # fmt: skip
        assert skip_tokenizer_init and trust_remote_code and load_format == "dummy"
        GIVEN.clear()
        GIVEN.update(configuration(model), length=max_model_len, running=max_num_seqs, shares=enable_prefix_caching)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        texts = [p["prompt_token_ids"] for p in prompts]
        assert all(len(t) + sampling_params.max_tokens <= GIVEN["length"] for t in texts)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(1,) * sampling_params.max_tokens)]) for _ in texts]


class Engine:
    def __init__(
        self, *, model_path, skip_tokenizer_init=False, load_format="auto", trust_remote_code=False, dtype="auto",
        context_length=None, max_running_requests=None, disable_radix_cache=False,
    ):  # fmt: skip
        assert skip_tokenizer_init and trust_remote_code and load_format == "dummy"
        GIVEN.clear()
        GIVEN.update(configuration(model_path), length=context_length, running=max_running_requests,
                     shares=not disable_radix_cache)  # fmt: skip

    def generate(self, prompt=None, sampling_params=None, input_ids=None):
        assert prompt is None and sampling_params["temperature"] == 0 and sampling_params["ignore_eos"]
        new = sampling_params["max_new_tokens"]
        assert all(len(t) + new <= GIVEN["length"] for t in input_ids)
        return [dict(text="", output_ids=[1] * new, meta_info={}) for _ in input_ids]
