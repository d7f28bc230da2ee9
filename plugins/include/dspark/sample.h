// One row of logits: its filtered distribution, and a draw from it.
//
// The same as `dspark_runtime.speculation.sampling`: temperature, top-k, top-p, min-p, each on what the one before it left; ties at
// a cut keep the lower ids; a token is drawn by inverse CDF over ascending ids. All filters keep a prefix of the order
// (weight falling, id rising), so what is kept is described by two numbers, `cut` and `last`, found by radix selection
// over the bits of the weights. Probabilities are never stored.
//
// A row whose largest logit is NaN, or above temperature 0 infinite, is damaged: its draw is kDamaged.
#pragma once

#include "dspark/block.h"

namespace dspark {

constexpr int kBins = 1024;   // 10 bits in each of 3 rounds; a weight's bits are below 2^30
constexpr int kDamaged = -1;  // in place of a token
constexpr float kGreedyBelow = 1e-5f;

struct SamplingParams {
  float temperature;
  float top_p;
  float min_p;
  int64_t top_k;
};

// Shared memory of a block that samples.
struct SampleShared {
  uint64_t mass[kBins];
  uint64_t count[kBins];
  uint64_t warp_sums[32];
  uint64_t best;
  uint64_t rest;
  int32_t found;
};

// A row of logits in global memory.
template <class T> struct Row {
  const T* data;
  int size;

  DSPARK_HD float at(int id) const { return to_float(data[id]); }

  DSPARK_HD int groups() const { return (size + kGroup - 1) / kGroup; }

  // f(id, logit) for the tokens of a group, ids ascending.
  template <class F> DSPARK_HD void visit(int group, F f) const {
    const int first = group * kGroup;
    float values[kGroup];
    if (first + kGroup <= size) {
      load_group(data + first, values);
    } else {
      DSPARK_UNROLL
      for (int i = 0; i < kGroup; ++i) values[i] = first + i < size ? at(first + i) : 0.0f;
    }
    DSPARK_UNROLL
    for (int i = 0; i < kGroup; ++i)
      if (first + i < size) f(first + i, values[i]);
  }
};

// A row's distribution, unnormalized. `kept` tokens have a weight with bits above `cut`, or equal to it and an id of at
// most `last`. Greedy: all mass on `top_id`.
struct Weigher {
  float top;
  float inverse_temperature;
  uint32_t cut;
  int32_t last;
  int32_t top_id;
  bool greedy;
  bool damaged;

  DSPARK_HD float weight(float logit) const { return exp_negative((logit - top) * inverse_temperature); }

  DSPARK_HD bool keeps(uint32_t bits, int32_t id) const { return bits > cut || (bits == cut && id <= last); }

