// A streaming multiprocessor that finds mistakes. Each thread is a fiber that runs until it has to wait; of those that
// can go on the first in the launch's order does, so that some are as far ahead of others as they may be.
//
// What is asynchronous takes effect as late as it may: its target holds no numbers from the start of a copy or product
// until every thread waits (bulk copies), or this thread waits for it (16 bytes, products). So a wait that is missing,
// or a place that is released too early, shows in the result. Where no thread can go on, that is told.
#include "emulated_hopper.h"

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <vector>

constexpr u32 MOST_SHARED = 227 * 1024, GUARD = 4096;
alignas(1024) thread_local unsigned char shared[MOST_SHARED + GUARD];
Index threadIdx, blockIdx, gridDim;

namespace {

constexpr u32 SHARED_AT = 1024 + 16;  // divides by no more than it must
constexpr u32 BARRIER = 0xBA221E2u;
constexpr std::size_t STACK = 1 << 16;
constexpr int NO_NUMBER = 0xFF;       // as each byte

// Threads that wait for one another; `what` they do then, which must be the same.
struct Meeting {
    u32 arrived = 0, what = 0;
    u64 times = 0;
};

struct Barrier {
    u32 arrivals = 0, pending = 0;
    long long bytes = 0;
    u64 phase = 0;
};

struct Copy16 {
    int group;
    u32 target;
    const unsigned char* source;
};

struct BulkCopy {
    u32 target, bytes, barrier;
    const unsigned char* source;      // null: a box
    Map map;
    int column, row;
};

// A product of four warps, as one of its threads sees it.
struct Product {
    int group, columns;
    float* d;
    const u32* a;
    u64 rows;
    bool keep;
    u32 a_before[4];
    std::vector<float> d_before;
    std::vector<uint16_t> rows_before;
};

struct Thread {
    ucontext_t context;
    const char* waits_for = "";
    bool begun = false;
    std::deque<Copy16> copies;
    std::deque<Product> products;
    int copy_groups = 0, product_groups = 0;
    // What it brings to a meeting of its warp, and takes from it.
    u32 word = 0, low = 0, high = 0;
    const u32* a = nullptr;
    float* sums = nullptr;
};

// Whether a thread has to wait: until what is watched is no longer `seen`. Apart from the rest, for it is asked often.
struct Waiting {
    const u64* watched = nullptr;
    u64 seen = 0;
    bool done = false;

