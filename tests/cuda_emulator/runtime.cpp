// SPDX-License-Identifier: Apache-2.0
// Fibers, warp collectives, block barriers, guarded memory and faults of the emulator.
#include "runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

// Shared arrays of the kernels lie in a section of their own, which is poisoned before every block.
extern "C" {
extern char __start_emulator_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulator_shared[] __attribute__((weak, visibility("hidden")));
}

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define HAS_FAST_SWITCH 1
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
#else
#define HAS_FAST_SWITCH 0
#endif

namespace emulator {

Fiber* current = nullptr;
Index block_index, block_size, grid_size;
unsigned char* dynamic_shared = nullptr;

namespace {

constexpr std::size_t STACK_BYTES = 256 * 1024;
constexpr unsigned char POISON = 0xff;  // a NaN, or -1
constexpr const char* NAMES[] = {
    "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync", "__any_sync",
    "__all_sync", "__match_any_sync", "__match_all_sync", "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
    "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync",
    "__syncthreads", "__syncthreads_and", "__syncthreads_or", "__syncthreads_count"};

struct Warp {
    unsigned ready, in_collective, at_barrier, gone;  // lanes; gone: returned, or never there
};

struct Block {
    Warp warps[MAX_THREADS / WARP];
    unsigned ready_warps;
    int num_warps, num_threads, alive, arrived, count;
    bool all, any;
    Operation operation;
    const char* file;
    int line, result;
};

Fiber fibers[MAX_THREADS];
Fiber scheduler;
Block block;
unsigned char* stacks = nullptr;
std::size_t page, stack_stride;
void (*kernel_body)(const Slot*) = nullptr;
const Slot* kernel_slots = nullptr;
bool is_reversed = false;
std::string failure;
std::uint64_t num_switches = 0;
sigjmp_buf fault_return;
volatile std::uintptr_t fault_address = 0, fault_code = 0;
volatile int fault_signal = 0;

#if !HAS_FAST_SWITCH
ucontext_t contexts[MAX_THREADS], scheduler_context;
ucontext_t& context_of(Fiber* fiber) { return fiber == &scheduler ? scheduler_context : contexts[fiber->rank]; }
#endif

void switch_to(Fiber* next) {
    Fiber* self = current;
    if (next == self) return;
    current = next;
    ++num_switches;
#if HAS_FAST_SWITCH
    emulator_switch(&self->stack_pointer, next->stack_pointer);
#else
    swapcontext(&context_of(self), &context_of(next));
#endif
}

int pick(unsigned mask) { return is_reversed ? 31 - __builtin_clz(mask) : __builtin_ctz(mask); }

// The next thread that can run, of the same warp if there is one; the scheduler when none can.
Fiber* next_ready() {
    if (!block.ready_warps) return &scheduler;
    int warp = current->warp;
    if (current == &scheduler || !(block.ready_warps >> warp & 1)) warp = pick(block.ready_warps);
    Warp& chosen = block.warps[warp];
    const int lane = pick(chosen.ready);
    chosen.ready &= ~(1u << lane);
    if (!chosen.ready) block.ready_warps &= ~(1u << warp);
    return &fibers[warp * WARP + lane];
}

void make_ready(int warp, unsigned lanes) {
    if (!lanes) return;
    block.warps[warp].ready |= lanes;
    block.ready_warps |= 1u << warp;
}

std::uint64_t value_of(const Fiber* lanes, unsigned members, int lane) {
    return members >> lane & 1 ? lanes[lane].value : ~0ull;  // reading from a lane that takes no part is undefined
}

int shuffle_source(const Fiber& fiber) {
    const int start = fiber.lane & ~(fiber.width - 1), end = start + fiber.width;
    switch (fiber.operation) {
        case SHUFFLE: return start | (fiber.argument & (fiber.width - 1));
        case SHUFFLE_UP: return fiber.lane - fiber.argument >= start ? fiber.lane - fiber.argument : fiber.lane;
        case SHUFFLE_DOWN: return fiber.lane + fiber.argument < end ? fiber.lane + fiber.argument : fiber.lane;
        default: return (fiber.lane ^ fiber.argument) < end ? fiber.lane ^ fiber.argument : fiber.lane;
    }
}

std::uint64_t reduce(Operation operation, std::uint64_t a, std::uint64_t b) {
    const unsigned x = a, y = b;
    switch (operation) {
        case REDUCE_ADD: return x + y;
        case REDUCE_MIN: return std::min(x, y);
        case REDUCE_MAX: return std::max(x, y);
        case REDUCE_MIN_SIGNED: return unsigned(std::min(int(x), int(y)));
        case REDUCE_MAX_SIGNED: return unsigned(std::max(int(x), int(y)));
        case REDUCE_AND: return x & y;
        case REDUCE_OR: return x | y;
        default: return x ^ y;
    }
}

// Result that all members share: votes and reductions.
std::uint64_t common_result(Operation operation, const Fiber* lanes, unsigned members) {
    unsigned votes = 0;
    std::uint64_t total = 0;
    bool is_first = true;
    for (unsigned rest = members; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if (lanes[lane].value) votes |= 1u << lane;
        total = is_first ? lanes[lane].value : reduce(operation, total, lanes[lane].value);
        is_first = false;
    }
    switch (operation) {
        case BALLOT: return votes;
        case ANY: return votes != 0;
        case ALL: return votes == members;
        default: return total;
    }
}

unsigned lanes_equal_to(std::uint64_t value, const Fiber* lanes, unsigned members) {
    unsigned equal = 0;
    for (unsigned rest = members; rest; rest &= rest - 1)
        if (lanes[__builtin_ctz(rest)].value == value) equal |= rest & -rest;
    return equal;
}

// Gives every member its result. Values were left by all of them before.
void finish_collective(Operation operation, Fiber* lanes, unsigned members) {
    const bool is_shuffle = operation >= SHUFFLE && operation <= SHUFFLE_XOR;
    const bool is_match = operation == MATCH_ANY || operation == MATCH_ALL;
    const std::uint64_t common =
        operation == SYNC || is_shuffle || is_match ? 0 : common_result(operation, lanes, members);
    for (unsigned rest = members; rest; rest &= rest - 1) {
        Fiber& fiber = lanes[__builtin_ctz(rest)];
        if (is_shuffle) {
            fiber.result = value_of(lanes, members, shuffle_source(fiber));
        } else if (is_match) {
            const unsigned equal = lanes_equal_to(fiber.value, lanes, members);
            fiber.result = operation == MATCH_ANY || equal == members ? equal : 0;
        } else {
            fiber.result = common;
        }
    }
}

// Ends the collective that `fiber` waits in if all of its lanes have come; returns them, or 0.
unsigned try_collective(const Fiber& fiber) {
    Warp& warp = block.warps[fiber.warp];
    Fiber* lanes = &fibers[fiber.warp * WARP];
    const unsigned members = fiber.mask & ~warp.gone;
    if ((warp.in_collective & members) != members) return 0;
    for (unsigned rest = members; rest; rest &= rest - 1) {
        const Fiber& other = lanes[__builtin_ctz(rest)];
        if (other.operation != fiber.operation || other.mask != fiber.mask) return 0;
    }
    finish_collective(fiber.operation, lanes, members);
    warp.in_collective &= ~members;
    return members;
}

void release_barrier() {
    switch (block.operation) {
        case BARRIER_AND: block.result = block.all; break;
        case BARRIER_OR: block.result = block.any; break;
        default: block.result = block.count;
    }
    block.arrived = block.count = 0;
    block.any = false;
    block.all = true;
    for (int warp = 0; warp < block.num_warps; ++warp) {
        make_ready(warp, block.warps[warp].at_barrier);
        block.warps[warp].at_barrier = 0;
    }
}

void leave() {
    const int warp_index = current->warp;
    Warp& warp = block.warps[warp_index];
    warp.gone |= 1u << current->lane;
    --block.alive;
    for (unsigned rest = warp.in_collective; rest; rest &= warp.in_collective & (rest - 1))
        make_ready(warp_index, try_collective(fibers[warp_index * WARP + __builtin_ctz(rest)]));
    if (block.arrived && block.arrived == block.alive) release_barrier();
}

void fiber_main() {
    kernel_body(kernel_slots);
    leave();
    switch_to(next_ready());
    __builtin_unreachable();
}

void prepare_stacks() {
    if (stacks) return;
    page = sysconf(_SC_PAGESIZE);
    stack_stride = STACK_BYTES + page;
    void* place = mmap(nullptr, stack_stride * MAX_THREADS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = static_cast<unsigned char*>(place);
}

void prepare_fiber(int rank) {
    Fiber& fiber = fibers[rank];
    unsigned char* base = stacks + rank * stack_stride + page;
#if HAS_FAST_SWITCH
    // As if emulator_switch had been called by something that fiber_main returns to: rsp is 8 past a multiple of 16.
    void** top = reinterpret_cast<void**>(base + STACK_BYTES) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&contexts[rank]);
    contexts[rank].uc_stack.ss_sp = base;
    contexts[rank].uc_stack.ss_size = STACK_BYTES;
    makecontext(&contexts[rank], fiber_main, 0);
#endif
}

void prepare_fibers(int num_threads) {
    static int num_mapped = 0;
    prepare_stacks();
    for (; num_mapped < num_threads; ++num_mapped)
        mprotect(stacks + num_mapped * stack_stride + page, STACK_BYTES, PROT_READ | PROT_WRITE);
    for (int rank = 0; rank < num_threads; ++rank) {
        Fiber& fiber = fibers[rank];
        fiber.rank = rank;
        fiber.warp = rank / WARP;
        fiber.lane = rank % WARP;
        fiber.thread = {rank % block_size.x, rank / block_size.x % block_size.y, rank / (block_size.x * block_size.y)};
    }
}

std::string describe(const Fiber& fiber) {
    char text[600];
    const char* name = std::strrchr(fiber.file, '/');
    std::snprintf(text, sizeof text, "thread (%u,%u,%u) waits in %s at %s:%d", fiber.thread.x, fiber.thread.y,
                  fiber.thread.z, NAMES[fiber.operation], name ? name + 1 : fiber.file, fiber.line);
    std::string whole = text;
    if (fiber.operation < BARRIER) {
        std::snprintf(text, sizeof text, " with mask 0x%08x", fiber.mask);
        whole += text;
    }
    return whole;
}

// Nobody can run and not all have returned: one line for each place where threads wait.
std::string describe_deadlock() {
    std::string text = "deadlock: threads wait for others that will never come";
    std::vector<const Fiber*> seen;
    for (int rank = 0; rank < block.num_threads; ++rank) {
        const Fiber& fiber = fibers[rank];
        const Warp& warp = block.warps[fiber.warp];
        if (!((warp.in_collective | warp.at_barrier) >> fiber.lane & 1)) continue;
        const bool is_known = std::any_of(seen.begin(), seen.end(), [&](const Fiber* other) {
            return other->line == fiber.line && other->operation == fiber.operation && other->mask == fiber.mask;
        });
        if (is_known || seen.size() == 8) continue;
        seen.push_back(&fiber);
        text += "\n  " + describe(fiber);
    }
    char counts[80];
    std::snprintf(counts, sizeof counts, "\n  %d of %d threads have returned", block.num_threads - block.alive,
                  block.num_threads);
    return text + counts;
}

void run_block(unsigned shared_bytes) {
    std::memset(dynamic_shared, POISON, shared_bytes);
    if (__start_emulator_shared) std::memset(__start_emulator_shared, POISON, __stop_emulator_shared - __start_emulator_shared);
    const int num_threads = block_size.x * block_size.y * block_size.z;
    block.num_threads = block.alive = num_threads;
    block.num_warps = (num_threads + WARP - 1) / WARP;
    block.arrived = block.count = 0;
    block.any = false;
    block.all = true;
    block.ready_warps = 0;
    for (int warp = 0; warp < block.num_warps; ++warp) {
        const int lanes = std::min(WARP, num_threads - warp * WARP);
        const unsigned there = lanes == WARP ? ~0u : (1u << lanes) - 1;
        block.warps[warp] = {0, 0, 0, ~there};
        make_ready(warp, there);
    }
    for (int rank = 0; rank < num_threads; ++rank) prepare_fiber(rank);
    switch_to(next_ready());
    if (failure.empty() && block.alive) failure = describe_deadlock();
}

// A copy of everything that pointers lead to, each range ending at a page that cannot be touched. What lies between the
// copy and the pages before and behind it is poisoned, and looked at afterwards.
class GuardedMemory {
public:
    explicit GuardedMemory(Launch& launch) {
        std::vector<Slot*> pointers;
        for (Slot* slot = launch.slots; slot != launch.slots + launch.num_slots; ++slot)
            if (slot->kind != SCALAR && slot->value) pointers.push_back(slot);
        std::sort(pointers.begin(), pointers.end(), [](Slot* a, Slot* b) { return a->value < b->value; });
        std::vector<std::size_t> range_of;
        for (Slot* slot : pointers) {
            const std::uint64_t end = slot->value + slot->bytes;
            if (ranges_.empty() || slot->value >= ranges_.back().end) ranges_.push_back({slot->value, end});
            Range& range = ranges_.back();
            range.end = std::max(range.end, end);
            range.is_written |= slot->kind == POINTER;
            range_of.push_back(ranges_.size() - 1);
        }
        for (Range& range : ranges_) map(range);
        for (std::size_t index = 0; index < pointers.size(); ++index) {
            const Range& range = ranges_[range_of[index]];
            pointers[index]->value = reinterpret_cast<std::uint64_t>(range.copy) + (pointers[index]->value - range.begin);
        }
    }