  DSPARK_HD uint64_t mass(float logit, int32_t id) const {
    if (greedy) return id == top_id ? 1ull << kMassBits : 0;
    const float w = weight(logit);
    return keeps(bit_cast<uint32_t>(w), id) ? mass_of(w) : 0;
  }
};

// First id at which the cumulative value(id, logit) passes goal(total), or -1 if the total is 0. Sets *total.
template <class Block, class T, class Value, class Goal>
DSPARK_HD int32_t locate(const Block& block, SampleShared& shared, const Row<T>& row, Value value, Goal goal,
                         uint64_t* total) {
  const int threads = block.size(), groups = row.groups(), tiles = (groups + threads - 1) / threads;
  uint64_t* const sums = shared.count;  // of tiles: `threads` groups each
  uint64_t* const parts = shared.mass;  // of the groups of one tile
  block.each([&](int thread) {
    for (int i = thread; i < tiles; i += threads) sums[i] = 0;
    if (thread == 0) shared.found = -1;
  });
  const auto group_sum = [&](int group) {
    uint64_t sum = 0;
    if (group < groups) row.visit(group, [&](int id, float logit) { sum += value(id, logit); });
    return sum;
  };
  block.each([&](int thread) {
    for (int tile = 0; tile < tiles; ++tile) block.add_together(&sums[tile], group_sum(tile * threads + thread));
  });
  const uint64_t all = block.scan(sums, tiles, shared.warp_sums);
  *total = all;
  if (all == 0) return -1;
  const uint64_t wanted = goal(all);
  block.each([&](int thread) {
    for (int i = thread; i < tiles; i += threads) {
      const uint64_t end = i + 1 < tiles ? sums[i + 1] : all;
      if (sums[i] <= wanted && wanted < end) {
        shared.found = i;
        shared.rest = wanted - sums[i];
      }
    }
  });
  const int tile = block.read(&shared.found);
  const uint64_t rest = block.read(&shared.rest);
  block.each([&](int thread) { parts[thread] = group_sum(tile * threads + thread); });
  const uint64_t of_tile = block.scan(parts, threads, shared.warp_sums);
  block.each([&](int thread) {
    const uint64_t end = thread + 1 < threads ? parts[thread + 1] : of_tile;
    if (parts[thread] > rest || rest >= end) return;
    uint64_t cumulative = parts[thread];
    row.visit(tile * threads + thread, [&](int id, float logit) {
      const bool below = cumulative <= rest;
      cumulative += value(id, logit);
      if (below && cumulative > rest) shared.found = id;
    });
  });
  return block.read(&shared.found);
}

// Moves `weigher`'s cut so that it keeps the largest `top_k` tokens (by_count), or the fewest largest tokens whose mass
// reaches `top_p` of what it kept before.
template <class Block, class T>
DSPARK_HD void select(const Block& block, SampleShared& shared, const Row<T>& row, Weigher& weigher, bool by_count,
                      int64_t top_k, float top_p) {
  const int threads = block.size(), groups = row.groups();
  const Weigher old = weigher;
  uint64_t goal = by_count ? static_cast<uint64_t>(top_k) : 0, before = 0, equals = 0;
  uint32_t prefix = 0;
  DSPARK_ROLLED
  for (int shift = 20; shift >= 0; shift -= 10) {
    block.each([&](int thread) {
      for (int i = thread; i < kBins; i += threads) shared.mass[i] = shared.count[i] = 0;
      if (thread == 0) shared.found = -1;
    });
    block.each([&](int thread) {
      for (int group = thread; group < groups; group += threads) {
        row.visit(group, [&](int id, float logit) {
          const float w = old.weight(logit);
          const uint32_t bits = bit_cast<uint32_t>(w);
          if (bits == 0 || bits >> shift >> 10 != prefix || !old.keeps(bits, id)) return;
          const int bin = kBins - 1 - static_cast<int>(bits >> shift & (kBins - 1));  // heavy tokens first
          if (by_count || shift == 0) block.add_one(&shared.count[bin]);
          if (!by_count) block.add(&shared.mass[bin], mass_of(w));
        });
      }
    });
    const uint64_t counted = block.scan(shared.count, kBins, shared.warp_sums);
    const uint64_t weighed = block.scan(shared.mass, kBins, shared.warp_sums);
    if (shift == 20 && !by_count) goal = nucleus_goal(weighed, top_p);
    const uint64_t* const sums = by_count ? shared.count : shared.mass;
    const uint64_t all = by_count ? counted : weighed;
    block.each([&](int thread) {
      for (int i = thread; i < kBins; i += threads) {
        const uint64_t end = i + 1 < kBins ? sums[i + 1] : all;
        if (before + sums[i] < goal && goal <= before + end) shared.found = i;
      }
    });
    const int bin = block.read(&shared.found);
    if (bin < 0) return;  // fewer tokens have weight than may stay
    equals = (bin + 1 < kBins ? shared.count[bin + 1] : counted) - shared.count[bin];
    before += sums[bin];
    prefix = prefix << 10 | static_cast<uint32_t>(kBins - 1 - bin);
    block.read(&shared.found);  // a barrier: the bins are cleared next
  }
  uint64_t ties = goal - before;
  if (!by_count) {
    const uint64_t mass = mass_of(bit_cast<float>(prefix));
    ties = (ties + mass - 1) / mass;
  }
  weigher.cut = prefix;
  if (ties >= equals) {
    weigher.last = prefix == old.cut ? old.last : row.size - 1;
    return;
  }
  uint64_t total;
  weigher.last = locate(
      block, shared, row,
      [&](int32_t id, float logit) {
        const uint32_t bits = bit_cast<uint32_t>(old.weight(logit));
        return static_cast<uint64_t>(bits == prefix && old.keeps(bits, id) ? 1 : 0);
      },
      [&](uint64_t) { return ties - 1; }, &total);
}

// argmax_key of the tokens of groups [first, last).
template <class Block, class T>
DSPARK_HD uint64_t best_key(const Block& block, SampleShared& shared, const Row<T>& row, int first, int last) {
  const int threads = block.size();
  block.each([&](int thread) {
    if (thread == 0) shared.best = 0;
  });
  block.each([&](int thread) {
    uint64_t key = 0;
    if (first + thread < last) {
      float best = bit_cast<float>(0xff800000u);  // -inf
      int32_t best_id = (first + thread) * kGroup;
      for (int group = first + thread; group < last; group += threads) {
        // A comparison that a NaN passes; after the first NaN nothing is taken.
        row.visit(group, [&](int id, float logit) {
          if (logit <= best || is_nan(best)) return;
          best = logit;
          best_id = id;
        });
      }
      key = argmax_key(best, best_id);
    }
    block.raise_together(&shared.best, key);
  });
  return block.read(&shared.best);
}

// The filtered distribution of a row, given the best_key of all its tokens.
template <class Block, class T>
DSPARK_HD Weigher weigh(const Block& block, SampleShared& shared, const Row<T>& row, const SamplingParams& params,
                        uint64_t best) {
  Weigher weigher;
  weigher.top_id = argmax_id(best);
  weigher.top = row.at(weigher.top_id);
  weigher.greedy = params.temperature < kGreedyBelow;
  weigher.damaged = weigher.greedy ? is_nan(weigher.top) : !is_finite(weigher.top);
  weigher.inverse_temperature = static_cast<float>(1.0 / static_cast<double>(params.temperature));
  weigher.cut = 0;
  weigher.last = row.size - 1;
  if (weigher.greedy || weigher.damaged) return weigher;
  DSPARK_ROLLED  // one copy of the code serves both filters
  for (int filter = 0; filter < 2; ++filter) {
    const bool by_count = filter == 0;
    const bool on = by_count ? params.top_k > 0 && params.top_k < row.size : params.top_p < 1.0f;
    if (on) select(block, shared, row, weigher, by_count, params.top_k, params.top_p);
  }
  if (params.min_p > 0.0f) {
    const uint32_t least = bit_cast<uint32_t>(smaller(params.min_p, 1.0f));  // the largest weight is 1
    if (least > weigher.cut) {
      weigher.cut = least;
      weigher.last = row.size - 1;
    }
  }
  return weigher;
}

template <class Block, class T>
DSPARK_HD Weigher weigh(const Block& block, SampleShared& shared, const Row<T>& row, const SamplingParams& params) {
  return weigh(block, shared, row, params, best_key(block, shared, row, 0, row.groups()));
}

// A token of the row for a uniform number in [0, 1), or kDamaged.
template <class Block, class T>
DSPARK_HD int32_t draw(const Block& block, SampleShared& shared, const Row<T>& row, const Weigher& weigher,
                       float uniform, uint64_t* total) {
  *total = 1ull << kMassBits;
  if (weigher.damaged) return kDamaged;
  if (weigher.greedy) return weigher.top_id;
  return locate(
      block, shared, row, [&](int32_t id, float logit) { return weigher.mass(logit, id); },
      [&](uint64_t all) { return draw_goal(all, uniform); }, total);
}

}  // namespace dspark
