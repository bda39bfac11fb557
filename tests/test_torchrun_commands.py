"""The commands of docs/scale-out.md and examples/slurm.sbatch: torchrun and the trainer take their flags, and the model
can be divided as they say."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser, parse_min_max_nnodes

from ling_kernels.plan.processes import one_process, processes_of
from ling_kernels.train.flags import parser
from ling_kernels.train.prepare.checks import check
from ling_kernels.train.prepare.models import model_config
from ling_kernels.train.scaling import with_defaults
from ling_kernels.train.settings import settings_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scale-out.md").read_text()
JOB = (ROOT / "examples" / "slurm.sbatch").read_text()


def commands(text: str, start: str) -> list[list[str]]:
    """The words after the pattern `start` of each command that begins with it, at the beginning of a line."""
    lines = re.findall(rf"^{start} ((?:.*\\\n)*.*)", text, re.M)
    return [shlex.split(line.replace("\\\n", ""), comments=True) for line in lines]


def of_torchrun(words: list[str]) -> tuple[int, list[str]]:
    """The number of processes, and the trainer's flags."""
    args = get_args_parser().parse_args([{"$SLURM_NNODES": "8"}.get(word, word) for word in words])
    assert args.module and args.training_script == "ling_kernels.train"
    return parse_min_max_nnodes(args.nnodes)[1] * int(args.nproc_per_node), args.training_script_args


OF_TORCHRUN = [
    *(of_torchrun(words) for words in commands(PAGE, "torchrun(?= --)")),
    *(of_torchrun([word for word in words if word != "$@"]) for words in commands(JOB, "srun torchrun")),
]
OF_RAY = [(int(words[0]), words[1:]) for words in commands(PAGE, "python examples/ray_train.py")]
ALONE = [(1, words) for words in commands(PAGE, "python -m ling_kernels.train")]


def test_the_commands_are_found():
    assert [size for size, _ in OF_TORCHRUN] == [8, 64, 64] and [size for size, _ in OF_RAY] == [8]
    assert PAGE.count("torchrun --") == 2 and JOB.count("srun torchrun") == 1 and len(ALONE) == 1


@pytest.mark.parametrize("size, flags", [*ALONE, *OF_TORCHRUN, *OF_RAY])
def test_the_trainer_takes_the_flags(size, flags):
    options = vars(parser().parse_args(flags))
    given = {name: options.pop(name) for name in ("out", "resume", "plan", "recipe", "source")}
    assert not given["plan"] and not given["recipe"]
    assert options["data"] if "--data" in flags else size == 64  # the job's data is given to sbatch
    settings = settings_of(options)
    config, _ = model_config(settings)
    settings, _ = with_defaults(settings, config, trained=False)
    check(settings, config)
    settings = replace(settings, dp=size // (settings.pp * settings.cp * settings.tp))
    assert processes_of(settings) == size
    if size > 1:
        with one_process(config, settings) as shares:  # raises what the trainer refuses
            assert shares.ranks.size == size and shares.ranks.experts.number == settings.ep > 1
