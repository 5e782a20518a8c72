// Runs CUDA kernels on the CPU, so that their indexing, their barriers and their shared memory are
// tested where there is no GPU.
//
// A block's threads are fibers on one system thread; the scheduler resumes them in an order
// shuffled by a seed, and blocks run one after another. Under AddressSanitizer and
// UndefinedBehaviorSanitizer a kernel's bad accesses are reported as in any program. Under
// ThreadSanitizer every fiber is a thread of its own, synchronised with others only by barriers and
// shuffles: a missing barrier is reported as the data race that it is.
//
// The copies and the matrix units' loads stop at an address that is not aligned to their size;
// vector loads and stores do under UndefinedBehaviorSanitizer.
//
// Emulated: __syncthreads, __syncwarp, __shfl_xor_sync, static __shared__ memory; the matrix units,
// asynchronous copies and barriers in shared memory as far as csrc/cuda/mma.cuh and wgmma.cuh wrap
// them. Not emulated: timing, atomics, the memory model between blocks, and that between threads
// and the products of warpgroups (fence.proxy.async, wgmma.fence).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
// The scheduler's own state is no concern of the race detector.
#define EMU_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_UNCHECKED
#endif

namespace emu {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Which barrier every thread walks past as if it were missing: 1 is the first that it meets.
inline unsigned dropped_barrier = 0;
// The same of one warpgroup's waiting for barriers in shared memory.
inline unsigned dropped_wait = 0, dropped_wait_warpgroup = 0;

namespace race_detector {

#ifdef __SANITIZE_THREAD__
constexpr unsigned kNoSynchronisation = 1;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
EMU_UNCHECKED inline void switch_to(void* fiber) {
  __tsan_switch_to_fiber(fiber, kNoSynchronisation);
}
EMU_UNCHECKED inline void acquire(void* address) { __tsan_acquire(address); }
EMU_UNCHECKED inline void release(void* address) { __tsan_release(address); }
#else
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace race_detector

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kAtSharedBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, all;  // zeros from `bytes` on
};

// A product of a warpgroup that has begun.
struct Product {
  float* sums;
  std::function<void(float*)> finish;
};

// Arrivals of a barrier in shared memory, in its 64 bits.
struct Arrivals {
  uint16_t expected, missing;
  uint32_t phase;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* detector = race_detector::create();
  unsigned index;
  State state;
  unsigned block_barriers_met;  // the dropped one included
  unsigned block_barriers_passed;
  unsigned warp_barriers_passed;
  uint64_t offered[4];       // the value that this lane offers to the others of its warp
  std::vector<Copy> copies;  // begun, not yet committed
  std::vector<std::vector<Copy>> pending;            // committed, not yet arrived; oldest first
  std::vector<Product> products;                     // begun, not yet waited for; oldest first
  std::map<float*, std::vector<float>> sums_before;  // of these products
  size_t products_begun;
  unsigned waits_met;  // the dropped one included
  const Arrivals* awaited;
  unsigned awaited_parity;

  Fiber() = default;
  Fiber(Fiber&&) = delete;
  ~Fiber() { race_detector::destroy(detector); }
};

struct Block {
  dim3 block_index, block_size, grid_size;
  std::deque<Fiber>& fibers;
  ucontext_t scheduler;
  void* scheduler_detector = nullptr;
  Fiber* running = nullptr;
  std::function<void()> body;
  std::mt19937 random;
  // What the race detector takes for the synchronising objects. Barriers take turns between two: a
  // thread that is already at the next barrier must not synchronise with one still at this one.
  char start, finish;
  char block_barrier[2];
  char warp_barrier[32][2];
  uint64_t operands[8][64][2];  // of the latest products, by warpgroup
  size_t products_begun[8];     // by any thread of the warpgroup
};

constexpr unsigned kWarpgroup = 4 * kWarp;
constexpr uint32_t kSharedFirst = 1024;  // where a block's shared memory begins
inline char* dynamic_shared = nullptr;

inline Block* block = nullptr;

EMU_UNCHECKED inline void yield(State state) {
  Fiber* self = block->running;
  self->state = state;
  race_detector::switch_to(block->scheduler_detector);
  swapcontext(&self->context, &block->scheduler);
}

EMU_UNCHECKED inline void run_fiber() {
  race_detector::acquire(&block->start);
  block->body();
  race_detector::release(&block->finish);
  yield(State::kDone);
}

EMU_UNCHECKED inline void start_fiber(Fiber& fiber, unsigned index) {
  fiber.index = index;
  fiber.state = State::kReady;
  fiber.block_barriers_met = 0;
  fiber.block_barriers_passed = 0;
  fiber.warp_barriers_passed = 0;
  fiber.copies.clear();
  fiber.pending.clear();
  fiber.products.clear();
  fiber.sums_before.clear();
  fiber.products_begun = 0;
  fiber.waits_met = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

EMU_UNCHECKED inline void resume_ready_fibers() {
  std::vector<unsigned> order(block->fibers.size());
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), block->random);
  for (const unsigned i : order) {
    Fiber& fiber = block->fibers[i];
    if (fiber.state != State::kReady) continue;
    block->running = &fiber;
    race_detector::switch_to(fiber.detector);
    swapcontext(&block->scheduler, &fiber.context);
  }
}

