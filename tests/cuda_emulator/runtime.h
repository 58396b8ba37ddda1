// SPDX-License-Identifier: Apache-2.0
// The execution model: threads of a block are fibers of one operating-system thread, blocks run in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr unsigned MAX_SHARED = 227 * 1024;

struct Index {
    unsigned x, y, z;
};

enum Operation {
    SYNC, SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, ANY, ALL, MATCH_ANY, MATCH_ALL,
    REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, REDUCE_MIN_SIGNED, REDUCE_MAX_SIGNED, REDUCE_AND, REDUCE_OR, REDUCE_XOR,
    BARRIER, BARRIER_AND, BARRIER_OR, BARRIER_COUNT
};

struct Fiber {
    Index thread;
    int rank, warp, lane;
    void* stack_pointer;
    // What it waits for; meaningful while it waits.
    Operation operation;
    unsigned mask;
    std::uint64_t value, result;
    int argument, width;
    const char* file;
    int line;
};

// One argument of a kernel: a scalar's bits, or a pointer with the bytes that may be touched.
struct Slot {
    std::uint64_t value, bytes;
    int kind;
};
enum SlotKind { SCALAR = 0, CONST_POINTER = 1, POINTER = 2 };

struct Launch {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    int is_reversed, is_guarded, time_limit, num_slots;  // time_limit: seconds of processor time
    Slot* slots;
    // Filled when a kernel faults: address touched, and code address within this library.
    std::uint64_t fault_address, fault_code;
    std::uint64_t num_switches;
};

extern Fiber* current;
extern Index block_index, block_size, grid_size;
extern unsigned char* dynamic_shared;

int run(Launch* launch, void (*body)(const Slot*), char* message, std::size_t size);
std::uint64_t collective(Operation operation, unsigned mask, std::uint64_t value, int argument, int width,
                         const char* file, int line);
int block_barrier(Operation operation, int predicate, const char* file, int line);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <typename T>
T read_slot(const Slot& slot) {
    T value;
    __builtin_memcpy(&value, &slot.value, sizeof(T));
    return value;
}

}  // namespace emulator
