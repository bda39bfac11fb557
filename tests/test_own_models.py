"""Models of one's own sizes, the vocabulary, the end token, and defaults that follow the model's size."""

# ruff: noqa: F811 (fixtures are imported)
import json
from dataclasses import replace

import pytest

from ling_kernels.errors import InputError
from ling_kernels.model import LingConfig, load_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Settings, Trainer
from ling_kernels.train.prepare.models import initial_config
from ling_kernels.train.scaling import batch_tokens, flops_per_token, peak_lr, trained_peak_lr, with_defaults
from ling_kernels.train.settings import settings_of
from tests.training import one_line_error, small, text, tiniest  # noqa: F401


def sizes(model="tiny", **settings) -> LingConfig:
    config, weights = initial_config(Settings(model=model, **settings))
    assert weights is None
    return config


def test_a_config_alone_has_random_weights(tmp_path, text):
    """As a file, or as a folder; the file's own sizes, the byte-level tokenizer's end token."""
    tiniest().to_json(tmp_path / "config.json")
    for model in (tmp_path, tmp_path / "config.json"):
        assert sizes(str(model)) == tiniest()
    trainer = Trainer(Settings(model=tmp_path / "config.json", data=text, steps=1, seq_len=32), tmp_path / "run")
    assert trainer.notes[0].startswith("weights    random")
    trainer.step()
    trainer.save()
    trainer.export(tmp_path / "model")
    assert load_model(tmp_path / "model").config.eos_token_id == load_tokenizer().eos_id
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 16}))
    with pytest.raises(InputError, match="num_experts is 8 in .* and 16 in"):
        Trainer.resume(tmp_path / "run", steps=2)


