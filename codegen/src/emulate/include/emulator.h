// What the other headers ask of the emulator: threads of a block as fibers, and the places where they meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace emulate {

/// Threads of a warp.
constexpr unsigned WARP = 32;

/// Bytes behind a block's memory that nothing may touch. The compiler itself guards no memory that is aligned as this is.
constexpr size_t BEYOND = 4096;

/// The arguments of a launch: where each buffer lies, and the bytes of the kernel's `info` struct.
struct Args {
    void* const* buffers;
    const void* info;
    const struct Map* maps;
};

/// What a copy of a box is told of a buffer: for each dimension, the innermost first, how many numbers of 16 bits there are, how many
/// bytes it is from one to the next, and how many of them a box has. It stands where CUDA has `CUtensorMap`.
struct alignas(64) Map {
    const unsigned char* data;
    uint32_t rank;
    uint32_t numbers[5];
    uint64_t strides[5];
    uint16_t width[5];
};
static_assert(sizeof(Map) == 128);

/// A kernel of this program.
struct Entry {
    /// Runs one thread of it.
    void (*call)(const Args&);
    /// The block's shared memory and its size; null where it has none.
    unsigned char* shared;
    size_t shared_bytes;
    /// Whether it waits for the grids ahead. What does not is launched when these are done.
    bool waits;
};

/// The kernels of this program, in the order in which they were given.
extern const Entry entries[];
extern const size_t entry_count;

/// The shared memory of the kernel that runs.
extern unsigned char* block_memory;

/// Ends the program with a message that says which thread of which block was running.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// All threads of the block meet, at the same line.
void meet_block(int line);

/// The lanes of a warp that are still running meet, at the same line. The last one to come runs `combine` for all of them, with what
/// each lane brought; null stands for a lane that has returned or that the block does not have.
void meet_warp(const char* what, int line, void* mine, void (*combine)(void* const* lanes));

/// This thread waits until the grids ahead are done, and what they wrote is there: when all of the block that are still running have come.
void meet_grids(int line);

/// This thread goes on when `ready` says so.
void wait_until(const char* what, int line, bool (*ready)(void*), void* argument);

/// A unit that multiplies tiles did so many operations: called once for all lanes.
void multiply(uint64_t operations);

/// A number below `n`, by the seed of the launch.
unsigned choose(unsigned n);

/// This thread's place in its warp.
unsigned lane();

/// This thread's place in its block.
unsigned thread();

/// The launch's arguments as those of a kernel: pointers are buffers in order, the struct is `info`.
template <auto kernel>
struct Call;

template <class... P, void (*kernel)(P...)>
struct Call<kernel> {
    /// Whether it is a map. Maps come before buffers.
    template <class T>
    static constexpr bool is_map = alignof(T) == alignof(Map) && sizeof(T) == sizeof(Map);
    static constexpr size_t maps = (size_t(is_map<P>) + ... + 0);
    template <class T>
    static T argument(const Args& args, size_t n) {
        if constexpr (requires(T x) { *x; })
            return static_cast<T>(args.buffers[n - maps]);
        else if constexpr (is_map<T>)
            return __builtin_bit_cast(T, args.maps[n]);
        else
            return *static_cast<const T*>(args.info);
    }
    template <size_t... n>
    static void with(const Args& args, std::index_sequence<n...>) {
        kernel(argument<P>(args, n)...);
    }
    static void run(const Args& args) { with(args, std::index_sequence_for<P...>()); }
};

}  // namespace emulate