    bool over() const { return !done && (!watched || *watched != seen); }
};

enum Together : u32 { SYNC = 1, SHUFFLE, TRANSPOSE, PRODUCT, PRODUCTS };

emulated::Launch launch;
emulated::Body body;
void** arguments;
bool bfloat16, ahead_ended, fenced;
u64 ahead_endings;
ucontext_t scheduler, outside;
unsigned char* stacks;
std::vector<unsigned char> inputs, before[3];
std::vector<Thread> threads;
std::vector<Waiting> waiting;
std::vector<u32> program_order, thread_order;
std::vector<Barrier> barriers;
std::vector<Meeting> warps, groups;
Meeting named[16];
std::deque<BulkCopy> bulk;
std::mt19937 random_order;
char message[512];

// Ends the launch; the fibers are left as they are.
[[noreturn]] void fail(const char* format, ...) {
    int at = std::snprintf(message, sizeof(message), "program %u, thread %u: ", blockIdx.x, threadIdx.x);
    va_list values;
    va_start(values, format);
    std::vsnprintf(message + at, sizeof(message) - at, format, values);
    va_end(values);
    setcontext(&outside);
    __builtin_unreachable();
}

Thread& self() { return threads[threadIdx.x]; }

void wait_for(const u64& watched, u64 seen, const char* what) {
    Thread& thread = self();
    waiting[threadIdx.x] = {&watched, seen};
    thread.waits_for = what;
    swapcontext(&thread.context, &scheduler);
}

// The last one does it for all.
template <class Do>
void together(Meeting& meeting, u32 everyone, u32 what, const char* name, Do act) {
    if (meeting.arrived && meeting.what != what) fail("%s: others do something else", name);
    meeting.what = what;
    const u64 times = meeting.times;
    if (++meeting.arrived < everyone) return wait_for(meeting.times, times, name);
    act();
    meeting.arrived = 0;
    ++meeting.times;
}

template <class Do>
void as_warp(Together what, const char* name, Do act) {
    const u32 warp = threadIdx.x / 32;
    together(warps[warp], 32, what, name, [&] { act(&threads[warp * 32]); });
}

// Shared memory -----------------------------------------------------------------------------------------------

unsigned char* at(u32 address, u32 bytes, u32 alignment) {
    if (address % alignment) fail("address %u does not divide by %u", address, alignment);
    if (address < SHARED_AT || address - SHARED_AT + bytes > launch.shared)
        fail("%u bytes at %d are not all in shared memory", bytes, int(address - SHARED_AT));
    return shared + (address - SHARED_AT);
}

// Barriers need not lie in the dynamic part.
u32* words_of(u32 barrier) {
    if (barrier % 8) fail("a barrier's address %u does not divide by 8", barrier);
    return reinterpret_cast<u32*>(shared + int32_t(barrier - SHARED_AT));
}

Barrier& barrier_at(u32 address) {
    const u32* words = words_of(address);
    if (words[0] != BARRIER || words[1] >= barriers.size()) fail("there is no barrier at %u", address);
    return barriers[words[1]];
}

void complete_phase(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
}

const unsigned char* weight_at(const void* source, u32 bytes) {
    const auto* found = static_cast<const unsigned char*>(source);
    if (found < launch.weight.start || found + bytes > launch.weight.start + launch.weight.bytes)
        fail("a copy reads outside of the weight");
    if (u64(found - launch.weight.start) % 16) fail("a copy's source does not divide by 16");
    return found;
}

// As the copy engine and the matrix units permute pieces of 16 bytes.
u32 permuted(u32 address) { return address ^ ((address >> 7 & 7) << 4); }

void begin_bulk(const BulkCopy& copy) {
    if (!fenced) fail("the copy engine does not know of the barriers");
    barrier_at(copy.barrier);
    std::memset(at(copy.target, copy.bytes, copy.source ? 16 : 128), NO_NUMBER, copy.bytes);
    bulk.push_back(copy);
}

void finish_bulk() {
    const u64 i = launch.order == 0 ? 0 : launch.order == 1 ? bulk.size() - 1 : random_order() % bulk.size();
    const BulkCopy copy = bulk[i];
    bulk.erase(bulk.begin() + i);
    if (copy.source) {
        std::memcpy(at(copy.target, copy.bytes, 16), copy.source, copy.bytes);
    } else {
        const Map& map = copy.map;
        for (u32 offset = 0; offset < copy.bytes; offset += 16) {
            const long long row = copy.row + offset / 128, column = copy.column + offset % 128 / 2;
            unsigned char* target = at(permuted(copy.target + offset), 16, 16);
            if (row < map.rows && column < map.columns)
                std::memcpy(target, map.start + 2 * (row * map.columns + column), 16);
            else
                std::memset(target, 0, 16);
        }
    }
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.bytes;
    complete_phase(barrier);
}

// Numbers -----------------------------------------------------------------------------------------------------

float widened_half(u32 half) {
    const int mantissa_bits = bfloat16 ? 7 : 10, bias = bfloat16 ? 127 : 15;
    const int exponent = half >> mantissa_bits & (2 * bias + 1), mantissa = half & ((1 << mantissa_bits) - 1);
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 2 * bias + 1) return mantissa ? NAN : sign * INFINITY;
    const int whole = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    return sign * std::ldexp(float(whole), std::max(exponent, 1) - bias - mantissa_bits);
}