// Releases fibers [begin, end) if all of them wait at the same kind of barrier.
EMU_UNCHECKED inline bool release_together(size_t begin, size_t end, State barrier) {
  for (size_t i = begin; i < end; ++i)
    if (block->fibers[i].state != barrier) return false;
  for (size_t i = begin; i < end; ++i) block->fibers[i].state = State::kReady;
  return true;
}

// Releases the fibers that wait for phases of barriers in shared memory that have ended.
EMU_UNCHECKED inline bool release_from_shared_barriers() {
  bool released = false;
  for (Fiber& fiber : block->fibers) {
    if (fiber.state != State::kAtSharedBarrier) continue;
    if (fiber.awaited->phase % 2 == fiber.awaited_parity) continue;
    fiber.state = State::kReady;
    released = true;
  }
  return released;
}

EMU_UNCHECKED inline size_t count(State state) {
  size_t total = 0;
  for (const Fiber& fiber : block->fibers) total += fiber.state == state;
  return total;
}

EMU_UNCHECKED inline void run_block() {
  const size_t threads = block->fibers.size();
  for (size_t i = 0; i < threads; ++i) start_fiber(block->fibers[i], static_cast<unsigned>(i));
  for (size_t& begun : block->products_begun) begun = 0;
  race_detector::release(&block->start);
  for (;;) {
    resume_ready_fibers();
    if (count(State::kDone) == threads) break;
    bool released = release_together(0, threads, State::kAtBlockBarrier);
    for (size_t warp = 0; warp < threads; warp += kWarp)
      released |= release_together(warp, std::min(warp + kWarp, threads), State::kAtWarpBarrier);
    released |= release_from_shared_barriers();
    if (!released) {
      throw std::runtime_error(
          "deadlock: of " + std::to_string(threads) + " threads " +
          std::to_string(count(State::kAtBlockBarrier)) + " wait at __syncthreads, " +
          std::to_string(count(State::kAtWarpBarrier)) + " at a warp barrier, " +
          std::to_string(count(State::kAtSharedBarrier)) + " at one in shared memory, and " +
          std::to_string(count(State::kDone)) + " have finished");
    }
  }
  race_detector::acquire(&block->finish);
}

// Runs kernel<<<grid, threads>>>(arguments...) in the schedule that `seed` gives.
template <class Kernel, class... Arguments>
void launch(unsigned grid, unsigned threads, unsigned seed, Kernel kernel,
            const Arguments&... arguments) {
  static std::map<unsigned, std::deque<Fiber>> fibers;  // by threads; kept: costly to make
  Block state{{}, {threads, 1, 1}, {grid, 1, 1}, fibers[threads]};
  state.random.seed(seed);
  state.body = [&] { kernel(arguments...); };
  state.fibers.resize(threads);
  state.scheduler_detector = race_detector::current();
  block = &state;
  for (unsigned i = 0; i < grid; ++i) {
    state.block_index = {i, 0, 0};
    run_block();
  }
  block = nullptr;
}

EMU_UNCHECKED inline dim3 thread_index() { return {block->running->index, 0, 0}; }
EMU_UNCHECKED inline dim3 block_index() { return block->block_index; }
EMU_UNCHECKED inline dim3 grid_size() { return block->grid_size; }
EMU_UNCHECKED inline unsigned lane() { return block->running->index % kWarp; }

EMU_UNCHECKED inline void sync_block() {
  Fiber* self = block->running;
  if (++self->block_barriers_met == dropped_barrier) return;
  char* barrier = &block->block_barrier[self->block_barriers_passed++ % 2];
  race_detector::release(barrier);
  yield(State::kAtBlockBarrier);
  race_detector::acquire(barrier);
}

EMU_UNCHECKED inline void sync_warp() {
  Fiber* self = block->running;
  char* barrier = &block->warp_barrier[self->index / kWarp][self->warp_barriers_passed++ % 2];
  race_detector::release(barrier);
  yield(State::kAtWarpBarrier);
  race_detector::acquire(barrier);
}

// What each lane of this warp offers; every lane of the warp must call.
template <class T>
EMU_UNCHECKED std::array<T, kWarp> gather(const T& value) {
  static_assert(sizeof(T) <= sizeof(Fiber::offered));
  Fiber* self = block->running;
  __builtin_memcpy(self->offered, &value, sizeof value);
  yield(State::kAtWarpBarrier);
  std::array<T, kWarp> received;
  const unsigned first = self->index / kWarp * kWarp;
  for (unsigned i = 0; i < kWarp; ++i)
    __builtin_memcpy(&received[i], block->fibers[first + i].offered, sizeof(T));
  yield(State::kAtWarpBarrier);
  return received;
}

