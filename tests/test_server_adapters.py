"""Adapters as models of the server: texts, the list of models, mistakes of clients and of flags."""

# ruff: noqa: F811 (fixtures are imported)
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from ling_kernels import chat  # noqa: E402
from ling_kernels.generate import Engine, cli  # noqa: E402
from ling_kernels.generate.server.command import main  # noqa: E402
from ling_kernels.model import load_model, named_views  # noqa: E402
from ling_kernels.parallel.adapters import BASE, fingerprints  # noqa: E402
from tests.test_engine_adapters import write  # noqa: E402
from tests.test_server import BODY, call, checkpoint, events, service  # noqa: E402, F401


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory):
    """A server with two adapters, and its model and those with an adapter merged."""
    root, folders, models = tmp_path_factory.mktemp("adapters"), {}, {"speller": load_model(checkpoint, torch.float32)}
    for i, name in enumerate(("pirate", "org/poet")):
        folders[name] = root / str(i)
        added = write(folders[name], models["speller"], "dense|down_proj", 4, seed=i, size=1.0)
        models[name] = load_model(checkpoint, torch.float32)
        with torch.no_grad():
            for key, w in named_views(models[name]):
                w += added.get(key, 0)
    return service(checkpoint, dict(adapters=folders), adapters=tuple(folders)), models, folders


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_names_an_adapter(adapted, stream):
    served, models, _ = adapted
    texts = set()
    for name, model in models.items():
        ids = Engine(model).generate([[*b"abc"]], max_new_tokens=9)[0]
        body = BODY | dict(model=name, prompt="abc", max_tokens=9, stream=stream)
        response = call(served, "/v1/completions", body)
        found = events(response.text) if stream else [response.json()]
        assert {e["model"] for e in found} == {name}
        texts.add(text := "".join(e["choices"][0]["text"] for e in found))
        assert text == served.tokenizer.decode(ids)
    assert len(texts) == 3
    chat = dict(model="pirate", messages=[dict(role="user", content="Hi")], temperature=0, max_tokens=4)
    answers = [call(served, "/v1/chat/completions", chat | more).json() for more in ({}, dict(model="speller"))]
    assert answers[0]["choices"][0]["message"] != answers[1]["choices"][0]["message"]


def test_models(adapted):
    served = adapted[0]
    found = call(served, "/v1/models").json()["data"]
    assert [(m["id"], m["parent"]) for m in found] == [
        ("speller", None),
        ("pirate", "speller"),
        ("org/poet", "speller"),
    ]
    assert call(served, "/v1/models/org/poet").json() == found[2]
    assert call(served, "/tokenize", dict(model="pirate", prompt="ab")).json()["tokens"] == [*b"ab"]
    for path, body in (("/v1/completions", BODY), ("/tokenize", dict(prompt="a")), ("/detokenize", dict(tokens=[1]))):
        refused = call(served, path, body | dict(model="parrot"))
        assert refused.status_code == 404
        error = refused.json()["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert error["message"] == "the model 'parrot' does not exist; this server has 'speller', 'pirate', 'org/poet'"


def test_flags(adapted, checkpoint, capsys, tmp_path):
    folder = adapted[2]["pirate"]
    own = shutil.copytree(folder, tmp_path / "own")
    (own / BASE).write_text(json.dumps(fingerprints(Path(checkpoint)) | {"model.safetensors": [1, 2]}))
    flag = "--adapter"
    for flags, message in (
        ([flag, "pirate"], "--adapter pirate is not NAME=FOLDER"),
        ([flag, "=x"], "--adapter =x is not NAME=FOLDER"),
        ([flag, f"a={folder}", flag, f"a={folder}"], "there is another model 'a'"),
        ([flag, f"speller={folder}"], "there is another model 'speller'"),
        ([flag, f"a={tmp_path}/missing"], "is no folder"),
        ([flag, f"a={tmp_path}"], "adapter_config.json: No such file or directory"),
        ([flag, f"a={own}"], f"the adapter {own} is for other weights than those in {checkpoint}"),
    ):
        assert main(["--model", checkpoint, "--port", "0", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_commands_for_one_text(adapted, checkpoint, capsys, monkeypatch):
    _, models, folders = adapted
    model = ["--model", checkpoint]
    flags = [*model, "--prompt", "abc", "--max-new-tokens", "9", "--ignore-eos"]
    for more, name in (([], "speller"), (["--adapter", str(folders["pirate"])], "pirate")):
        ids = Engine(models[name]).generate([[*b"abc"]], max_new_tokens=9, stop_token_ids=())[0]
        assert cli.main([*flags, *more]) == 0
        assert capsys.readouterr().out.rstrip("\n") == adapted[0].tokenizer.decode(ids).rstrip("\n")
    answers = set()
    for more in ([], ["--adapter", str(folders["pirate"])]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi")))
        assert chat.main([*model, "--max-new-tokens", "9", *more]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 2
    assert cli.main([*flags, "--adapter", checkpoint]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
