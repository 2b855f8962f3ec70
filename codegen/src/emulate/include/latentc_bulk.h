// Copies of boxes that the device brings by itself, and the barriers in the block's memory at which these count (PTX ISA,
// "cp.async.bulk.tensor" and "mbarrier").
//
// What a copy brings is read when it is asked for. It is there when somebody waits at its barrier, or at any time before; till then its place
// holds NaN.
#pragma once

#include <array>
#include <map>
#include <vector>

namespace emulate {

/// A barrier in the block's memory.
struct Counting {
    /// How many come in a phase, how many have yet to, and how many bytes are told of and not there.
    unsigned all, left;
    long long bytes;
    /// How many phases are over, and whether copies see that the barrier is there.
    unsigned over;
    bool shown;

    void go_on() {
        if (left == 0 && bytes == 0) left = all, ++over;
    }
};

/// A box that was asked for.
struct Box {
    unsigned to, barrier;
    std::vector<unsigned char> bytes;
};

/// Those of the block that runs.
struct Bulk {
    uint3 block;
    std::map<unsigned, Counting> barriers;
    std::vector<Box> boxes;

    /// Puts a box where it belongs.
    void arrive(size_t n) {
        Box box = std::move(boxes[n]);
        boxes.erase(boxes.begin() + n);
        std::memcpy(block_memory + box.to, box.bytes.data(), box.bytes.size());
        Counting& barrier = barriers.at(box.barrier);
        barrier.bytes -= box.bytes.size();
        barrier.go_on();
    }

    /// All that count at a barrier, in random order.
    void arrive_at(unsigned barrier) {
        for (;;) {
            std::vector<size_t> all;
            for (size_t n = 0; n < boxes.size(); ++n)
                if (boxes[n].barrier == barrier) all.push_back(n);
            if (all.empty()) return;
            arrive(all[choose(all.size())]);
        }
    }
};

inline Bulk& bulk() {
    static Bulk all;
    if (all.block.x != blockIdx.x || all.block.y != blockIdx.y || all.block.z != blockIdx.z) all = Bulk{blockIdx, {}, {}};
    return all;
}

inline Counting& counting(const char* what, unsigned at) {
    auto found = bulk().barriers.find(at);
    if (found == bulk().barriers.end()) fail("%s at byte %u of the block's memory, where no barrier was made", what, at);
    return found->second;
}

/// A unit has come, and tells of so many bytes.
inline void come(const char* what, unsigned at, int bytes) {
    Counting& barrier = counting(what, at);
    if (barrier.left == 0) fail("%s by more than the %u that a barrier counts", what, barrier.all);
    barrier.bytes += bytes;
    --barrier.left;
    barrier.go_on();
}

/// Asks for a box from an index on. Packs of 16 bytes are turned round by the bits of their addresses; what lies beyond an edge is 0.
template <size_t rank>
void bring(unsigned to, unsigned long long described, unsigned at, std::array<int, rank> from) {
    const char* what = "cp.async.bulk.tensor";
    const Map& map = *reinterpret_cast<const Map*>(described);
    if (map.rank != rank) fail("%s of %zu dimensions, where the map has %u", what, rank, map.rank);
    if (to % 128) fail("%s to byte %u of the block's memory, no multiple of 128", what, to);
    if (!counting(what, at).shown) fail("%s to a barrier that was not shown to it by a fence", what);
    if (map.width[0] * 2 > 128) fail("%s of runs of %d numbers, which are turned round", what, map.width[0]);
    size_t count = 1;
    for (size_t n = 0; n < rank; ++n) count *= map.width[n];
    Box box{to, at, std::vector<unsigned char>(count * 2)};
    for (size_t number = 0; number < count; ++number) {
        size_t rest = number;
        const unsigned char* place = map.data;
        bool inside = true;
        for (size_t n = 0; n < rank; ++n) {
            long long index = from[n] + (long long)(rest % map.width[n]);
            rest /= map.width[n];
            inside &= index >= 0 && index < map.numbers[n];
            place += index * (long long)map.strides[n];
        }
        uint16_t bits = inside ? *reinterpret_cast<const uint16_t*>(place) : 0;
        unsigned byte = to + number * 2;
        byte ^= (byte >> 7 & 7) << 4;
        std::memcpy(&box.bytes[byte - to], &bits, 2);
    }
    // It may write over what somebody still reads.
    std::memset(block_memory + to, 0xff, box.bytes.size());
    bulk().boxes.push_back(std::move(box));
    if (choose(4) == 0) bulk().arrive(choose(bulk().boxes.size()));
}

}  // namespace emulate

inline void ptx_mbarrier_init_shared_cta_b64(unsigned at, int count) {
    if (at % 8) emulate::fail("mbarrier.init at byte %u of the block's memory, no multiple of 8", at);
    emulate::bulk().barriers[at] = {unsigned(count), unsigned(count), 0, 0, false};
    std::memset(emulate::block_memory + at, 0, 8);
}
inline void ptx_fence_mbarrier_init_release_cluster() {
    for (auto& [at, barrier] : emulate::bulk().barriers) barrier.shown = true;
}
inline void ptx_mbarrier_arrive_expect_tx_shared_cta_b64(unsigned at, int bytes) { emulate::come("mbarrier.arrive.expect_tx", at, bytes); }
inline void ptx_mbarrier_arrive_shared_cta_b64(unsigned at) { emulate::come("mbarrier.arrive", at, 0); }

/// Waits until the phase of this parity is over.
inline void ptx_mbarrier_try_wait_parity_shared_cta_b64(unsigned at, unsigned parity, int line = __builtin_LINE()) {
    struct Mine {
        unsigned at, parity;
    } mine{at, parity};
    emulate::counting("mbarrier.try_wait", at);
    emulate::wait_until(
        "mbarrier.try_wait", line,
        [](void* argument) {
            auto& [at, parity] = *static_cast<Mine*>(argument);
            emulate::bulk().arrive_at(at);
            return emulate::counting("mbarrier.try_wait", at).over % 2 != parity % 2;
        },
        &mine);
}

inline void ptx_cp_async_bulk_tensor_2d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b) {
    emulate::bring<2>(to, reinterpret_cast<unsigned long long>(map), at, {a, b});
}
inline void ptx_cp_async_bulk_tensor_3d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c) {
    emulate::bring<3>(to, reinterpret_cast<unsigned long long>(map), at, {a, b, c});
}
inline void ptx_cp_async_bulk_tensor_4d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c, int d) {
    emulate::bring<4>(to, reinterpret_cast<unsigned long long>(map), at, {a, b, c, d});
}
inline void ptx_cp_async_bulk_tensor_5d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    unsigned to, const void* map, unsigned at, int a, int b, int c, int d, int e) {
    emulate::bring<5>(to, reinterpret_cast<unsigned long long>(map), at, {a, b, c, d, e});
}

/// How many registers a warp has shows in nothing here; all of its lanes say so.
inline void ptx_setmaxnreg_inc_sync_aligned_u32(int, int line = __builtin_LINE()) {
    emulate::meet_warp("setmaxnreg", line, &line, [](void* const*) {});
}
inline void ptx_setmaxnreg_dec_sync_aligned_u32(int, int line = __builtin_LINE()) {
    emulate::meet_warp("setmaxnreg", line, &line, [](void* const*) {});
}
