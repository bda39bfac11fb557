"""Objectives of post-training that any trainer can call: policy losses, sentences, rewards."""

from .policy import AVERAGES, ICEPOP, LEVELS, PolicyLoss, group_advantages, icepop, policy_loss
from .rewards import apex_eval, bradley_terry, evo_cot_rewards, length_rewards, pass_at_k, win_rates
from .sentences import PAUSES, sentence_lengths

__all__ = [
    "AVERAGES", "ICEPOP", "LEVELS", "PAUSES", "PolicyLoss", "apex_eval", "bradley_terry", "evo_cot_rewards",
    "group_advantages", "icepop", "length_rewards", "pass_at_k", "policy_loss", "sentence_lengths", "win_rates",
]  # fmt: skip
