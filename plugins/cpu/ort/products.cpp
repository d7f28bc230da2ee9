// Products, products with the matrices of chosen experts, and lookups: shapes, quantized activations, threads.
#include <algorithm>

#include "weights.h"

namespace dspark::ort {
namespace {

// The matrix of one expert.
Weights matrix(Weights w, int64_t expert) {
  const int64_t tiles = tiles_of(w.N);
  w.data += expert * tiles * weight_bytes(w);
  if (w.scale) w.scale += expert * tiles * scale_bytes(w);
  if (w.minimum) w.minimum += expert * tiles * scale_bytes(w);
  return w;
}

// Rows [row0, row1) of one matrix.
struct Group {
  int64_t expert, row0, row1;
};

class ProductKernel : public Kernel {
 public:
  ProductKernel(Format format, bool experts, const Attributes& attributes)
      : format_(format), experts_(experts), N_(attributes.integer("N")), range_(format == Format::W8A8 ? attributes.real("range", 0) : 0), set_(*chosen_set()) {
    need(N_ > 0 && N_ <= INT32_MAX, "N = " + std::to_string(N_) + " must be positive");
  }

  void compute(const Call& call) const override {
    const Tensor x = call.input(0, "x");
    need(x.shape.rank >= 1 && (!experts_ || x.shape.rank == 2), x.text() + " must have " + (experts_ ? "two dimensions" : "a dimension"));
    const int64_t K = x.shape[x.shape.rank - 1];
    need(K > 0, x.text() + " has rows of no length");
    need(format_ != Format::W8A8 || K <= 65536, "K = " + std::to_string(K) + " is above 65536, where integer sums may overflow");
    int64_t experts = 0;
    const Weights w = read_weights(call, experts_ ? 2 : 1, format_, K, N_, experts_ ? &experts : nullptr);
    const int64_t rows = x.shape.size() / K;
    Shape shape = x.shape;
    shape.dims[shape.rank - 1] = N_;
    if (experts_) {
      const Tensor chosen = call.input(1, "expert");
      need(chosen.shape == Shape{rows}, chosen.text() + " must be [" + std::to_string(rows) + "], one for each row of " + x.text());
      check_range(chosen, experts);
      multiply(call, w, x.as<float>(), rows, static_cast<float*>(call.output(0, shape)), chosen.as<int64_t>(), experts);
    } else {
      multiply(call, w, x.as<float>(), rows, static_cast<float*>(call.output(0, shape)), nullptr, 0);
    }
  }

 private:
  static void check_range(const Tensor& chosen, int64_t experts) {
    for (int64_t r = 0; r < chosen.shape[0]; r++) {
      const int64_t e = chosen.as<int64_t>()[r];
      need(e >= 0 && e < experts, "expert " + std::to_string(e) + " of row " + std::to_string(r) + " does not exist; there are " + std::to_string(experts));
    }
  }

  void multiply(const Call& call, const Weights& w, const float* x, int64_t rows, float* y, const int64_t* chosen, int64_t experts) const {
    if (!rows) return;
    need(rows <= INT32_MAX, std::to_string(rows) + " rows are too many");
    const int64_t K = w.K, blocks = w.block ? K / w.block : 1, padded = format_ == Format::W8A8 ? (K + 3) / 4 * 4 : K;
    Pieces pieces;
    const bool quantized = is_quantized(format_);
    const int64_t scales = quantized ? interleaved_size(rows, blocks) : 0;
    const size_t q = pieces.add<int8_t>(scales / blocks * padded), scale = pieces.add<float>(scales);
    const size_t start = pieces.add<int32_t>(scales), lift = pieces.add<float>(scales);
    const size_t copies = pieces.add<float>(chosen && !quantized ? rows * K : 0);
    const size_t order = pieces.add<int32_t>(chosen ? rows : 0), groups = pieces.add<Group>(chosen ? std::min(rows, experts) : 1);
    const size_t counts = pieces.add<int32_t>(chosen ? experts + 1 : 0);
    pieces.take(Memory::Operator);
    int32_t* target = chosen ? pieces.at<int32_t>(order) : nullptr;
    Group* group = pieces.at<Group>(groups);
    int64_t group_count = 1;
    group[0] = {0, 0, rows};
    if (chosen) group_count = sort(chosen, rows, experts, target, group, pieces.at<int32_t>(counts));

    Activations from = {x, pieces.at<int8_t>(q), pieces.at<float>(scale), pieces.at<int32_t>(start), pieces.at<float>(lift)};
    if (quantized) {
      prepare(call, rows, K, [&](int64_t m) {
        const float* row = x + (target ? target[m] : m) * K;
        if (format_ == Format::W8A8)
          set_.quantize_row(row, K, range_, pieces.at<int8_t>(q) + m * padded, pieces.at<float>(scale) + m, pieces.at<int32_t>(start) + m);
        else
          set_.quantize_blocks(row, K, w.block, format_, m, pieces.at<int8_t>(q), pieces.at<float>(scale), pieces.at<int32_t>(start), pieces.at<float>(lift));
      });
    } else if (chosen) {
      prepare(call, rows, K, [&](int64_t m) { std::copy_n(x + target[m] * K, K, pieces.at<float>(copies) + m * K); });
      from.x = pieces.at<float>(copies);
    }
    run(call, w, from, y, target, group, group_count, rows);
  }