inline void require_aligned(const void* address, size_t bytes, const char* access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw std::runtime_error(std::string("misaligned address: ") + access + " of " +
                           std::to_string(bytes) + " bytes");
}

// Copies arrive as late as the waiting allows; until then the destination holds NaN. A kernel that
// reads too early computes NaN, and one that copies over what others still read is a data race.
inline void begin_copy(void* to, const void* from, size_t bytes, size_t all) {
  memset(to, 0xff, all);
  block->running->copies.push_back({to, from, bytes, all});
}

inline void commit_copies() {
  Fiber* self = block->running;
  self->pending.push_back(std::move(self->copies));
  self->copies.clear();
}

inline void finish_copies(size_t still_pending) {
  std::vector<std::vector<Copy>>& pending = block->running->pending;
  while (pending.size() > still_pending) {
    for (const Copy& copy : pending.front()) {
      memcpy(copy.to, copy.from, copy.bytes);
      memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.all - copy.bytes);
    }
    pending.erase(pending.begin());
  }
}

EMU_UNCHECKED inline void init_barrier(uint64_t* state, unsigned arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<Arrivals*>(state) = {count, count, 0};
}

EMU_UNCHECKED inline void arrive(uint64_t* state) {
  race_detector::release(state);
  Arrivals& arrivals = *reinterpret_cast<Arrivals*>(state);
  if (--arrivals.missing > 0) return;
  arrivals.missing = arrivals.expected;
  ++arrivals.phase;
}

EMU_UNCHECKED inline void wait(uint64_t* state, unsigned parity) {
  Fiber* self = block->running;
  if (++self->waits_met == dropped_wait && self->index / kWarpgroup == dropped_wait_warpgroup)
    return;
  self->awaited = reinterpret_cast<const Arrivals*>(state);
  self->awaited_parity = parity;
  yield(State::kAtSharedBarrier);
  race_detector::acquire(state);
}

// Every thread of a block names the same.
EMU_UNCHECKED inline void use_dynamic_shared(void* data) {
  dynamic_shared = static_cast<char*>(data);
}

inline uint32_t shared_address(const void* data) {
  return static_cast<uint32_t>(static_cast<const char*>(data) - dynamic_shared) + kSharedFirst;
}
inline const void* shared_data(uint32_t address) {
  return dynamic_shared + (address - kSharedFirst);
}

// Products are made as late as the waiting allows; until then the sums are NaN. A kernel that uses
// them too early computes NaN, and one that copies over operands still to be read is a data race.
EMU_UNCHECKED inline void require_same_operands(uint64_t a, uint64_t b) {
  Fiber* self = block->running;
  const size_t warpgroup = self->index / kWarpgroup, index = self->products_begun++;
  size_t& begun = block->products_begun[warpgroup];
  uint64_t* operands = block->operands[warpgroup][index % 64];
  if (index == begun) {
    ++begun;
    operands[0] = a;
    operands[1] = b;
  }
  if (begun - index > 64 || operands[0] != a || operands[1] != b)
    throw std::runtime_error("threads of a warpgroup multiply different matrices");
}

inline void begin_product(uint64_t a, uint64_t b, float* sums, size_t bytes,
                          std::function<void(float*)> finish) {
  require_same_operands(a, b);
  Fiber* self = block->running;
  if (self->sums_before.count(sums) == 0) {
    self->sums_before[sums].assign(sums, sums + bytes / sizeof *sums);
    memset(sums, 0xff, bytes);
  }
  self->products.push_back({sums, std::move(finish)});
}

inline void finish_products() {
  Fiber* self = block->running;
  for (const auto& [sums, before] : self->sums_before) {
    for (size_t i = 0; i < before.size(); ++i) {
      uint32_t bits;
      memcpy(&bits, sums + i, sizeof bits);
      if (bits != 0xffffffffu) throw std::runtime_error("sums were written before their product");
      sums[i] = before[i];
    }
  }
  for (const Product& product : self->products) product.finish(product.sums);
  self->sums_before.clear();
  self->products.clear();
}

}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define gridDim (emu::grid_size())

inline void __syncthreads() { emu::sync_block(); }
inline void __syncwarp() { emu::sync_warp(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  if (mask != 0xffffffffu) throw std::runtime_error("shuffles are emulated for whole warps only");
  return emu::gather(value)[source % emu::kWarp];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  if (mask != 0xffffffffu) throw std::runtime_error("shuffles are emulated for whole warps only");
  return emu::gather(value)[emu::lane() ^ lanes];
}