// To the nearest, of two the even one.
u32 rounded_half(double value) {
    const int mantissa_bits = bfloat16 ? 7 : 10, bias = bfloat16 ? 127 : 15;
    const u32 sign = std::signbit(value) ? 0x8000 : 0, infinite = (2 * bias + 1) << mantissa_bits;
    if (std::isnan(value)) return 0x7FFF;
    if (std::isinf(value)) return sign | infinite;
    const int exponent = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
    // A normal number's first bit is carried into the exponent.
    const double whole = std::nearbyint(std::ldexp(std::fabs(value), mantissa_bits - exponent));
    return sign | u32(std::min(double(infinite), whole + ((exponent + bias - 1) << mantissa_bits)));
}

double half_of(u32 both, int high) { return widened_half(both >> 16 * high & 0xFFFF); }

// Matrix units ------------------------------------------------------------------------------------------------

// An operand of 16 x 16: what one thread of a warp holds of it.
void place(const u32* a, int lane, double (*matrix)[16]) {
    for (int i = 0; i < 4; ++i)
        for (int high = 0; high < 2; ++high)
            matrix[lane / 4 + 8 * (i % 2)][lane % 4 * 2 + 8 * (i / 2) + high] = half_of(a[i], high);
}

// 16 x 16 by `columns` x 16; each thread of the warp gives and takes its own sums.
void multiply(const double (*a)[16], const double (*b)[16], int columns, float* const* sums) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < columns / 2; ++i) {
            const double* row = a[lane / 4 + 8 * (i / 2 % 2)];
            const double* column = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
            double sum = sums[lane][i];
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            sums[lane][i] = float(sum);
        }
}

void multiply_warp(Thread* lanes) {
    double a[16][16], b[8][16];
    float* sums[32];
    for (int lane = 0; lane < 32; ++lane) {
        place(lanes[lane].a, lane, a);
        sums[lane] = lanes[lane].sums;
        for (int high = 0; high < 2; ++high) {
            b[lane / 4][lane % 4 * 2 + high] = half_of(lanes[lane].low, high);
            b[lane / 4][lane % 4 * 2 + 8 + high] = half_of(lanes[lane].high, high);
        }
    }
    multiply(a, b, 8, sums);
}

// 16 channels of each row that a descriptor describes.
std::vector<uint16_t> rows_at(u64 described, int columns) {
    const u32 first = u32(described & 0x3FFF) << 4, stride = u32(described >> 32 & 0x3FFF) << 4;
    if (described >> 62 != 1 || described >> 49 & 7 || first & 0x380)
        fail("rows are not as the copy engine permutes them");
    std::vector<uint16_t> found(16 * columns);
    for (int row = 0; row < columns; ++row)
        for (int piece = 0; piece < 2; ++piece) {
            const u32 address = permuted(first + row / 8 * stride + row % 8 * 128 + piece * 16);
            std::memcpy(&found[16 * row + 8 * piece], at(address, 16, 16), 16);
        }
    return found;
}

bool no_numbers(const void* start, u64 bytes) {
    const auto* found = static_cast<const unsigned char*>(start);
    return std::all_of(found, found + bytes, [](unsigned char byte) { return byte == NO_NUMBER; });
}

