// CUTLASS's grouped FP8 GEMM for sm_90a. Each file that includes this instantiates one kernel.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gemm/cutlass/grouped_gemm_fp8.h"
#include "gemm/cutlass/scales.h"

namespace ling {

// kTileM x 128 x 128, clusters of two CTAs that share a's tile. Partial sums are promoted to fp32 every 128 of K.
template <int kTileM, typename Mainloop, typename Epilogue> struct GroupedGemmFp8 {
    using e4m3 = cutlass::float_e4m3_t;
    using bf16 = cutlass::bfloat16_t;
    using RowMajor = cutlass::layout::RowMajor;
    using ColumnMajor = cutlass::layout::ColumnMajor;
    using Tile = cute::Shape<cute::Int<kTileM>, cute::_128, cute::_128>;
    using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
    using Shape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
    using ScalesA = decltype(GroupScales::deduce_layoutSFA());
    using ScalesB = decltype(GroupScales::deduce_layoutSFB());

    using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, 8, bf16, RowMajor*, 8,
        Epilogue>::CollectiveOp;
    using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, e4m3, cute::tuple<RowMajor*, ScalesA*>, 16, e4m3,
        cute::tuple<ColumnMajor*, ScalesB*>, 16, float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
            sizeof(typename CollectiveEpilogue::SharedStorage))>,
        Mainloop>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape, CollectiveMainloop, CollectiveEpilogue>;
};

// Kernel: derived from GroupedGemmFp8<...>::Kernel, so that profilers show a short name.
template <typename Kernel> void run_grouped_gemm_fp8(cudaStream_t stream, const Groups& groups, int E) {
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using StrideA = typename Kernel::InternalStrideA;
    using StrideB = typename Kernel::InternalStrideB;
    using StrideD = typename Kernel::InternalStrideD;
    using Shape = typename Kernel::ProblemShape::UnderlyingProblemShape;
    static_assert(sizeof(Shape) == 3 * sizeof(int) && sizeof(StrideA) == sizeof(int64_t) &&
                      sizeof(StrideB) == sizeof(int64_t) && sizeof(StrideD) == sizeof(int64_t),
                  "the types that the setup kernel writes");
    using A = typename Kernel::ElementA;
    using D = typename Kernel::ElementD;

    int device, sms;
    LING_CUDA_CHECK(cudaGetDevice(&device));
    LING_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGrouped,
        {E, reinterpret_cast<Shape*>(groups.shape), nullptr},
        {const_cast<const A**>(reinterpret_cast<A**>(groups.a)), reinterpret_cast<StrideA*>(groups.a_stride),
         const_cast<const A**>(reinterpret_cast<A**>(groups.b)), reinterpret_cast<StrideB*>(groups.b_stride),
         const_cast<const float**>(reinterpret_cast<float**>(groups.a_scale)), nullptr,
         const_cast<const float**>(reinterpret_cast<float**>(groups.b_scale)), nullptr},
        {{}, nullptr, nullptr, reinterpret_cast<D**>(groups.y), reinterpret_cast<StrideD*>(groups.y_stride)},
        {device, sms}};
    args.epilogue.thread.alpha = 1;
    args.epilogue.thread.beta = 0;

    if (Gemm::get_workspace_size(args) > Groups::kScratch)
        throw std::runtime_error("CUTLASS's grouped_gemm_fp8: the GPU has more SMs than the workspace has room for");
    Gemm gemm;
    auto status = gemm.can_implement(args);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(args, groups.scratch, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    if (status != cutlass::Status::kSuccess)
        throw std::runtime_error(std::string("CUTLASS's grouped_gemm_fp8: ") + cutlassGetStatusString(status));
}

}  // namespace ling
