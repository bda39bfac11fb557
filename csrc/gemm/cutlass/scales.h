// How CUTLASS's mainloop lays out the scales of one group.
#pragma once
#include <cutlass/detail/blockwise_scale_layout.hpp>

namespace ling {

// a: one for each row and 128 of K, M contiguous; b: one for 128 x 128, K contiguous
using GroupScales = cutlass::detail::Sm90BlockwiseScaleConfig<1, 128, 128, cute::GMMA::Major::MN, cute::GMMA::Major::K>;

}  // namespace ling
