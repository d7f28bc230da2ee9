// A block of threads, on the device or imitated on the host.
//
// An algorithm is a sequence of phases: `each(f)` runs f(thread) for every thread and ends with a barrier. Nothing but
// shared memory outlives a phase, so the host can run the threads of a phase one after another, and tests of the host
// build test the very algorithm the device runs. Sums and maxima are over integers: no order of threads shows in them.
#pragma once

#include "dspark/number.h"

namespace dspark {

constexpr int kBlockThreads = 512;

class HostBlock {
 public:
  explicit HostBlock(int threads) : threads_(threads) {}

  int size() const { return threads_; }

  template <class F> void each(F f) const {
    for (int thread = 0; thread < threads_; ++thread) f(thread);
  }

  // Add to a shared number; add_one only to one that stays below 2^32.
  void add(uint64_t* target, uint64_t value) const { *target += value; }
  void add_one(uint64_t* target) const { ++*target; }

  // The same when all threads of the block call it together; cheaper on the device.
  void add_together(uint64_t* target, uint64_t value) const { *target += value; }
  void raise_together(uint64_t* target, uint64_t value) const { *target = larger(*target, value); }

  // Replaces data[0..count) by sums of what stands before each entry; returns the sum of all.
  uint64_t scan(uint64_t* data, int count, uint64_t*) const {
    uint64_t sum = 0;
    for (int i = 0; i < count; ++i) {
      const uint64_t value = data[i];
      data[i] = sum;
      sum += value;
    }
    return sum;
  }

  // A shared value as every thread's own; nobody overwrites it before all have read it.
  template <class T> T read(const T* value) const { return *value; }

 private:
  int threads_;
};

#ifdef DSPARK_HAS_DEVICE
class DeviceBlock {
 public:
  __device__ int size() const { return static_cast<int>(blockDim.x); }

  template <class F> __device__ void each(F f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // In halves of 32 bits, which shared memory adds natively: each carry is seen by exactly one thread.
  __device__ void add(uint64_t* target, uint64_t value) const {
    unsigned int* const halves = reinterpret_cast<unsigned int*>(target);
    const unsigned int low = static_cast<unsigned int>(value);
    const unsigned int carry = atomicAdd(halves, low) + low < low ? 1u : 0u;
    const unsigned int high = static_cast<unsigned int>(value >> 32) + carry;
    if (high) atomicAdd(halves + 1, high);
  }

  __device__ void add_one(uint64_t* target) const { atomicAdd(reinterpret_cast<unsigned int*>(target), 1u); }

  __device__ void add_together(uint64_t* target, uint64_t value) const {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (threadIdx.x % 32 == 0 && value) add(target, value);
  }

  __device__ void raise_together(uint64_t* target, uint64_t value) const {
    for (int step = 16; step; step >>= 1) value = larger(value, __shfl_xor_sync(0xffffffffu, value, step));
    if (threadIdx.x % 32 == 0)
      atomicMax(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(value));
  }

  __device__ uint64_t scan(uint64_t* data, int count, uint64_t* warp_sums) const {
    const int thread = static_cast<int>(threadIdx.x), threads = size(), lane = thread % 32, warp = thread / 32;
    const int each_has = (count + threads - 1) / threads;
    const int first = smaller(thread * each_has, count), last = smaller(first + each_has, count);
    uint64_t sum = 0;
    for (int i = first; i < last; ++i) sum += data[i];
    uint64_t inclusive = sum;
    for (int step = 1; step < 32; step <<= 1) {
      const uint64_t below = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += below;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    uint64_t total = 0, before = inclusive - sum;
    for (int i = 0; i < threads / 32; ++i) {
      if (i < warp) before += warp_sums[i];
      total += warp_sums[i];
    }
    for (int i = first; i < last; ++i) {
      const uint64_t value = data[i];
      data[i] = before;
      before += value;
    }
    __syncthreads();
    return total;
  }

  template <class T> __device__ T read(const T* value) const {
    const T copy = *value;
    __syncthreads();
    return copy;
  }
};
#endif

}  // namespace dspark
