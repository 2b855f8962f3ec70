// Instructions of PTX for products of groups of four warps, which read their operands from the block's memory (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions").
//
// Each warp multiplies its 16 of 64 rows by itself. What it reads is read at once or when it is waited for, as the seed says; the
// sums hold NaN till then.
#pragma once

namespace emulate {

/// What a lane brings to a product: its sums, then the descriptors of both operands, or four registers and the descriptor of the right one;
/// whether it adds; and which of the described operands lie across, if they may.
struct GroupOperands {
    int columns, depth;
    Multiply multiply;
    /// The first have places, the others values; registers have both.
    float* sums[128];
    unsigned sum_count = 0;
    unsigned long long values[7];
    const void* places[7];
    unsigned count = 0;

    void take(float& sum) {
        if (sum_count < 128) sums[sum_count] = &sum;
        ++sum_count;
    }
    template <class T>
    void take(const T& value) {
        if (count < 7) values[count] = value, places[count] = &value;
        ++count;
    }
};

/// Begins to add a product of 64 rows, so many columns and 16 numbers of depth, or 8 of 32 bits.
void multiply_group(int line, GroupOperands& mine);

template <int columns, int depth, class... O>
void product(int line, Multiply multiply, O&&... operands) {
    GroupOperands mine{columns, depth, multiply};
    (mine.take(operands), ...);
    multiply_group(line, mine);
}

/// Waits for all groups but so many.
void wait_products(int line, int left);

/// The registers are named so that compilers know that they change.
template <class... O>
int last(O&&... operands) {
    return int((operands, ...));
}

}  // namespace emulate

void ptx_wgmma_fence_sync_aligned(int line = __builtin_LINE());
void ptx_wgmma_commit_group_sync_aligned(int line = __builtin_LINE());
#define ptx_wgmma_wait_group_sync_aligned(...) emulate::wait_products(__LINE__, emulate::last(__VA_ARGS__))

/// What this thread has copied is seen by products from now on.
void ptx_fence_proxy_async_shared_cta();

#define LATENTC_WGMMA(columns, depth, multiply, ...) emulate::product<columns, depth>(__LINE__, multiply, __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n32k16_f32_bf16_bf16(...) LATENTC_WGMMA(32, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n64k16_f32_bf16_bf16(...) LATENTC_WGMMA(64, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n80k16_f32_bf16_bf16(...) LATENTC_WGMMA(80, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n96k16_f32_bf16_bf16(...) LATENTC_WGMMA(96, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n128k16_f32_bf16_bf16(...) LATENTC_WGMMA(128, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n160k16_f32_bf16_bf16(...) LATENTC_WGMMA(160, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n192k16_f32_bf16_bf16(...) LATENTC_WGMMA(192, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n256k16_f32_bf16_bf16(...) LATENTC_WGMMA(256, 16, (emulate::halves<emulate::Narrow<8>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n32k16_f32_f16_f16(...) LATENTC_WGMMA(32, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n64k16_f32_f16_f16(...) LATENTC_WGMMA(64, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n80k16_f32_f16_f16(...) LATENTC_WGMMA(80, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n96k16_f32_f16_f16(...) LATENTC_WGMMA(96, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n128k16_f32_f16_f16(...) LATENTC_WGMMA(128, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n160k16_f32_f16_f16(...) LATENTC_WGMMA(160, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n192k16_f32_f16_f16(...) LATENTC_WGMMA(192, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n256k16_f32_f16_f16(...) LATENTC_WGMMA(256, 16, (emulate::halves<emulate::Narrow<5>>), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n32k8_f32_tf32_tf32(...) LATENTC_WGMMA(32, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n64k8_f32_tf32_tf32(...) LATENTC_WGMMA(64, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n80k8_f32_tf32_tf32(...) LATENTC_WGMMA(80, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n96k8_f32_tf32_tf32(...) LATENTC_WGMMA(96, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n128k8_f32_tf32_tf32(...) LATENTC_WGMMA(128, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n160k8_f32_tf32_tf32(...) LATENTC_WGMMA(160, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n192k8_f32_tf32_tf32(...) LATENTC_WGMMA(192, 8, (emulate::tf32), __VA_ARGS__)
#define ptx_wgmma_mma_async_sync_aligned_m64n256k8_f32_tf32_tf32(...) LATENTC_WGMMA(256, 8, (emulate::tf32), __VA_ARGS__)
