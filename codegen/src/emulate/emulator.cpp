// Runs launches of the kernels of this program: threads of a block are fibers of one thread of the machine, and run in an order that
// follows from a seed, from one meeting to the next.
//
//     program LAUNCH RESULT [COUNTS]
//
// LAUNCH holds, in words of 8 bytes: the kernel's number, the seed, the grid's three extents, the threads of a block, the bytes of
// `info`, the number of buffers; then `info`; then for each buffer its bytes, the bytes of an element, whether it is written (1) and
// whether it may be read before the grids ahead are done (2), and what it holds; then the number of maps, and for each its buffer, its
// dimensions, and of each of these the numbers, the bytes from one to the next and the numbers of a box. RESULT is made: the contents of the buffers that are written, in order. COUNTS is made too, by programs that count: for
// each buffer in order what was read and then what was written of it, by all threads, in each block once, and once; then the operations of
// matrix units; all as words.

#include "include/emulator.h"

#ifdef LATENTC_COUNT
#include "include/latentc_count.h"
#else
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "include/cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char* emulate::block_memory = nullptr;

namespace emulate {
namespace {

/// Bytes of a fiber's stack, of which only what is used takes memory.
constexpr size_t STACK = 512 << 10;
/// A launch that takes longer, in seconds, does not end.
constexpr unsigned PATIENCE = 120;

// --- switching between stacks ---------------------------------------------------------------------------

#if defined(__x86_64__)
/// Keeps the registers that a call must keep on this stack, its top in `*from`, and goes on where `to` was left.
extern "C" void latentc_switch(void** from, void* to);
asm(R"(
.text
.type latentc_switch, @function
latentc_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr size_t SAVED = 6;
/// Where the address to go on at lies behind what is kept.
constexpr size_t RETURN = SAVED;
#elif defined(__aarch64__)
extern "C" void latentc_switch(void** from, void* to);
asm(R"(
.text
.type latentc_switch, %function
latentc_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr size_t SAVED = 20;
constexpr size_t RETURN = 11;
#else
#error "the emulator knows x86-64 and AArch64"
#endif

// --- threads --------------------------------------------------------------------------------------------

enum class State { Runnable, AtBlock, AtWarp, AtGrids, Waiting, Done };

struct Fiber {
    void* top = nullptr;
    char* stack = nullptr;
    State state = State::Done;
    unsigned number = 0;
    const char* what = nullptr;
    int line = 0;
    void* brought = nullptr;
    bool (*ready)(void*) = nullptr;
    void (*combine)(void* const*) = nullptr;
};

struct Buffer {
    char* data;
    size_t bytes, element;
    bool written, early;
};

std::vector<Fiber> fibers;
std::vector<unsigned> runnable;
Fiber* running = nullptr;
/// The stack that the fibers were started from.
void* home = nullptr;
const void* home_bottom = nullptr;
size_t home_size = 0;

Entry entry;
Args args;
std::vector<Buffer> buffers;
/// Whether the grids ahead may still write.
bool ahead = false;
uint64_t random_state;

uint64_t next_random() {
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

std::string place() {
    if (!running) return "between blocks";
    char text[160];
    // In the order of CUDA's own tools.
    snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", running->number, blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}

void leave() {
    void* kept = nullptr;
    Fiber* self = running;
    __sanitizer_start_switch_fiber(&kept, home_bottom, home_size);
    latentc_switch(&self->top, home);
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
}

void first() {
    __sanitizer_finish_switch_fiber(nullptr, &home_bottom, &home_size);
    entry.call(args);
    running->state = State::Done;
    leave();
    __builtin_trap();
}

void start(Fiber& fiber) {
    auto* top = reinterpret_cast<void**>(fiber.stack + STACK) - 4;
#if defined(__x86_64__)
    // A function starts with a stack that is off by the address that it returns to.
    top[0] = reinterpret_cast<void*>(first), top[1] = nullptr;
    fiber.top = top - SAVED;
#else
    fiber.top = top - SAVED;
    static_cast<void**>(fiber.top)[RETURN] = reinterpret_cast<void*>(first);
#endif
    fiber.state = State::Runnable;
}

void go(Fiber& fiber) {
    running = &fiber;
    threadIdx = {fiber.number, 0, 0};
    void* kept = nullptr;
    __sanitizer_start_switch_fiber(&kept, fiber.stack, STACK);
    latentc_switch(&home, fiber.top);
    __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
    running = nullptr;
}

// --- meetings -------------------------------------------------------------------------------------------

/// Lets a warp go on if all of its lanes that still run have come.
void try_warp(unsigned warp) {
    unsigned first = warp * WARP, last = std::min<unsigned>(first + WARP, fibers.size());
    void* brought[WARP] = {};
    Fiber* one = nullptr;
    for (unsigned n = first; n < last; ++n) {
        Fiber& lane = fibers[n];
        if (lane.state == State::Done) continue;
        if (lane.state != State::AtWarp) return;
        if (one && (one->line != lane.line || strcmp(one->what, lane.what) != 0)) {
            running = &lane;
            fail("%s in line %d, where thread %u of the same warp is at %s in line %d", lane.what, lane.line, one->number,
                 one->what, one->line);
        }
        one = &lane;
        brought[n - first] = lane.brought;
    }
    if (!one) return;
    running = one;
    one->combine(brought);
    running = nullptr;
    for (unsigned n = first; n < last; ++n) {
        if (fibers[n].state != State::AtWarp) continue;
        fibers[n].state = State::Runnable;
        runnable.push_back(n);
    }
}

/// What the grids ahead may write is not to be touched, or may be.
void set_ahead(bool are) {
    if (ahead == are) return;
    ahead = are;
#ifndef LATENTC_COUNT
    for (const Buffer& b : buffers) {
        if (b.early || b.bytes == 0) continue;
        if (are) __asan_poison_memory_region(b.data, b.bytes);
        else __asan_unpoison_memory_region(b.data, b.bytes);
    }
#endif
}

/// Nobody can run: either all of the block have come, or they wait for what cannot happen.
void try_block() {
    Fiber *one = nullptr, *other = nullptr, *gone = nullptr;
    for (Fiber& fiber : fibers) {
        if (fiber.state == State::Waiting && fiber.ready(fiber.brought)) {
            fiber.state = State::Runnable;
            runnable.push_back(fiber.number);
        }
    }
    if (!runnable.empty()) return;
    for (Fiber& fiber : fibers) {
        if (fiber.state == State::Done) {
            gone = &fiber;
        } else if (!one) {
            one = &fiber;
        } else if (!other && (fiber.line != one->line || fiber.state != one->state)) {
            other = &fiber;
        }
    }
    if (!one) return;
    running = one;
    if (other)
        fail("%s in line %d, while thread %u waits at %s in line %d", one->what, one->line, other->number, other->what,
             other->line);
    if (one->state == State::AtGrids) {
        running = nullptr;
        set_ahead(false);
        for (Fiber& fiber : fibers) {
            if (fiber.state != State::AtGrids) continue;
            fiber.state = State::Runnable;
            runnable.push_back(fiber.number);
        }
        return;
    }
    if (one->state != State::AtBlock) fail("%s in line %d waits for what does not happen", one->what, one->line);
    if (gone) fail("%s in line %d, but thread %u has returned", one->what, one->line, gone->number);
    running = nullptr;
    for (Fiber& fiber : fibers) {
        fiber.state = State::Runnable;
        runnable.push_back(fiber.number);
    }
}

void run_block() {
    if (entry.shared) memset(entry.shared, next_random() % 2 ? 0xff : 0x7e, entry.shared_bytes);
    for (Fiber& fiber : fibers) {
        start(fiber);
        runnable.push_back(fiber.number);
    }
    set_ahead(entry.waits);
    while (!runnable.empty()) {
        std::swap(runnable[choose(runnable.size())], runnable.back());
        Fiber& fiber = fibers[runnable.back()];
        runnable.pop_back();
        go(fiber);
        // Its warp may have waited for this lane, to come or to go.
        if (fiber.state == State::AtWarp || fiber.state == State::Done) try_warp(fiber.number / WARP);
        if (runnable.empty()) try_block();
    }
}

// --- files ----------------------------------------------------------------------------------------------

struct Reader {
    FILE* file;
    void bytes(void* to, size_t size) {
        if (size && fread(to, 1, size, file) != size) fail("the file of the launch ends too early");
    }
    uint64_t word() {
        uint64_t x;
        bytes(&x, sizeof x);
        return x;
    }
};

/// Memory that ends where it ends: the next byte is not to be touched.
char* exactly(size_t size) {
    void* place = nullptr;
    if (posix_memalign(&place, 256, size)) fail("no memory for a buffer of %zu bytes", size);
    if (size == 0) __asan_poison_memory_region(place, 1);
    return static_cast<char*>(place);
}

void too_long(int) {
    char text[] = "latentc: the launch does not end\n";
    (void)!write(2, text, sizeof text - 1);
    _exit(3);
}

#ifdef LATENTC_COUNT
void start_counting() {
    for (Buffer& b : buffers) {
        Tally& tally = tallies.emplace_back();
        tally.data = b.data, tally.bytes = b.bytes;
        for (auto& way : tally.ways) way.last.resize(b.bytes);
    }
}

void write_counts(const char* path) {
    FILE* out = fopen(path, "wb");
    if (!out) fail("cannot write %s", path);
    std::vector<uint64_t> words;
    for (Tally& tally : tallies)
        for (auto& way : tally.ways) words.insert(words.end(), {way.asked, way.by_block, way.distinct});
    words.push_back(multiplied);
    if (fwrite(words.data(), 8, words.size(), out) != words.size() || fclose(out)) fail("cannot write %s", path);
}
#endif

void launch(const char* path, const char* result) {
    Reader in{fopen(path, "rb")};
    if (!in.file) fail("cannot read %s", path);
    uint64_t number = in.word();
    if (number >= entry_count) fail("there is no kernel %llu", (unsigned long long)number);
    entry = entries[number];
    emulate::block_memory = entry.shared;
    if (entry.shared) __asan_poison_memory_region(entry.shared + entry.shared_bytes, BEYOND);
    random_state = in.word();
    gridDim.x = in.word(), gridDim.y = in.word(), gridDim.z = in.word();
    blockDim.x = in.word();
    std::vector<uint64_t> info(in.word() / 8);
    buffers.resize(in.word());
    in.bytes(info.data(), info.size() * 8);
    std::vector<void*> pointers;
    for (Buffer& b : buffers) {
        b.bytes = in.word(), b.element = in.word();
        uint64_t use = in.word();
        b.written = use & 1, b.early = use & 2;
        b.data = exactly(b.bytes);
        in.bytes(b.data, b.bytes);
        pointers.push_back(b.data);
    }
    std::vector<Map> maps(in.word());
    for (Map& map : maps) {
        map.data = static_cast<unsigned char*>(pointers.at(in.word()));
        map.rank = in.word();
        for (unsigned n = 0; n < map.rank && n < 5; ++n) map.numbers[n] = in.word(), map.strides[n] = in.word(), map.width[n] = in.word();
    }
    fclose(in.file);
    args = {pointers.data(), info.data(), maps.data()};

    fibers.resize(blockDim.x);
    auto* stacks = static_cast<char*>(mmap(nullptr, STACK * fibers.size(), PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) fail("no memory for the stacks of %zu threads", fibers.size());
    for (unsigned n = 0; n < fibers.size(); ++n) fibers[n].number = n, fibers[n].stack = stacks + n * STACK;

#ifdef LATENTC_COUNT
    start_counting();
#endif
    signal(SIGALRM, too_long);
    alarm(PATIENCE);
    size_t blocks = size_t(gridDim.x) * gridDim.y * gridDim.z;
    std::vector<size_t> order(blocks);
    for (size_t n = 0; n < blocks; ++n) std::swap(order[n] = n, order[next_random() % (n + 1)]);
    for (size_t n : order) {
        blockIdx = {unsigned(n % gridDim.x), unsigned(n / gridDim.x % gridDim.y), unsigned(n / gridDim.x / gridDim.y)};
#ifdef LATENTC_COUNT
        ++block_number;
#endif
        run_block();
    }

    set_ahead(false);
    FILE* out = fopen(result, "wb");
    if (!out) fail("cannot write %s", result);
    for (Buffer& b : buffers)
        if (b.written && fwrite(b.data, 1, b.bytes, out) != b.bytes) fail("cannot write %s", result);
    if (fclose(out)) fail("cannot write %s", result);
}

}  // namespace

void fail(const char* format, ...) {
    char text[800];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "latentc: %s: %s\n", place().c_str(), text);
    _exit(3);
}

void meet_block(int line) {
    Fiber& self = *running;
    self.state = State::AtBlock, self.what = "__syncthreads", self.line = line;
    leave();
}

void meet_grids(int line) {
    Fiber& self = *running;
    self.state = State::AtGrids, self.what = "griddepcontrol.wait", self.line = line;
    leave();
}

void meet_warp(const char* what, int line, void* mine, void (*combine)(void* const*)) {
    Fiber& self = *running;
    self.state = State::AtWarp, self.what = what, self.line = line, self.brought = mine, self.combine = combine;
    leave();
}

void wait_until(const char* what, int line, bool (*ready)(void*), void* argument) {
    if (ready(argument)) return;
    Fiber& self = *running;
    self.state = State::Waiting, self.what = what, self.line = line, self.brought = argument, self.ready = ready;
    leave();
}

void multiply(uint64_t operations) {
#ifdef LATENTC_COUNT
    multiplied += operations;
#endif
}

unsigned choose(unsigned n) { return next_random() % n; }
unsigned lane() { return running->number % WARP; }
unsigned thread() { return running->number; }

}  // namespace emulate

#ifndef LATENTC_COUNT
/// The sanitizer's own report follows. This says what it cannot know: which buffer, which element, whose thread.
extern "C" void __asan_on_error() {
    using namespace emulate;
    const char* verb = __asan_get_report_access_type() ? "writes" : "reads";
    auto at = reinterpret_cast<intptr_t>(__asan_get_report_address());
    auto size = __asan_get_report_access_size();
    std::string nearest = "memory of nobody";
    intptr_t best = 1 << 20;
    auto look = [&](const void* data, size_t bytes, size_t element, std::string name) {
        intptr_t from = at - reinterpret_cast<intptr_t>(data);
        intptr_t far = from < 0 ? -from : std::max<intptr_t>(0, from - intptr_t(bytes));
        if (far >= best) return;
        best = far;
        // Towards minus infinity: before the first element are -1, -2, …
        intptr_t index = from >= 0 ? from / intptr_t(element) : -((-from + intptr_t(element) - 1) / intptr_t(element));
        nearest = name + "[" + std::to_string(index) + "], which has " + std::to_string(bytes / element);
    };
    for (size_t n = 0; n < buffers.size(); ++n)
        look(buffers[n].data, buffers[n].bytes, buffers[n].element, "buffer_" + std::to_string(n));
    if (entry.shared) look(entry.shared, entry.shared_bytes, 1, "dynamic_shared_mem");
    const char* early = ahead && best == 0 ? ", before all threads have waited for the grids ahead" : "";
    fprintf(stderr, "latentc: %s: %s %zu bytes at %s%s\n", place().c_str(), verb, size, nearest.c_str(), early);
}

/// What is undefined follows.
extern "C" void __ubsan_on_report() { fprintf(stderr, "latentc: %s\n", emulate::place().c_str()); }
#endif

int main(int count, char** words) {
    if (count != 3 && count != 4) emulate::fail("usage: %s LAUNCH RESULT [COUNTS]", words[0]);
    emulate::launch(words[1], words[2]);
#ifdef LATENTC_COUNT
    if (count == 4) emulate::write_counts(words[3]);
#endif
    // The system takes the memory back faster.
    _exit(0);
}
