"""Post-training: policy losses, sentences and rewards that any trainer can call, and two that train with them.

The import is light: torch is loaded at the first use of a name, so that processes of reward functions start at once.
"""

import importlib
from typing import TYPE_CHECKING

EXPORTS = dict(
    dpo=("Dpo", "DpoSettings"),
    loop=("Loop", "LoopSettings"),
    padded=("padded_policy_loss", "sentence_numbers", "verl_policy_loss"),
    policy=("AVERAGES", "ICEPOP", "LEVELS", "METHODS", "PolicyLoss", "group_advantages", "icepop", "policy_loss"),
    preference=("PreferenceLoss", "preference_loss"),
    reward_processes=("RewardProcesses", "Score"),
    rewards=("apex_eval", "bradley_terry", "evo_cot_rewards", "length_rewards", "pass_at_k", "win_rates"),
    rollout=("Answer", "answer_logp"),
    rollout_function=("RolloutFunction",),
    sentences=("PAUSES", "sentence_lengths"),
    tasks=("TASKS", "Problem", "exact"),
)
FILES = {name: file for file, names in EXPORTS.items() for name in names}

__all__ = sorted(FILES)

if TYPE_CHECKING:
    from .dpo import Dpo as Dpo
    from .dpo import DpoSettings as DpoSettings
    from .loop import Loop as Loop
    from .loop import LoopSettings as LoopSettings
    from .padded import padded_policy_loss as padded_policy_loss
    from .padded import sentence_numbers as sentence_numbers
    from .padded import verl_policy_loss as verl_policy_loss
    from .policy import AVERAGES as AVERAGES
    from .policy import ICEPOP as ICEPOP
    from .policy import LEVELS as LEVELS
    from .policy import METHODS as METHODS
    from .policy import PolicyLoss as PolicyLoss
    from .policy import group_advantages as group_advantages
    from .policy import icepop as icepop
    from .policy import policy_loss as policy_loss
    from .preference import PreferenceLoss as PreferenceLoss
    from .preference import preference_loss as preference_loss
    from .reward_processes import RewardProcesses as RewardProcesses
    from .reward_processes import Score as Score
    from .rewards import apex_eval as apex_eval
    from .rewards import bradley_terry as bradley_terry
    from .rewards import evo_cot_rewards as evo_cot_rewards
    from .rewards import length_rewards as length_rewards
    from .rewards import pass_at_k as pass_at_k
    from .rewards import win_rates as win_rates
    from .rollout import Answer as Answer
    from .rollout import answer_logp as answer_logp
    from .rollout_function import RolloutFunction as RolloutFunction
    from .sentences import PAUSES as PAUSES
    from .sentences import sentence_lengths as sentence_lengths
    from .tasks import TASKS as TASKS
    from .tasks import Problem as Problem
    from .tasks import exact as exact
else:

    def __getattr__(name: str):
        if name not in FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f".{FILES[name]}", __name__), name)
        return value