def test_incomplete_weights_are_not_replaced_by_random_ones(tmp_path, small):
    tiniest().to_json(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    config, weights = initial_config(Settings(model=tmp_path))
    assert weights == tmp_path and config == tiniest()
    with pytest.raises(InputError, match="--hidden 64: .* has weights, which fix the model's sizes"):
        initial_config(Settings(model=small, hidden=64))


def test_sizes_follow_the_ratios_of_the_preset():
    tiny, one = LingConfig.tiny(), sizes(hidden=512, layers=8, experts=32, topk=4)
    assert (one.hidden_size, one.num_hidden_layers, one.num_experts) == (512, 8, 32)
    assert one.intermediate_size == 4 * tiny.intermediate_size and one.moe_intermediate_size == 256
    assert one.num_attention_heads * one.head_dim == 512 and one.first_k_dense_replace == 1
    assert one.num_experts % one.n_group == 0 and one.topk_group <= one.n_group
    assert sizes("mini", layers=40).first_k_dense_replace == 2
    assert sizes(head_dim=64).num_attention_heads == 2 and sizes(mtp=0).num_nextn_predict_layers == 0
    assert sizes(positions=4096).max_position_embeddings == 4096
    assert sizes(moe_intermediate=128, intermediate=256).moe_intermediate_size == 128


@pytest.mark.parametrize("given, message", [
    (dict(heads=5), "5 heads do not divide 128: give --heads or --head-dim"),
    (dict(experts=2), "a token takes 4 of 2 experts: give --topk or --experts"),
    (dict(layers=0), "--layers is 0, not an integer >= 1"),
    (dict(experts=9, groups=4), "--experts 9 --groups 4 over tiny: .*--groups"),
])  # fmt: skip
def test_sizes_that_do_not_go_together(given, message):
    with pytest.raises(InputError, match=message):
        sizes(**given)


def test_the_vocabulary_follows_the_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from ling_kernels.tokenizer.train import train_tokenizer

    assert tokenizers and sizes().vocab_size == 320
    letters = "abcdefghijklmnop"
    words = [" ".join(letters[i % 16] + letters[j % 16] + letters[(i + j) % 16] for j in range(200)) for i in range(60)]
    train_tokenizer(words, 700).save(tmp_path)
    number = load_tokenizer(tmp_path).vocab_size
    assert number > 320
    rounded = -(-number // 128) * 128
    assert sizes(tokenizer=tmp_path).vocab_size == sizes(tokenizer=tmp_path, vocab="auto").vocab_size == rounded
    assert sizes(vocab="auto").vocab_size == 384 and sizes(vocab=1000).vocab_size == 1000
    with pytest.raises(InputError, match="more than the 512 of vocab 512; vocab auto"):
        Trainer(Settings(vocab=512, tokenizer=tmp_path, steps=1), tmp_path / "run")
    with pytest.raises(InputError, match="auto or a whole number"):
        Settings(vocab="many")


@pytest.mark.parametrize("name, published_lr, published_batch", [
    ("mini", 3.36e-4, 4400), ("flash", 2.61e-4, 8352), ("1t", 1.86e-4, 18144),
])  # fmt: skip
def test_the_laws_give_the_published_settings(name, published_lr, published_batch):
    """Table 1 of arXiv 2510.22115: learning rate within 2 %, batch (rows of 4096 tokens) within 9 %."""
    compute = flops_per_token(LingConfig.preset(name), 4096) * 20e12
    assert peak_lr(compute) == pytest.approx(published_lr, rel=0.02)
    assert batch_tokens(compute) / 4096 == pytest.approx(published_batch, rel=0.09)


def test_defaults_and_where_they_come_from(small, capsys):
    tiny, lines = with_defaults(settings_of({}), LingConfig.tiny(), False)
    assert (tiny.lr, tiny.warmup, tiny.batch) == (2e-3, 40, 4) and lines[0].count("(recipe)") == 3
    given = dict(lr=2e-3, batch=4)  # the values of the recipe
    same, lines = with_defaults(settings_of(given), LingConfig.tiny(), False, given)
    assert same == tiny and lines[0].count("(given)") == 2 and "warm-up 40 steps (recipe)" in lines[0]
    bigger = replace(LingConfig.tiny(), hidden_size=256)
    own, lines = with_defaults(Settings(hidden=256, batch=8), bigger, False)
    assert own.batch == 8 and "batch 8 rows of 256 tokens (given)" in lines[0] and "(Ling's scaling law)" in lines[0]
    assert 0 < own.lr < 0.01 and own.warmup == 40
    trained, lines = with_defaults(Settings(model=small), tiniest(), True)
    peak = trained_peak_lr(tiniest(), 256)
    assert trained.lr == pytest.approx(0.1 * peak, rel=0.01) and len(lines) == 1
    _, lines = with_defaults(settings_of(dict(steps=20)), LingConfig.tiny(), False)
    assert lines[1].endswith("the warm-up of 40 steps is longer than the run of 20")
    _, lines = with_defaults(Settings(model=small, lr=2 * peak), tiniest(), True)
    assert "is above" in lines[1]
    mini, _ = with_defaults(Settings(model="mini", **Settings(model="mini").recipe()), LingConfig.mini(), False)
    assert mini.lr == 3.36e-4


def test_an_end_token_of_the_tokenizers_own(tmp_path, small, text, capsys):
    """The data ends documents with the tokenizer's; a model's folder that names another is told so."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    trainer = Trainer(Settings(model=folder, data=text, steps=1, seq_len=32, batch=2), tmp_path / "run")
    assert any("the end token is 7 in" in note for note in trainer.notes)
    trainer.export(tmp_path / "out")
    assert load_model(tmp_path / "out").config.eos_token_id == trainer.tokenizer.eos_id != 7


def test_bad_sizes_are_one_line(tmp_path, capsys):
    assert "5 heads" in one_line_error(["--heads", "5", "--out", str(tmp_path / "run")], capsys)
    assert "--vocab" in one_line_error(["--vocab", "-3", "--out", str(tmp_path / "run")], capsys)
    (tmp_path / "weights.txt").write_text("x")
    assert "give a config.json" in one_line_error(["--model", str(tmp_path / "weights.txt")], capsys)
