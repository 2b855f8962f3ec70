// What units of the device do for threads: copies that go on by themselves, barriers that count, products of warps and of groups of
// them. It is compiled once for all programs, with what checks kernels, since it reads and writes for them.

#include "include/latentc_narrow.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

namespace emulate {
namespace {

/// Whether something is of the block that runs. Nothing is kept of another.
bool is_here(const uint3& block) { return block.x == blockIdx.x && block.y == blockIdx.y && block.z == blockIdx.z; }

void whole(const char* what, void* const* lanes) {
    for (unsigned n = 0; n < WARP; ++n)
        if (!lanes[n]) fail("%s by a warp without lane %u", what, n);
}

// --- products of a warp ---------------------------------------------------------------------------------

void load(void* const* lanes) {
    whole("ldmatrix", lanes);
    auto of = [&](unsigned lane) -> Rows& { return *static_cast<Rows*>(lanes[lane]); };
    for (int m = 0; m < of(0).count; ++m) {
        uint16_t matrix[8][8];
        for (int r = 0; r < 8; ++r) {
            const unsigned char* row = block_memory + of(m * 8 + r).address;
            if (reinterpret_cast<uintptr_t>(row) % 16)
                fail("ldmatrix of a row at byte %u of the block's memory, no multiple of 16", unsigned(row - block_memory));
            for (int c = 0; c < 8; ++c) matrix[r][c] = reinterpret_cast<const uint16_t*>(row)[c];
        }
        for (unsigned n = 0; n < WARP; ++n) {
            auto at = [&](int r, int c) { return unsigned(of(0).transposed ? matrix[c][r] : matrix[r][c]); };
            int r = n / 4, c = n % 4 * 2;
            *of(n).to[m] = at(r, c) | at(r, c + 1) << 16;
        }
    }
}

void multiply_tiles(void* const* lanes) {
    whole("mma", lanes);
    auto of = [&](unsigned lane) -> Operands& { return *static_cast<Operands*>(lanes[lane]); };
    multiply(2 * 16 * 8 * of(0).depth);
    float sums[16][8];
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) {
            float sum = of(m % 8 * 4 + n / 2).c[m / 8 * 2 + n % 2];
            // Of each depth, four lanes have a word.
            for (int k = 0; k < 8; ++k)
                sum = of(0).multiply(sum, of(m % 8 * 4 + k % 4).a[k / 4 * 2 + m / 8], of(n * 4 + k % 4).b[k / 4]);
            sums[m][n] = sum;
        }
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) *of(m % 8 * 4 + n / 2).d[m / 8 * 2 + n % 2] = sums[m][n];
}

// --- copies of threads ----------------------------------------------------------------------------------

/// Copies that a thread has begun. What they bring is read at once, and there when the thread has waited; till then, the place
/// holds NaN.
struct Copies {
    struct Copy {
        unsigned to;
        int all;
        unsigned char bytes[16];
    };
    uint3 block;
    /// Those of the groups that it has not waited for, in order, and behind them those that are in no group yet.
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
    /// Whether products of groups of warps see what was copied: they read through another proxy.
    bool seen = true;

    /// Waits until so many groups are left.
    void wait(size_t left) {
        while (groups.size() - 1 > left) {
            seen &= groups.front().empty();
            for (const auto& copy : groups.front()) std::memcpy(block_memory + copy.to, copy.bytes, copy.all);
            groups.erase(groups.begin());
        }
    }
};

std::vector<Copies> all_copies;

/// A thread of this block whose copies products do not see; the largest number if there is none.
unsigned unseen() {
    for (const Copies& one : all_copies)
        if (!one.seen && is_here(one.block)) return unsigned(&one - all_copies.data());
    return ~0u;
}

Copies& copies() {
    if (all_copies.size() <= thread()) all_copies.resize(thread() + 1);
    Copies& mine = all_copies[thread()];
    // A thread may end without waiting.
    if (!is_here(mine.block)) mine.groups.assign(1, {}), mine.seen = true;
    mine.block = blockIdx;
    return mine;
}

// --- barriers with a number -----------------------------------------------------------------------------

/// How many threads have come since all of them last met, and how often they have.
struct Barrier {
    uint3 block;
    unsigned come, met;
};

