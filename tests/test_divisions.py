"""How processes divide a run: what does not fit is refused in one line before it begins; even layouts; plans."""

import math
from dataclasses import replace

import pytest

from ling_kernels.errors import InputError
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.ranks import Division, Ranks, check_sizes
from ling_kernels.train.__main__ import main
from ling_kernels.train.prepare.checks_parallel import check_parallel
from ling_kernels.train.settings import Settings
from tests.training import tiniest


def test_sizes_that_do_not_fit():
    for size, dp, ep, pp in ((1, 2, 1, 1), (4, 2, 1, 1), (4, 3, 1, 2)):
        with pytest.raises(InputError, match="processes"):
            check_sizes(size, dp, ep, pp)
    with pytest.raises(InputError, match="--ep 3 does not divide the 4"):
        check_sizes(4, 4, 3, 1)
    with pytest.raises(InputError, match="--ep 2 does not divide the 1"):
        Ranks().arranged(ep=2)
    with pytest.raises(InputError, match="--dp 1 times --pp 2 times --cp 3 are 6 processes, and there are 4"):
        check_sizes(4, 1, 1, 2, cp=3)
    with pytest.raises(InputError, match="--vocab-parallel 3 does not divide the 4 processes of --dp and --cp"):
        check_sizes(4, 2, 1, 1, cp=2, vocab=3)
    with pytest.raises(InputError, match="--dp-replicate 3 does not divide --dp 4: each copy of the optimizer's state"):
        check_sizes(4, 4, 1, 1, copies=3)
    with pytest.raises(InputError, match="--ep 4 does not divide the 2 processes of each of --dp-replicate 2 copies"):
        check_sizes(4, 4, 4, 1, copies=2)
    with pytest.raises(InputError, match="--exchange-by-nodes: --ep 2 are not all processes of two or more machines"):
        Ranks(size=4, dp=4).arranged(ep=2, by_nodes=True)


@pytest.mark.parametrize("ranks, settings, message", [
    (dict(dp=2, ep=3), {}, "--ep 3 does not divide the 8 experts"),
    (dict(dp=2, vocab=3), {}, "--vocab-parallel 3 does not divide the vocabulary of"),
    (dict(cp=5), {}, "--seq-len 256 is not a multiple of 10, for --cp 5 to divide"),
    (dict(cp=2, tp=3), {}, "--seq-len 256 is not a multiple of 12, for --cp 2 and --tp 3 to"),
    (dict(tp=2), {}, "--tp 2 does not divide num_key_value_heads 1"),
    (dict(), dict(schedule="GPipe"), "--schedule GPipe needs --pp"),
    (dict(pp=2), dict(schedule="GPipes", micro_batch=1), "--schedule GPipes: it must be one of Interleaved1F1B, "),
    (dict(pp=2), dict(schedule="DualPipeV", micro_batch=1), "--schedule DualPipeV: 2 stages on 2 ranks; it needs two"),
    (dict(pp=2), dict(schedule="no.csv", micro_batch=1), "--schedule no.csv: "),
    (dict(), dict(exchange="fp8"), "--exchange fp8 needs --ep"),
    (dict(dp=2, ep=2), dict(exchange="fp8"), "--exchange fp8 needs --precision fp8 --fp8-scales pow2"),
    (dict(dp=2, ep=2), dict(exchange="fp8", precision="fp8", fp8_scales="pow2"), "--exchange fp8 needs experts in FP8"),
    (dict(pp=2), dict(micro_batch=1, batch_ramp="3:2"), "--batch-ramp 3:2 gives each pipeline 3 micro batches"),
    (dict(dp=2), dict(micro_batch=8), "--batch 8 is not a multiple of --dp 2 times --micro-batch 8"),
    (dict(dp=2), dict(batch_ramp="3:4"), "--batch-ramp 3:4: START is not a multiple of --dp 2"),
    (dict(dp=2), dict(step_in_backward=True), "--step-in-backward is for one process"),
    (dict(dp=1), dict(pipeline="Et|tmL"), "--pipeline Et|tmL needs --pp"),
    (dict(pp=2), dict(pipeline="Et|tL"), "--pipeline Et|tL: 0 m, but"),
    (dict(pp=2), dict(pipeline="Et|x"), "--pipeline Et|x: 'x' is none of"),
    (dict(pp=2), dict(pipeline="Ett||mL"), "--pipeline Ett||mL: 3 stages on 2 ranks"),
    (dict(pp=2), dict(pipeline="Ettm|L"), "--pipeline Ettm|L: process 1 of --pp 2 has no layer"),
    (dict(pp=4), {}, "--pp 4: the model has only 2 layers; give --pipeline"),
    (dict(pp=2), dict(micro_batch=8), "--batch 8 gives each pipeline 1 micro batch, and --pp 2 needs"),
    (dict(dp=2, ep=2), dict(optimizer="adamw8bit"), "--optimizer adamw8bit: the experts of one of --ep 2 processes"),
])  # fmt: skip
def test_what_cannot_be_divided(ranks, settings, message):
    sizes = dict(dp=1, pp=1, cp=1) | ranks
    kinds = dict(experts="ep", vocabulary="vocab", tensor="tp")
    divided = {kind: Division(sizes.pop(flag, 1)) for kind, flag in kinds.items()}
    config = replace(tiniest(), num_nextn_predict_layers=1)
    if settings.get("optimizer"):
        config = replace(config, moe_intermediate_size=1)
    with pytest.raises(InputError) as error:
        s = Settings(batch=8, pp=sizes["pp"], **settings)
        check_parallel(s, config, Ranks(size=math.prod(sizes.values()), **sizes, **divided))
    assert str(error.value).startswith(message)


def test_even_layouts():
    config = replace(tiniest(), num_hidden_layers=7, num_nextn_predict_layers=1)
    assert str(PipelineLayout.even(config, 3)) == "Ett|tt|tttmL"
    PipelineLayout.even(config, 7).check(config)


def test_a_plan_of_the_same_flags(capsys, monkeypatch):
    assert main("--plan --dp 4 --ep 2 --batch 8 --seq-len 32 --steps 2".split()) == 0
    assert "processes     4: dp 4 x cp 1 x tp 1 x pp 1" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # under torchrun rank 0 alone prints it
    assert main("--plan --model tiny --dp 4".split()) == 0
    assert capsys.readouterr() == ("", "")