// The first product under way of each of 128 threads.
void multiply_group(Thread* all) {
    const Product& first = all[0].products.front();
    const std::vector<uint16_t> rows = rows_at(first.rows, first.columns);
    std::vector<double> b(rows.size());
    for (u64 i = 0; i < b.size(); ++i) b[i] = widened_half(rows[i]);
    for (int warp = 0; warp < 4; ++warp) {
        double a[16][16];
        float* sums[32];
        for (int lane = 0; lane < 32; ++lane) {
            Product& product = all[warp * 32 + lane].products.front();
            if (product.rows != first.rows || product.columns != first.columns || product.keep != first.keep)
                fail("threads of four warps differ in what they multiply");
            if (std::memcmp(product.a, product.a_before, 16)) fail("an operand changed under a product");
            if (lane == 0 && product.rows_before != rows) fail("rows changed under a product");
            if (!no_numbers(product.d, 2 * product.columns)) fail("sums changed under a product");
            if (!product.keep) std::fill(product.d_before.begin(), product.d_before.end(), 0.0f);
            place(product.a, lane, a);
            sums[lane] = product.d_before.data();
        }
        multiply(a, reinterpret_cast<const double(*)[16]>(b.data()), first.columns, sums);
    }
    for (int i = 0; i < 128; ++i) {
        std::deque<Product>& products = all[i].products;
        const Product done = std::move(products.front());
        products.pop_front();
        // Sums stay under way as long as a later product adds to them.
        const auto next = std::find_if(products.begin(), products.end(), [&](Product& p) { return p.d == done.d; });
        if (next == products.end())
            std::memcpy(done.d, done.d_before.data(), 2 * done.columns);
        else
            next->d_before = done.d_before;
    }
}

// Programs ----------------------------------------------------------------------------------------------------

void run_fiber() {
    body(arguments);
    Thread& thread = self();
    if (!thread.copies.empty() || !thread.products.empty()) fail("it ended before its copies or products");
    waiting[threadIdx.x].done = true;
    setcontext(&scheduler);
}

void begin_program() {
    std::memset(shared, NO_NUMBER, sizeof(shared));
    threads.assign(launch.threads, Thread());
    waiting.assign(launch.threads, Waiting());
    warps.assign(launch.threads / 32, Meeting());
    groups.assign(launch.threads / 128 + 1, Meeting());
    std::fill(std::begin(named), std::end(named), Meeting());
    barriers.clear();
    barriers.reserve(64);
    bulk.clear();
    ahead_ended = launch.order;
    fenced = false;
    for (u64 i = 0; i < launch.threads; ++i) {
        ucontext_t& context = threads[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + i * STACK;
        context.uc_stack.ss_size = STACK;
        makecontext(&context, run_fiber, 0);
    }
    if (ahead_ended) return;
    if (launch.inputs.bytes) std::memset(launch.inputs.start, NO_NUMBER, launch.inputs.bytes);
    for (int i = 0; i < 3; ++i)
        before[i].assign(launch.written[i].start, launch.written[i].start + launch.written[i].bytes);
}

void end_ahead() {
    if (!inputs.empty()) std::memcpy(launch.inputs.start, inputs.data(), inputs.size());
    for (int i = 0; i < 3; ++i)
        if (!std::equal(before[i].begin(), before[i].end(), launch.written[i].start))
            fail("it wrote before the launch ahead had ended");
    ahead_ended = true;
    ++ahead_endings;
}

void order(std::vector<u32>& numbers, u64 count, u64 together) {
    numbers.resize(count);
    for (u64 i = 0; i < count; ++i) numbers[i] = u32(launch.order == 1 ? count - 1 - i : i);
    if (launch.order < 2) return;
    // Those of a warp stay together.
    for (u64 i = 0; i < count; i += together) {
        const u64 other = random_order() % (i / together + 1) * together;
        std::swap_ranges(&numbers[i], &numbers[i] + together, &numbers[other]);
    }
    for (u64 i = 0; i < count; i += together) std::shuffle(&numbers[i], &numbers[i] + together, random_order);
}

// Runs the first thread that can go on; false if none can.
bool run_thread() {
    for (u32 i : thread_order) {
        if (!waiting[i].over()) continue;
        threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
        return true;
    }
    return false;
}

// What happens when all threads that are left wait.
void go_on(u32 waits) {
    threadIdx.x = waits;
    if (!bulk.empty()) return finish_bulk();
    if (ahead_ended) fail("no thread can go on; this one waits for %s", threads[waits].waits_for);
    end_ahead();
}

void run_program() {
    begin_program();
    for (u32 i = 0; i < launch.threads;) {
        if (run_thread()) continue;
        while (i < launch.threads && waiting[i].done) ++i;
        if (i < launch.threads) go_on(i);
    }
    if (!bulk.empty()) fail("it ended before a copy");
    if (!ahead_ended) fail("it ended before the launch ahead");
    if (!no_numbers(shared + launch.shared, MOST_SHARED + GUARD - launch.shared))
        fail("shared memory behind its end was written");
}

void reach_too_far(int) { fail("memory is touched that is not the program's"); }

}  // namespace