    ~GuardedMemory() {
        for (Range& range : ranges_) munmap(range.mapping, range.mapped);
    }

    // Hands the results over; returns what is wrong with them.
    std::string finish() {
        std::string wrong;
        for (Range& range : ranges_) {
            const std::size_t bytes = range.end - range.begin;
            if (range.is_written) std::memcpy(reinterpret_cast<void*>(range.begin), range.copy, bytes);
            if (!is_poison(range.first, range.copy) || !is_poison(range.copy + bytes, range.last))
                wrong = "memory was written that belongs to no argument, just before or behind one";
        }
        return wrong;
    }

private:
    struct Range {
        std::uint64_t begin, end;
        bool is_written = false;
        unsigned char *first = nullptr, *copy = nullptr, *last = nullptr;
        std::size_t mapped = 0;
        void* mapping = nullptr;
    };
    static constexpr std::size_t BEFORE = 64 * 1024;

    static bool is_poison(const unsigned char* begin, const unsigned char* end) {
        return std::all_of(begin, end, [](unsigned char byte) { return byte == POISON; });
    }

    static void map(Range& range) {
        const std::size_t bytes = range.end - range.begin;
        range.mapped = BEFORE + (bytes + 16 + page - 1) / page * page + page;
        range.mapping = mmap(nullptr, range.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        range.first = static_cast<unsigned char*>(range.mapping) + BEFORE;
        range.last = static_cast<unsigned char*>(range.mapping) + range.mapped - page;
        mprotect(range.mapping, BEFORE, PROT_NONE);
        mprotect(range.last, page, PROT_NONE);
        // The copy keeps the original's alignment to 16 bytes, the widest that kernels use.
        const std::uint64_t slack = (reinterpret_cast<std::uint64_t>(range.last) - bytes - range.begin) & 15;
        range.copy = range.last - bytes - slack;
        std::memset(range.first, POISON, range.copy - range.first);
        std::memcpy(range.copy, reinterpret_cast<void*>(range.begin), bytes);
        std::memset(range.last - slack, POISON, slack);
    }

    std::vector<Range> ranges_;
};

void on_fault(int signal, siginfo_t* information, void* context) {
    fault_signal = signal;
    fault_address = reinterpret_cast<std::uintptr_t>(information->si_addr);
#if defined(__x86_64__)
    fault_code = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    siglongjmp(fault_return, 1);
}

constexpr int NUM_SIGNALS = 6;
constexpr int SIGNALS[NUM_SIGNALS] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGVTALRM};

void set_timer(int seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = seconds;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

class FaultHandlers {
public:
    explicit FaultHandlers(int time_limit) {
        alternate_.resize(64 * 1024);
        stack_t stack = {};
        stack.ss_sp = alternate_.data();
        stack.ss_size = alternate_.size();
        sigaltstack(&stack, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int index = 0; index < NUM_SIGNALS; ++index) sigaction(SIGNALS[index], &action, &old_[index]);
        set_timer(time_limit);
    }
    ~FaultHandlers() {
        set_timer(0);
        for (int index = 0; index < NUM_SIGNALS; ++index) sigaction(SIGNALS[index], &old_[index], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    std::vector<unsigned char> alternate_;
    stack_t old_stack_;
    struct sigaction old_[NUM_SIGNALS];
};

std::string describe_fault(Launch* launch) {
    Dl_info information = {};
    if (fault_code && dladdr(reinterpret_cast<void*>(fault_code), &information))
        launch->fault_code = fault_code - reinterpret_cast<std::uintptr_t>(information.dli_fbase);
    if (fault_signal == SIGILL || fault_signal == SIGTRAP)
        return "undefined behaviour (a misaligned pointer, an index beyond a shared or local array, a float that no "
               "integer holds, a shift or a sum that overflows)";
    if (fault_signal == SIGFPE) return "an integer division by zero";
    if (fault_signal == SIGVTALRM) return "the kernel does not end: its time is over";
    launch->fault_address = fault_address;
    const std::uintptr_t base = reinterpret_cast<std::uintptr_t>(stacks);
    if (fault_address >= base && fault_address < base + stack_stride * MAX_THREADS)
        return "the stack of a thread is full (local arrays of more than 256 KiB?)";
    return "memory was touched that belongs to no argument";
}

// Dynamic shared memory ends at a page that cannot be touched.
void prepare_shared(unsigned shared_bytes) {
    static unsigned char* end = nullptr;
    if (!end) {
        const std::size_t bytes = (MAX_SHARED + page - 1) / page * page;
        void* place = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        end = static_cast<unsigned char*>(place) + bytes;
        mprotect(end, page, PROT_NONE);
    }
    dynamic_shared = end - (shared_bytes + 15) / 16 * 16;
}

void run_grid(Launch* launch) {
    for (block_index.z = 0; block_index.z < grid_size.z; ++block_index.z)
        for (block_index.y = 0; block_index.y < grid_size.y; ++block_index.y)
            for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
                run_block(launch->shared_bytes);
                if (!failure.empty()) return;
            }
}

}  // namespace

void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char who[100];
    std::snprintf(who, sizeof who, "thread (%u,%u,%u): ", current->thread.x, current->thread.y, current->thread.z);
    failure = std::string(who) + text;
    switch_to(&scheduler);
    __builtin_unreachable();
}

std::uint64_t collective(Operation operation, unsigned mask, std::uint64_t value, int argument, int width,
                         const char* file, int line) {
    Fiber& self = *current;
    if (!(mask >> self.lane & 1)) fail("%s at line %d with mask 0x%08x, which leaves out the caller", NAMES[operation], line, mask);
    if (width < 1 || width > WARP || (width & (width - 1))) fail("%s at line %d with width %d", NAMES[operation], line, width);
    self.operation = operation;
    self.mask = mask;
    self.value = value;
    self.argument = argument;
    self.width = width;
    self.file = file;
    self.line = line;
    block.warps[self.warp].in_collective |= 1u << self.lane;
    const unsigned members = try_collective(self);
    if (members)
        make_ready(self.warp, members & ~(1u << self.lane));
    else
        switch_to(next_ready());
    return self.result;
}

int block_barrier(Operation operation, int predicate, const char* file, int line) {
    Fiber& self = *current;
    self.operation = operation;
    self.file = file;
    self.line = line;
    if (block.arrived == 0) {
        block.operation = operation;
        block.file = file;
        block.line = line;
    } else if (block.operation != operation || block.line != line || std::strcmp(block.file, file) != 0) {
        fail("%s at line %d while other threads of the block wait in %s at line %d", NAMES[operation], line,
             NAMES[block.operation], block.line);
    }
    block.all = block.all && predicate;
    block.any = block.any || predicate;
    block.count += predicate != 0;
    if (++block.arrived == block.alive) {
        block.warps[self.warp].at_barrier &= ~(1u << self.lane);
        release_barrier();
    } else {
        block.warps[self.warp].at_barrier |= 1u << self.lane;
        switch_to(next_ready());
    }
    return block.result;
}

int run(Launch* launch, void (*body)(const Slot*), char* message, std::size_t size) {
    grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    block_size = {launch->block[0], launch->block[1], launch->block[2]};
    is_reversed = launch->is_reversed;
    failure.clear();
    num_switches = 0;
    kernel_body = body;
    kernel_slots = launch->slots;
    current = &scheduler;
    prepare_fibers(block_size.x * block_size.y * block_size.z);
    prepare_shared(launch->shared_bytes);
    {
        FaultHandlers handlers(launch->time_limit);
        GuardedMemory* memory = launch->is_guarded ? new GuardedMemory(*launch) : nullptr;
        if (sigsetjmp(fault_return, 1) == 0) {
            run_grid(launch);
        } else {
            char who[100];
            std::snprintf(who, sizeof who, "thread (%u,%u,%u): ", current->thread.x, current->thread.y, current->thread.z);
            failure = who + describe_fault(launch);
        }
        if (memory) {
            const std::string wrong = memory->finish();
            if (failure.empty()) failure = wrong;
        }
        delete memory;
    }
    launch->num_switches = num_switches;
    if (failure.empty()) return 0;
    std::snprintf(message, size, "block (%u,%u,%u), %s", block_index.x, block_index.y, block_index.z, failure.c_str());
    return 1;
}

}  // namespace emulator