Barrier& come_to(unsigned number, unsigned threads) {
    static Barrier all[16];
    if (number == 0 || number >= 16 || threads == 0 || threads % WARP) fail("barrier %u of %u threads", number, threads);
    Barrier& barrier = all[number];
    if (!is_here(barrier.block)) barrier = Barrier{blockIdx, 0, 0};
    if (++barrier.come == threads) barrier.come = 0, ++barrier.met;
    return barrier;
}

// --- boxes ----------------------------------------------------------------------------------------------

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

Bulk& bulk() {
    static Bulk all;
    if (!is_here(all.block)) all = Bulk{blockIdx, {}, {}};
    return all;
}

Counting& counting(const char* what, unsigned at) {
    auto found = bulk().barriers.find(at);
    if (found == bulk().barriers.end()) fail("%s at byte %u of the block's memory, where no barrier was made", what, at);
    return found->second;
}

/// A unit has come, and tells of so many bytes.
void come(const char* what, unsigned at, int bytes) {
    Counting& barrier = counting(what, at);
    if (barrier.left == 0) fail("%s by more than the %u that a barrier counts", what, barrier.all);
    barrier.bytes += bytes;
    --barrier.left;
    barrier.go_on();
}

// --- products of groups of warps ------------------------------------------------------------------------

/// A matrix that an operand describes: where it begins, and how far it is to the next 64 numbers and to the next eight runs.
struct Described {
    unsigned start, lead, stride;
    /// Whether numbers of one depth lie behind one another, not those of one row.
    bool across;

    static Described of(unsigned long long bits, bool across) {
        auto bytes = [&](int at) { return unsigned(bits >> at & 0x3fff) << 4; };
        Described d{bytes(0), bytes(16), bytes(32), across};
        if (bits >> 62 != 1) fail("wgmma of an operand whose packs are turned in mode %u", unsigned(bits >> 62));
        if (bits >> 49 & 7) fail("wgmma of an operand with a base offset");
        // Packs are turned by the bits of addresses: the first run is one that is not turned.
        if (d.start % 1024 / 128) fail("wgmma of an operand at byte %u of the block's memory, within eight runs", d.start);
        return d;
    }

    /// Two numbers of a row (or column), of which this is the first depth.
    unsigned word(unsigned line, unsigned k) const { return at(line, k) | unsigned(at(line, k + 1)) << 16; }

    /// The number of a row (or column) and a depth.
    uint16_t at(unsigned line, unsigned k) const {
        unsigned place = across ? start + line / 64 * lead + k / 8 * stride + k % 8 * 128 + line % 64 * 2
                                : start + line / 8 * stride + line % 8 * 128 + k * 2;
        place ^= (place >> 7 & 7) << 4;
        return *reinterpret_cast<const uint16_t*>(block_memory + place);
    }
};

/// A product that a warp has begun: its operands, in words of two numbers of 16 bits or one of 32 once they are read, and the sums and registers of each lane.
struct Product {
    int columns;
    bool add, in_registers;
    Described a, b;
    Multiply multiply;
    bool read = false;
    std::vector<unsigned> left, right;
    std::vector<std::vector<float*>> sums;
    std::vector<std::array<const unsigned*, 4>> registers;

    /// Of the left operand, a word of a row of this warp. In registers it lies as that of `mma` does.
    unsigned left_at(unsigned warp, unsigned m, unsigned k) const {
        return in_registers ? *registers[m % 8 * 4 + k % 4][k / 4 * 2 + m / 8] : a.word(warp % 4 * 16 + m, 2 * k);
    }

    void read_operands(unsigned warp) {
        read = true;
        for (unsigned m = 0; m < 16; ++m)
            for (unsigned k = 0; k < 8; ++k) left.push_back(left_at(warp, m, k));
        for (int n = 0; n < columns; ++n)
            for (unsigned k = 0; k < 8; ++k) right.push_back(b.word(n, 2 * k));
    }
};

/// The products that a warp has begun.
struct Products {
    /// What a register will hold, and how many products have yet to be added.
    struct Pending {
        float value;
        unsigned products;
    };
    uint3 block;
    bool fenced = false;
    /// Those of the groups that were not waited for, and behind them those that are in none yet.
    std::vector<std::vector<Product>> groups = std::vector<std::vector<Product>>(1);
    std::map<float*, Pending> pending;