const char* emulated::start(const Launch& given, Body program, void** values, bool as_bfloat16) {
    launch = given;
    body = program;
    arguments = values;
    bfloat16 = as_bfloat16;
    message[0] = 0;
    if (launch.shared > MOST_SHARED) return "more shared memory than there is";
    random_order.seed(u32(launch.order));
    order(program_order, launch.programs, 1);
    order(thread_order, launch.threads, 32);
    stacks = static_cast<unsigned char*>(std::malloc(launch.threads * STACK));
    inputs.assign(launch.inputs.start, launch.inputs.start + launch.inputs.bytes);
    gridDim.x = u32(launch.programs);
    struct sigaction ours = {}, theirs;
    ours.sa_handler = reach_too_far;
    sigaction(SIGSEGV, &ours, &theirs);
    getcontext(&outside);
    if (!message[0])
        for (u32 i : program_order) {
            blockIdx.x = i;
            run_program();
        }
    sigaction(SIGSEGV, &theirs, nullptr);
    std::free(stacks);
    return message[0] ? message : nullptr;
}

// CUDA's functions --------------------------------------------------------------------------------------------

void __syncthreads() { emulated::meet(0, u32(launch.threads)); }

void __syncwarp() {
    as_warp(SYNC, "__syncwarp", [](Thread*) {});
}

float __shfl_xor_sync(u32, float value, int other) {
    Thread& thread = self();
    std::memcpy(&thread.word, &value, 4);
    thread.low = u32(other);
    as_warp(SHUFFLE, "__shfl_xor_sync", [](Thread* lanes) {
        for (int lane = 0; lane < 32; ++lane) lanes[lane].high = lanes[lane ^ lanes[lane].low].word;
    });
    std::memcpy(&value, &thread.high, 4);
    return value;
}

void emulated::meet(int name, u32 everyone) {
    if (everyone % 32 || everyone > launch.threads) fail("%u threads cannot meet", everyone);
    together(named[name], everyone, everyone, name ? "a named barrier" : "__syncthreads", [] {});
}

// hopper.h ----------------------------------------------------------------------------------------------------

u32 shared_address(const void* pointer) {
    return SHARED_AT + u32(static_cast<const unsigned char*>(pointer) - shared);
}

void barrier_init(u32 barrier, u32 arrivals) {
    u32* words = words_of(barrier);
    words[0] = BARRIER;
    words[1] = u32(barriers.size());
    if (barriers.size() == barriers.capacity()) fail("more barriers than are kept");
    barriers.push_back({arrivals, arrivals, 0, 0});
}

void barrier_fence() { fenced = true; }

void barrier_arrive(u32 address) { barrier_expect(address, 0); }

void barrier_expect(u32 address, u32 bytes) {
    Barrier& barrier = barrier_at(address);
    if (!barrier.pending) fail("more threads arrive at a barrier than it waits for");
    --barrier.pending;
    barrier.bytes += bytes;
    complete_phase(barrier);
}

void barrier_wait(u32 address, u32 parity) {
    const Barrier& barrier = barrier_at(address);
    if (barrier.phase % 2 == parity) wait_for(barrier.phase, barrier.phase, "a barrier in shared memory");
}

void copy_bulk(u32 target, const void* source, u32 bytes, u32 barrier) {
    if (!bytes || bytes % 16) fail("%u bytes cannot be copied", bytes);
    begin_bulk({target, bytes, barrier, weight_at(source, bytes), {}, 0, 0});
}