  template <class Function>
  void prepare(const Call& call, int64_t rows, int64_t K, const Function& f) const {
    const int64_t tasks = tasks_for(rows * K / 2, rows);
    call.parallel(tasks, [&](int64_t i) {
      for (int64_t m = rows * i / tasks; m < rows * (i + 1) / tasks; m++) f(m);
    });
  }

  // Rows by expert, in their order; one group for each expert that has rows.
  static int64_t sort(const int64_t* chosen, int64_t rows, int64_t experts, int32_t* order, Group* groups, int32_t* counts) {
    std::fill_n(counts, experts + 1, 0);
    for (int64_t r = 0; r < rows; r++) counts[chosen[r] + 1]++;
    int64_t used = 0;
    for (int64_t e = 0; e < experts; e++) {
      if (counts[e + 1]) groups[used++] = {e, counts[e], counts[e] + counts[e + 1]};
      counts[e + 1] += counts[e];
    }
    for (int64_t r = 0; r < rows; r++) order[counts[chosen[r]]++] = static_cast<int32_t>(r);
    return used;
  }

  void run(const Call& call, const Weights& w, const Activations& from, float* y, const int32_t* target, const Group* groups, int64_t group_count, int64_t rows) const {
    constexpr int64_t kGrain = 4;  // tiles that a kernel takes at once, at most
    const int64_t tiles = tiles_of(w.N), grains = (tiles + kGrain - 1) / kGrain;
    // About 12 bytes a nanosecond from memory, or 100 multiply-adds of 8 bits and 30 of floats.
    const int64_t work = tiles * weight_bytes(w) * group_count / 12 + rows * tiles * w.K * 16 / (is_quantized(format_) ? 100 : 30);
    const int64_t parts = std::max<int64_t>(1, tasks_for(work, grains * group_count) / group_count);
    call.parallel(parts * group_count, [&](int64_t i) {
      const Group& g = groups[i / parts];
      const int64_t part = i % parts;
      Product p = {matrix(w, g.expert), from, y, target, g.row0, g.row1, grains * part / parts * kGrain, std::min(tiles, grains * (part + 1) / parts * kGrain)};
      set_.product(p);
    });
  }

  Format format_;
  bool experts_;
  int64_t N_;
  float range_;
  const Set& set_;
};

class LookupKernel : public Kernel {
 public:
  LookupKernel(Format format, const Attributes& attributes)
      : format_(format), N_(attributes.integer("N")), K_(format == Format::BFloat16 ? attributes.integer("K") : -1), set_(*chosen_set()) {
    need(N_ > 0, "N = " + std::to_string(N_) + " must be positive");
    need(format != Format::BFloat16 || K_ > 0, "K = " + std::to_string(K_) + " must be positive");
  }

  void compute(const Call& call) const override {
    const Tensor ids = call.input(0, "ids");
    const Weights w = read_weights(call, 1, format_, K_, N_, nullptr);
    need(ids.shape.rank < kMaxRank, ids.text() + " has too many dimensions");
    Shape shape = ids.shape;
    shape.dims[shape.rank++] = w.K;
    const int64_t count = ids.shape.size();
    for (int64_t i = 0; i < count; i++) {
      const int64_t id = ids.as<int64_t>()[i];
      need(id >= 0 && id < N_, "id " + std::to_string(id) + " is outside the table of " + std::to_string(N_) + " rows");
    }
    float* y = static_cast<float*>(call.output(0, shape));
    const int64_t tasks = tasks_for(count * w.K, count);
    call.parallel(tasks, [&](int64_t i) {
      for (int64_t m = count * i / tasks; m < count * (i + 1) / tasks; m++) set_.lookup(w, ids.as<int64_t>()[m], y + m * w.K);
    });
  }

 private:
  Format format_;
  int64_t N_, K_;
  const Set& set_;
};

}  // namespace

void add_products(std::vector<Operator>& to) {
  for (int f = 0; f < kFormats; f++) {
    const FormatFacts& fact = facts(static_cast<Format>(f));
    const std::vector<int> weights = weight_types(static_cast<Format>(f));
    auto with = [&](std::vector<int> first) {
      first.insert(first.end(), weights.begin(), weights.end());
      return first;
    };
    to.push_back({kept(std::string("Product") + fact.name), with({Float32}), {Float32},
                  [](const Operator& self, const Attributes& a) -> std::unique_ptr<Kernel> { return std::make_unique<ProductKernel>(static_cast<Format>(self.kind), false, a); }, f});
    if (static_cast<Format>(f) == Format::W8A8) continue;
    to.push_back({kept(std::string("Experts") + fact.name), with({Float32, Int64}), {Float32},
                  [](const Operator& self, const Attributes& a) -> std::unique_ptr<Kernel> { return std::make_unique<ProductKernel>(static_cast<Format>(self.kind), true, a); }, f});
    to.push_back({kept(std::string("Lookup") + fact.name), with({Int64}), {Float32},
                  [](const Operator& self, const Attributes& a) -> std::unique_ptr<Kernel> { return std::make_unique<LookupKernel>(static_cast<Format>(self.kind), a); }, f});
  }
}

}  // namespace dspark::ort