    void finish(Product& p, unsigned warp) {
        if (!p.read) p.read_operands(warp);
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < p.columns; ++n) {
                float* to = p.sums[m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m / 8 * 2 + n % 2];
                auto sum = pending.find(to);
                float value = p.add ? sum->second.value : 0;
                for (int k = 0; k < 8; ++k) value = p.multiply(value, p.left[m * 8 + k], p.right[n * 8 + k]);
                sum->second.value = value;
                if (--sum->second.products == 0) {
                    *to = value;
                    pending.erase(sum);
                }
            }
    }

    void wait(size_t left, unsigned warp) {
        while (groups.size() - 1 > left) {
            for (Product& p : groups.front()) finish(p, warp);
            groups.erase(groups.begin());
        }
    }
};

unsigned warp() { return thread() / WARP; }

Products& products() {
    static std::vector<Products> all;
    if (all.size() <= warp()) all.resize(warp() + 1);
    Products& mine = all[warp()];
    // A warp may end without waiting.
    if (!is_here(mine.block)) mine = Products();
    mine.block = blockIdx;
    return mine;
}

void begin_product(void* const* lanes) {
    whole("wgmma", lanes);
    auto of = [&](unsigned lane) -> GroupOperands& { return *static_cast<GroupOperands*>(lanes[lane]); };
    const GroupOperands& one = of(0);
    // Those of 32 bits lie along the depth, and nothing is said of it.
    bool along = one.depth == 8;
    bool in_registers = !along && one.count == 7;
    if (one.sum_count != unsigned(one.columns) / 2 || (one.count != (along ? 3 : 5) && !in_registers))
        fail("wgmma of %d columns with %u sums and %u operands behind them", one.columns, one.sum_count, one.count);
    multiply(2 * 16 * one.columns * one.depth);
    for (unsigned n = 1; n < WARP; ++n)
        if ((!in_registers && of(n).values[0] != one.values[0]) || of(n).values[in_registers ? 4 : 1] != one.values[in_registers ? 4 : 1])
            fail("wgmma where lane %u describes other operands", n);
    if (unsigned writer = unseen(); writer != ~0u) fail("wgmma may read what thread %u has copied without a fence of proxies", writer);
    Products& products = emulate::products();
    if (!products.fenced) fail("wgmma in a group without wgmma.fence");
    Product p{one.columns, false, in_registers, {}, {}, one.multiply};
    if (in_registers) {
        p.b = Described::of(one.values[4], one.values[6]);
        p.add = one.values[5];
    } else {
        p.a = Described::of(one.values[0], !along && one.values[3]), p.b = Described::of(one.values[1], !along && one.values[4]);
        p.add = one.values[2];
    }
    for (unsigned n = 0; n < WARP; ++n) {
        p.sums.emplace_back(of(n).sums, of(n).sums + of(n).sum_count);
        for (float* d : p.sums.back()) {
            ++products.pending.try_emplace(d, Products::Pending{*d, 0}).first->second.products;
            *d = std::numeric_limits<float>::quiet_NaN();
        }
        auto& registers = p.registers.emplace_back();
        if (in_registers)
            for (int r = 0; r < 4; ++r) registers[r] = static_cast<const unsigned*>(of(n).places[r]);
    }
    if (choose(2)) p.read_operands(warp());
    products.groups.back().push_back(std::move(p));
}

}  // namespace

void load_matrices(int line, Rows mine) { meet_warp("ldmatrix", line, &mine, load); }
void multiply_matrices(int line, Operands mine) { meet_warp("mma.sync", line, &mine, multiply_tiles); }
void multiply_group(int line, GroupOperands& mine) { meet_warp("wgmma.mma_async", line, &mine, begin_product); }

void wait_products(int line, int left) {
    meet_warp("wgmma.wait_group", line, &left, [](void* const* lanes) {
        for (unsigned n = 0; n < WARP; ++n)
            if (lanes[n]) return products().wait(size_t(*static_cast<int*>(lanes[n])), warp());
    });
}

