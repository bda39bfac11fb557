#pragma once
#include "tensor.h"

namespace ling {

// The routed layer for T <= 8 rows in one launch: routing (route.h), gate_up, SwiGLU, down, the weighted sum, the
// shared expert and the residual (see moe_decode.py). Weights are bf16, or e4m3 with f32 scales for each 128 x 128;
// the shared expert's weights have the same dtype. H, F and Fs are multiples of 128. The launch is cooperative;
// launches on several streams, and replays of several graphs, may overlap.
void moe_decode_fwd(cudaStream_t stream,
                    Tensor x,               // [T, H]  bf16
                    Tensor logits,          // [T, E]  f32; rows may be strided by a multiple of 16 bytes
                    Tensor bias,            // [E]     f32
                    Tensor w_gate_up,       // [E, 2F, H]
                    Tensor gate_up_scale,   // [E, 2F/128, H/128] or None
                    Tensor w_down,          // [E, H, F]
                    Tensor down_scale,      // [E, H/128, F/128] or None
                    Tensor shared_gate_up,  // [2Fs, H] or None: no shared expert
                    Tensor shared_gate_up_scale, Tensor shared_down, Tensor shared_down_scale,
                    Tensor residual,  // [T, H]  bf16 or None: added to y
                    Tensor h,         // [T (topk F + Fs)] f32 (scratch)
                    Tensor y,         // [T, H]  bf16 (out)
                    int num_groups, int group_topk, int topk, float scale);

// Whether a block has the shared memory for it
bool moe_decode_fits(int T, int H, int F, int Fs, int topk, bool fp8);

}  // namespace ling
