// Every instruction set that runs here against the portable one, bit for bit, on random shapes; and the law with threads of
// its own. No ONNX Runtime: runs under emulation and under sanitizers. Prints what differs; exits with the number of it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace dspark;

static std::mt19937 generator(1);
static int failures = 0;

static int64_t number(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
static std::vector<float> floats(int64_t n, float size = 1) {
  std::vector<float> x(static_cast<size_t>(n));
  std::normal_distribution<float> normal(0, size);
  for (float& v : x) v = normal(generator);
  return x;
}

template <class T>
static void equal(const Set& set, const char* what, const std::vector<T>& mine, const std::vector<T>& reference) {
  if (std::memcmp(mine.data(), reference.data(), mine.size() * sizeof(T)) == 0) return;
  size_t i = 0;
  while (std::memcmp(&mine[i], &reference[i], sizeof(T)) == 0) i++;
  std::printf("%s: %s differs at %zu: %.9g, portable %.9g\n", set.name, what, i, static_cast<double>(mine[i]), static_cast<double>(reference[i]));
  failures++;
}

static std::vector<const Set*> others() {
  std::vector<const Set*> found;
  std::istringstream names(sets_that_run());
  for (std::string name; names >> name;) {
#if defined(__x86_64__)
    for (const Set* set : {&kAvx512, &kAvxVnni, &kAvx2})
      if (name == set->name) found.push_back(set);
#elif defined(__aarch64__)
    if (name == kNeon.name) found.push_back(&kNeon);
#endif
  }
  return found;
}

static void products(const std::vector<const Set*>& sets) {
  for (int round = 0; round < 120; round++) {
    const Format format = static_cast<Format>(round % 8);
    const bool blocks = format >= Format::Int8 && format <= Format::Int4Minimum, bytes = format == Format::W8A8;
    const int64_t block = 16 * number(1, 5), K = blocks ? block * number(1, 3) : number(1, 90), N = number(1, 150), rows = number(1, 19);
    const int64_t tiles = (N + 15) / 16, per = blocks ? K / block : 1, padded = bytes ? (K + 3) / 4 * 4 : K;
    std::vector<uint8_t> data(static_cast<size_t>(tiles * (K + 4) * 64));
    for (uint8_t& v : data) v = static_cast<uint8_t>(number(0, 255));
    if (format == Format::Float32) {
      const auto w = floats(tiles * K * 16);
      std::memcpy(data.data(), w.data(), w.size() * 4);
    } else if (format == Format::Float16 || format == Format::BFloat16) {
      for (size_t i = 1; i < data.size(); i += 2) data[i] = static_cast<uint8_t>((data[i] & 0x81) | 0x38);  // finite
    }
    const auto scale = floats(tiles * per * 16), minimum = floats(tiles * per * 16), x = floats(rows * K);
    const bool has_minimum = format == Format::Int8Minimum || format == Format::Int4Minimum;
    const Weights w = {format, K, N, blocks ? block : 0, false, data.data(), reinterpret_cast<const uint8_t*>(scale.data()), has_minimum ? reinterpret_cast<const uint8_t*>(minimum.data()) : nullptr};
    const auto run = [&](const Set& set, int threads, int64_t at_once) {
      std::vector<int8_t> q(static_cast<size_t>(interleaved_size(rows, 1) * padded));
      std::vector<float> s(static_cast<size_t>(interleaved_size(rows, per))), lift(s.size()), y(static_cast<size_t>(rows * N), NAN);
      std::vector<int32_t> start(s.size());
      for (int64_t m = 0; m < rows; m++) {
        if (blocks) set.quantize_blocks(&x[static_cast<size_t>(m * K)], K, block, format, m, q.data(), s.data(), start.data(), lift.data());
        if (bytes) set.quantize_row(&x[static_cast<size_t>(m * K)], K, 0, &q[static_cast<size_t>(m * padded)], &s[static_cast<size_t>(m)], &start[static_cast<size_t>(m)]);
      }
      std::vector<std::thread> pool;
      for (int t = 0; t < threads; t++)
        pool.emplace_back([&, t] {
          for (int64_t m = 0; m < rows; m += at_once)
            set.product({w, {x.data(), q.data(), s.data(), start.data(), lift.data()}, y.data(), nullptr, m, std::min(rows, m + at_once), tiles * t / threads, tiles * (t + 1) / threads});
        });
      for (auto& thread : pool) thread.join();
      return y;
    };
    const auto reference = run(kPortable, 1, 1);
    for (const Set* set : sets) {
      equal(*set, "product", run(*set, 1, rows), reference);
      equal(*set, "product in threads", run(*set, 3, number(1, rows)), reference);
    }
  }
}

static void attention(const std::vector<const Set*>& sets) {
  for (int round = 0; round < 40; round++) {
    const int64_t width = number(1, 90), value_width = number(1, 90), group = number(1, 4), tokens = number(1, 12), start = number(0, 600);
    const int64_t capacity = start + tokens, rows = tokens * group, direct = start + number(1, tokens), chunks = (capacity + kChunk - 1) / kChunk;
    const auto query = floats(rows * width, 0.3f), key = floats(capacity * width), value = floats(capacity * value_width);
    std::vector<uint8_t> mask(static_cast<size_t>(tokens * capacity));
    for (uint8_t& m : mask) m = number(0, 9) > 0;
    const auto run = [&](const Set& set, bool merge) {
      const int64_t bits_chunks = (direct + kChunk - 1) / kChunk;
      std::vector<uint16_t> bits(static_cast<size_t>(tokens * bits_chunks * kGroups));
      std::vector<Visible> others;
      std::vector<int32_t> first;
      for (int64_t t = 0; t < tokens; t++) {
        first.push_back(static_cast<int32_t>(others.size()));
        for (int64_t c = 0; c < bits_chunks; c++)
          set.mask_bits(&mask[static_cast<size_t>(t * capacity + c * kChunk)], std::min<int64_t>(kChunk, direct - c * kChunk), &bits[static_cast<size_t>((t * bits_chunks + c) * kGroups)]);
        for (int64_t s = direct; s < capacity; s++)
          if (mask[static_cast<size_t>(t * capacity + s)]) others.push_back({static_cast<int32_t>(s), static_cast<int32_t>(s)});
      }
      first.push_back(static_cast<int32_t>(others.size()));
      others.push_back({});
      std::vector<float> y(static_cast<size_t>(rows * value_width));
      const int64_t step = merge ? number(1, kRowBlock) : kRowBlock;
      for (int64_t r0 = 0; r0 < rows; r0 += step) {
        const int64_t r1 = std::min(rows, r0 + step), n = r1 - r0, many = merge ? 1 : chunks;
        std::vector<float> scratch(static_cast<size_t>(attend_scratch(width, value_width, tokens) + 16)), maximum(static_cast<size_t>(n * many)), sum(maximum.size());
        std::vector<float> values(static_cast<size_t>(n * many * value_width));
        set.attend({query.data(), key.data(), value.data(), width, value_width, group, round % 3 ? 0.0f : 5.0f, direct, start, tokens, bits.data(), bits_chunks, others.data(), first.data(), r0, r1, 0, chunks, merge, n, maximum.data(), sum.data(), values.data(), scratch.data()});
        for (int64_t r = 0; r < n; r++) {
          float m = merge ? maximum[static_cast<size_t>(r)] : -INFINITY, l = merge ? sum[static_cast<size_t>(r)] : 0;
          std::vector<float> state(static_cast<size_t>(value_width));
          if (merge) std::copy_n(&values[static_cast<size_t>(r * value_width)], value_width, state.begin());
          for (int64_t c = 0; !merge && c < chunks; c++) {
            const size_t at = static_cast<size_t>(c * n + r);
            if (sum[at] != 0) set.merge(&m, &l, state.data(), maximum[at], sum[at], &values[at * static_cast<size_t>(value_width)], value_width);
          }
          set.finish(l, state.data(), value_width, &y[static_cast<size_t>((r0 + r) * value_width)]);
        }
      }
      return y;
    };
    const auto reference = run(kPortable, true);
    for (const Set* set : sets) {
      equal(*set, "attention", run(*set, true), reference);
      equal(*set, "attention, merged later", run(*set, false), reference);
    }
  }
}

static void rows(const std::vector<const Set*>& sets) {
  for (int round = 0; round < 60; round++) {
    const int64_t n = number(1, 300);
    const auto x = floats(n, round % 2 ? 1.0f : 20.0f), skip = floats(n), weight = floats(n), bias = floats(n);
    const auto run = [&](const Set& set, int what) {
      std::vector<float> y(static_cast<size_t>(n)), total(y.size());
      if (what < 6) set.unary(static_cast<Activation>(what), x.data(), n, 7, y.data());
      else if (what < 9) set.gate(static_cast<Activation>(what - 6), x.data(), skip.data(), n, y.data());
      else if (what == 9) set.rms_norm(x.data(), skip.data(), weight.data(), n, 1e-6f, y.data(), total.data());
      else if (what == 10) set.layer_norm(x.data(), weight.data(), bias.data(), n, 1e-6f, y.data());
      else set.turn({x.data(), weight.data(), bias.data(), y.data(), n, n / 4 * 2, what == 12, 0.125f});
      return y;
    };
    for (const Set* set : sets)
      for (int what = 0; what < 13; what++) equal(*set, ("row operator " + std::to_string(what)).c_str(), run(*set, what), run(kPortable, what));
  }
}

static void drafts(const std::vector<const Set*>& sets) {
  for (int round = 0; round < 60; round++) {
    const int64_t n = number(1, kColumns), k = number(1, 20);
    const auto x = floats(n, 3), base = floats(n), added = floats(n);
    const auto run = [&](const Set& set) {
      std::vector<float> y = x, found(static_cast<size_t>(n + k + 3), 0);
      std::vector<int32_t> columns(static_cast<size_t>(k));
      float* values = &found[static_cast<size_t>(n)];
      set.likely(y.data(), base.data(), round % 2 ? added.data() : nullptr, n, values + k, values + k + 1);
      const int64_t half = n / 2, have = set.top(y.data(), half, 0, k, 0, values, columns.data());
      set.top(&y[static_cast<size_t>(half)], n - half, half, k, have, values, columns.data());
      values[k + 2] = set.spread(y.data(), n, 0.7f, values[k] / 0.7f, found.data());
      for (const int32_t column : columns) found.push_back(static_cast<float>(column));
      found.insert(found.end(), y.begin(), y.end());
      return found;
    };
    for (const Set* set : sets) equal(*set, "drafts", run(*set), run(kPortable));
  }
}

int main() {
  const auto sets = others();
  std::printf("against portable:");
  for (const Set* set : sets) std::printf(" %s", set->name);
  std::printf("\n");
  products(sets);
  attention(sets);
  rows(sets);
  drafts(sets);
  std::printf("%d differences\n", failures);
  return failures > 100 ? 100 : failures;
}
