// Copies of boxes that the device brings by itself, and the barriers in the block's memory at which these count (PTX ISA,
// "cp.async.bulk.tensor" and "mbarrier").
//
// What a copy brings is read when it is asked for. It is there when somebody waits at its barrier, or at any time before; till then its place
// holds NaN.
#pragma once

namespace emulate {

/// Asks for a box from an index on. Packs of 16 bytes are turned round by the bits of their addresses; what lies beyond an edge is 0.
void bring(unsigned rank, unsigned to, const void* described, unsigned at, const int* from);

}  // namespace emulate

void ptx_mbarrier_init_shared_cta_b64(unsigned at, int count);
void ptx_fence_mbarrier_init_release_cluster();
void ptx_mbarrier_arrive_expect_tx_shared_cta_b64(unsigned at, int bytes);
void ptx_mbarrier_arrive_shared_cta_b64(unsigned at);
/// Waits until the phase of this parity is over.
void ptx_mbarrier_try_wait_parity_shared_cta_b64(unsigned at, unsigned parity, int line = __builtin_LINE());

inline void ptx_cp_async_bulk_tensor_2d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b) {
    int from[] = {a, b};
    emulate::bring(2, to, map, at, from);
}
inline void ptx_cp_async_bulk_tensor_3d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c) {
    int from[] = {a, b, c};
    emulate::bring(3, to, map, at, from);
}
inline void ptx_cp_async_bulk_tensor_4d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c, int d) {
    int from[] = {a, b, c, d};
    emulate::bring(4, to, map, at, from);
}
inline void ptx_cp_async_bulk_tensor_5d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c, int d, int e) {
    int from[] = {a, b, c, d, e};
    emulate::bring(5, to, map, at, from);
}

/// How many registers a warp has shows in nothing here; all of its lanes say so.
void ptx_setmaxnreg_inc_sync_aligned_u32(int, int line = __builtin_LINE());
void ptx_setmaxnreg_dec_sync_aligned_u32(int, int line = __builtin_LINE());
