// Counts what kernels move, in place of the sanitizers that check it: kernels are compiled as for ThreadSanitizer, which calls these
// functions before each access of memory that others may see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulate {

/// What was moved of a buffer, in bytes.
struct Tally {
    const char* data;
    size_t bytes;
    struct {
        /// By all threads together; in each block once; once.
        uint64_t asked = 0, by_block = 0, distinct = 0;
        /// The block that last touched each byte, counted from 1.
        std::vector<uint32_t> last;
    } ways[2];
};

inline std::vector<Tally> tallies;
/// The block that runs, counted from 1.
inline uint32_t block_number = 0;
/// Operations of the units that multiply tiles, a multiplication and an addition each being two.
inline uint64_t multiplied = 0;

inline void count(const void* place, size_t size, bool written) {
    auto at = static_cast<const char*>(place);
    for (Tally& tally : tallies) {
        if (at < tally.data || at >= tally.data + tally.bytes) continue;
        auto& way = tally.ways[written];
        way.asked += size;
        for (size_t n = at - tally.data, end = n + size; n < end && n < tally.bytes; ++n) {
            way.distinct += way.last[n] == 0;
            way.by_block += way.last[n] != block_number;
            way.last[n] = block_number;
        }
        return;
    }
}

}  // namespace emulate

// What is asked of AddressSanitizer otherwise.
inline void __asan_poison_memory_region(const volatile void*, size_t) {}
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}

#define LATENTC_COUNT_ACCESS(size)                                                              \
    void __tsan_read##size(void* place) { emulate::count(place, size, false); }                 \
    void __tsan_write##size(void* place) { emulate::count(place, size, true); }                 \
    void __tsan_unaligned_read##size(void* place) { emulate::count(place, size, false); }       \
    void __tsan_unaligned_write##size(void* place) { emulate::count(place, size, true); }
extern "C" {
LATENTC_COUNT_ACCESS(1)
LATENTC_COUNT_ACCESS(2)
LATENTC_COUNT_ACCESS(4)
LATENTC_COUNT_ACCESS(8)
LATENTC_COUNT_ACCESS(16)
void __tsan_read_range(void* place, size_t size) { emulate::count(place, size, false); }
void __tsan_write_range(void* place, size_t size) { emulate::count(place, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#undef LATENTC_COUNT_ACCESS
