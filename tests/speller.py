"""A checkpoint with a known continuation for each token, for tests of commands and servers."""

import dataclasses

import torch

from ling_kernels.model import Ling, LingConfig, save_model
from ling_kernels.tokenizer import load_tokenizer

BOS, EOS, ROLE_END, ROLE, END_OF_ROLE = 256, 257, 260, 261, 262
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# The next token after each token: the alphabet, then EOS; "?é!"; and XYZ as a chat answer.
NEXT = dict(zip(LETTERS.encode(), [*LETTERS[1:].encode(), EOS], strict=True))
NEXT |= dict(zip(b"?\xc3\xa9!", [*b"\xc3\xa9!", EOS], strict=True))
NEXT |= {END_OF_ROLE: ord("X"), ord("X"): ord("Y"), ord("Y"): ord("Z"), ord("Z"): ROLE_END, ROLE_END: ord("u")}
NEXT |= {BOS: ord("p"), EOS: ord("a")}


def speller(folder, positions: int = 200):
    """Save a checkpoint that continues token t with NEXT[t]; returns the folder.

    Its blocks add almost nothing to the embedding E[t], and row NEXT[t] of its head is E[t].
    """
    torch.manual_seed(0)
    model = Ling(dataclasses.replace(LingConfig.tiny(), num_hidden_layers=2, max_position_embeddings=positions))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = model.word_embeddings.weight.normal_()
        tokens, next_tokens = torch.tensor([*NEXT.items()]).T
        model.lm_head.weight.zero_().index_add_(0, next_tokens, embedding[tokens] / 10)
    save_model(model, folder)
    load_tokenizer().save(folder)
    return str(folder)