void copy_box(u32 target, const Map& map, int column, int row, u32 barrier) {
    if (!ahead_ended) fail("it reads what the launch ahead writes");
    begin_bulk({target, u32(map.box_rows) * 128, barrier, nullptr, map, column, row});
}

void copy16(u32 target, const void* source) {
    std::memset(at(target, 16, 16), NO_NUMBER, 16);
    self().copies.push_back({self().copy_groups, target, weight_at(source, 16)});
}

void copies_commit() { ++self().copy_groups; }

void emulated::copies_wait(int left) {
    Thread& thread = self();
    for (; !thread.copies.empty() && thread.copies[0].group < thread.copy_groups - left; thread.copies.pop_front())
        std::memcpy(at(thread.copies[0].target, 16, 16), thread.copies[0].source, 16);
}

uint4 shared_load16(u32 address) {
    uint4 found;
    std::memcpy(&found, at(address, 16, 16), 16);
    return found;
}

u32 shared_load4(u32 address) {
    u32 found;
    std::memcpy(&found, at(address, 4, 4), 4);
    return found;
}

void launch_wait() {
    if (!ahead_ended) wait_for(ahead_endings, ahead_endings, "the launch ahead");
}

u32 rounded(float low, float high) { return rounded_half(low) | rounded_half(high) << 16; }

u32 multiplied_and_added(u32 value, u32 factor, u32 summand) {
    u32 both = 0;
    for (int high = 0; high < 2; ++high)
        both |= rounded_half(half_of(value, high) * half_of(factor, high) + half_of(summand, high)) << 16 * high;
    return both;
}

float2 widened(u32 both) { return {widened_half(both & 0xFFFF), widened_half(both >> 16)}; }

u32 transposed(u32 both) {
    Thread& thread = self();
    thread.word = both;
    as_warp(TRANSPOSE, "transposed", [](Thread* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const u32 low = lanes[column * 4 + row / 2].word, high = lanes[(column + 1) * 4 + row / 2].word;
            lanes[lane].low = (low >> 16 * (row % 2) & 0xFFFF) | (high >> 16 * (row % 2) & 0xFFFF) << 16;
        }
    });
    return thread.low;
}

// products.h --------------------------------------------------------------------------------------------------

void product_of_warp(float (&sums)[4], const u32 (&a)[4], u32 low, u32 high) {
    Thread& thread = self();
    thread.sums = sums;
    thread.a = a;
    thread.low = low;
    thread.high = high;
    as_warp(PRODUCT, "product_of_warp", multiply_warp);
}

void products_begin() { self().begun = true; }

void emulated::product(float* d, int columns, const u32* a, u64 rows, bool keep) {
    Thread& thread = self();
    if (!thread.begun) fail("a product without products_begin");
    Product product = {thread.product_groups, columns, d, a, rows, keep, {}, {}, {}};
    std::memcpy(product.a_before, a, 16);
    const auto same = [&](const Product& p) { return p.d == d; };
    if (std::none_of(thread.products.begin(), thread.products.end(), same))
        product.d_before.assign(d, d + columns / 2);
    else if (!keep)
        fail("sums are begun anew under a product");
    std::memset(d, NO_NUMBER, 2 * columns);
    if (threadIdx.x % 32 == 0) product.rows_before = rows_at(rows, columns);
    thread.products.push_back(std::move(product));
}

void products_commit() { ++self().product_groups; }

void emulated::products_wait(int left) {
    const int end = self().product_groups - left;
    self().begun = false;
    together(groups[threadIdx.x / 128], 128, PRODUCTS, "products_wait", [&] {
        Thread* all = &threads[threadIdx.x / 128 * 128];
        for (int i = 0; i < 128; ++i)
            if (all[i].product_groups - left != end || all[i].products.size() != all[0].products.size())
                fail("threads of four warps differ in what they multiply");
        while (!all[0].products.empty() && all[0].products.front().group < end) multiply_group(all);
    });
}
