"""Replace the MoE blocks of a transformers model by ling_kernels.nn.MoE, with the same parameters.

    pip install '.[examples]'
    python examples/transformers_moe.py

DeepSeek-V3 routes as Ling-2.0 does: sigmoid scores, a bias that only selects, the best groups, normalised weights. So
its blocks need no conversion: the parameters move over as they are. Another model fits if its router and expert do.
"""

import torch
from torch import Tensor, nn

try:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
except ModuleNotFoundError as error:
    raise SystemExit(f"error: this example needs the package {error.name}: pip install '.[examples]'") from None

from ling_kernels.nn import MLP, Experts, MoE, Router


class Block(nn.Module):
    """nn.MoE over the parameters of a DeepseekV3MoE: hidden states [B, L, H] -> [B, L, H]."""

    def __init__(self, theirs: DeepseekV3MoE):
        super().__init__()
        c = theirs.config
        if c.hidden_act != "silu" or not c.norm_topk_prob:
            raise ValueError("nn.MoE has SwiGLU experts and normalised weights")
        H, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
        with torch.device("meta"):  # no memory for weights that are replaced at once
            router = Router(H, E, c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor)
            experts, shared = Experts(E, H, F), MLP(H, F * c.n_shared_experts)
        router.weight = theirs.gate.weight
        router.expert_bias = theirs.gate.e_score_correction_bias
        router.counts = torch.zeros(E, dtype=torch.int32, device=router.weight.device)
        experts.gate_up, experts.down = theirs.experts.gate_up_proj, theirs.experts.down_proj
        # Gate and up projections are one matrix here: the gate's rows, then up's.
        gate, up = theirs.shared_experts.gate_proj.weight, theirs.shared_experts.up_proj.weight
        shared.gate_up.weight = nn.Parameter(torch.cat([gate, up]).detach())
        shared.down.weight = theirs.shared_experts.down_proj.weight
        self.moe = MoE(router, experts, shared)

    def forward(self, hidden_states: Tensor) -> Tensor:
        y, _ = self.moe(hidden_states.flatten(0, -2))  # the second result is the router's z-loss, not asked for
        return y.view_as(hidden_states)


torch.manual_seed(0)
config = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2,
    n_group=4, topk_group=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
)  # fmt: skip
model = DeepseekV3ForCausalLM(config)
for p in model.parameters():
    if p.ndim > 1:
        nn.init.normal_(p, std=0.2)
ids = torch.randint(0, config.vocab_size, (2, 12))


def logits_and_gradient() -> tuple[Tensor, Tensor]:
    out = model(ids, labels=ids)
    (gradient,) = torch.autograd.grad(out.loss, model.model.embed_tokens.weight)
    return out.logits.detach(), gradient


before = logits_and_gradient()
replaced = 0
for name, module in [*model.named_modules()]:
    if isinstance(module, DeepseekV3MoE):
        model.set_submodule(name, Block(module))
        replaced += 1
after = logits_and_gradient()

for what, a, b in zip(("logits", "gradient of the embedding"), before, after, strict=True):
    print(f"{what}: largest value {a.abs().max():.3g}, largest difference {(a - b).abs().max():.2g}")
print(f"{replaced} MoE block replaced")