void bring(unsigned rank, unsigned to, const void* described, unsigned at, const int* from) {
    const char* what = "cp.async.bulk.tensor";
    const Map& map = *static_cast<const Map*>(described);
    if (map.rank != rank) fail("%s of %u dimensions, where the map has %u", what, rank, map.rank);
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

using namespace emulate;

// --- instructions ---------------------------------------------------------------------------------------

void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all, int size) {
    auto* source = reinterpret_cast<const unsigned char*>(from);
    if ((all != 4 && all != 8 && all != 16) || size < 0 || size > all) fail("cp.async of %d of %d bytes", size, all);
    if (from % all || to % all) fail("cp.async from %p to byte %u of the block's memory, no multiples of %d", source, to, all);
    Copies::Copy copy{to, all, {}};
    for (int n = 0; n < size; ++n) copy.bytes[n] = source[n];
    for (int n = 0; n < all; ++n) block_memory[to + n] = 0xff;
    copies().groups.back().push_back(copy);
}
void ptx_cp_async_ca_shared_cta_global(unsigned to, unsigned long long from, int all) {
    ptx_cp_async_ca_shared_cta_global(to, from, all, all);
}
void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all, int size) {
    if (all != 16) fail("cp.async.cg of %d bytes", all);
    ptx_cp_async_ca_shared_cta_global(to, from, all, size);
}
void ptx_cp_async_cg_shared_cta_global(unsigned to, unsigned long long from, int all) {
    ptx_cp_async_cg_shared_cta_global(to, from, all, all);
}
void ptx_cp_async_commit_group() { copies().groups.emplace_back(); }
void ptx_cp_async_wait_group(int left) { copies().wait(size_t(left)); }
void ptx_cp_async_wait_all() {
    ptx_cp_async_commit_group();
    ptx_cp_async_wait_group(0);
}
void ptx_fence_proxy_async_shared_cta() { copies().seen = true; }

void ptx_bar_sync(unsigned number, int threads, int line) {
    struct Mine {
        Barrier* barrier;
        unsigned met;
    };
    Barrier& barrier = come_to(number, unsigned(threads));
    Mine mine{&barrier, barrier.met - (barrier.come == 0)};
    wait_until(
        "bar.sync", line, [](void* mine) { return static_cast<Mine*>(mine)->barrier->met != static_cast<Mine*>(mine)->met; }, &mine);
}
void ptx_bar_arrive(unsigned number, int threads) { come_to(number, unsigned(threads)); }

void ptx_mbarrier_init_shared_cta_b64(unsigned at, int count) {
    if (at % 8) fail("mbarrier.init at byte %u of the block's memory, no multiple of 8", at);
    bulk().barriers[at] = {unsigned(count), unsigned(count), 0, 0, false};
    std::memset(block_memory + at, 0, 8);
}
void ptx_fence_mbarrier_init_release_cluster() {
    for (auto& [at, barrier] : bulk().barriers) barrier.shown = true;
}
void ptx_mbarrier_arrive_expect_tx_shared_cta_b64(unsigned at, int bytes) { come("mbarrier.arrive.expect_tx", at, bytes); }
void ptx_mbarrier_arrive_shared_cta_b64(unsigned at) { come("mbarrier.arrive", at, 0); }
void ptx_mbarrier_try_wait_parity_shared_cta_b64(unsigned at, unsigned parity, int line) {
    struct Mine {
        unsigned at, parity;
    } mine{at, parity};
    counting("mbarrier.try_wait", at);
    wait_until(
        "mbarrier.try_wait", line,
        [](void* argument) {
            auto& [at, parity] = *static_cast<Mine*>(argument);
            bulk().arrive_at(at);
            return counting("mbarrier.try_wait", at).over % 2 != parity % 2;
        },
        &mine);
}

void ptx_setmaxnreg_inc_sync_aligned_u32(int, int line) { meet_warp("setmaxnreg", line, &line, [](void* const*) {}); }
void ptx_setmaxnreg_dec_sync_aligned_u32(int, int line) { meet_warp("setmaxnreg", line, &line, [](void* const*) {}); }

void ptx_wgmma_fence_sync_aligned(int line) {
    meet_warp("wgmma.fence", line, &line, [](void* const*) { products().fenced = true; });
}
void ptx_wgmma_commit_group_sync_aligned(int line) {
    meet_warp("wgmma.commit_group", line, &line, [](void* const*) { products().groups.emplace_back(), products().fenced = false; });
}
