// Enough of CUDA's language for the kernels to run on a CPU: each thread of a block is a fiber, blocks run in turn.
//
// Fibers switch at barriers and shuffles only, in a random order that a seed fixes, so a missing barrier shows as a
// wrong result for some seed. Blocks run in a random order too. Shared memory keeps what the block before left in it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStackBytes = 128 * 1024;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block

struct Barrier {
  unsigned waiting = 0, generation = 0;
};

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel, std::mt19937& random)
      : kernel_(kernel), random_(random), threads_(threads), fibers_(threads), warps_(threads / 32), slots_(threads) {}

  void run() {
    current_block = this;
    while (stacks.size() < threads_) stacks.emplace_back(new char[kStackBytes]);
    std::vector<unsigned> order(threads_);
    for (unsigned i = 0; i < threads_; ++i) order[i] = i;
    for (unsigned finished = 0; finished < threads_;) {
      std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (const unsigned i : order) {
        Fiber& fiber = fibers_[i];
        if (fiber.done || (fiber.barrier && fiber.barrier->generation == fiber.generation)) continue;
        fiber.barrier = nullptr;
        moved = true;
        current_ = i;
        threadIdx = dim3(i);
        turn(fiber);
        finished += fibers_[current_].done;
      }
      if (!moved) {
        std::fprintf(stderr, "a barrier that not all threads reach\n");
        std::abort();
      }
    }
  }

  void sync() { wait(&all_, threads_); }

  // The value lane `from` of this warp gave.
  template <class T> T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 64 bits");
    const unsigned me = current_, warp = me / 32;
    std::memcpy(&slots_[me], &value, sizeof(T));
    wait(&warps_[warp], 32);
    T result;
    std::memcpy(&result, &slots_[warp * 32 + from], sizeof(T));
    wait(&warps_[warp], 32);
    return result;
  }

  static inline Block* current_block = nullptr;

 private:
  struct Fiber {
    jmp_buf place;
    Barrier* barrier = nullptr;
    unsigned generation = 0;
    bool started = false, done = false;
  };

  // Runs a fiber until it waits or ends.
  __attribute__((noinline)) void turn(Fiber& fiber) {
    if (_setjmp(scheduler_) == 0) resume(fiber);
  }

  // Contexts start a fiber; from then on jumps switch, which need no system call.
  void resume(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[current_].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Block* const block = current_block;
    block->kernel_();
    block->fibers_[block->current_].done = true;
    _longjmp(block->scheduler_, 1);
  }

  void wait(Barrier* barrier, unsigned count) {
    Fiber& fiber = fibers_[current_];
    if (++barrier->waiting == count) {
      barrier->waiting = 0;
      ++barrier->generation;
    } else {
      fiber.barrier = barrier;
      fiber.generation = barrier->generation;
    }
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  }

  const std::function<void()>& kernel_;
  std::mt19937& random_;
  unsigned threads_, current_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  std::vector<uint64_t> slots_;
  Barrier all_;
  jmp_buf scheduler_;
};

inline std::mt19937 random_numbers;

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (const unsigned i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    Block(block.x, kernel, random_numbers).run();
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::Block::current_block->sync(); }
inline void __threadfence() {}

template <class T> T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::Block::current_block->exchange(value, threadIdx.x % 32 ^ static_cast<unsigned>(step));
}
template <class T> T __shfl_up_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x % 32, from = lane >= static_cast<unsigned>(step) ? lane - step : lane;
  return emulation::Block::current_block->exchange(value, from);
}
template <class T> T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  return before;
}
template <class T> T atomicMax(T* target, T value) {
  const T before = *target;
  if (value > before) *target = value;
  return before;
}

#define DSPARK_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [&] { static_cast<void>(stream), kernel(__VA_ARGS__); })
