// Products, products with the matrices of chosen experts, and lookups: shapes, quantized activations, threads.
#include <algorithm>

#include "operator.h"

namespace dspark::ort {
namespace {

struct FormatFacts {
  const char* name;
  int weight;         // element type
  int scales;         // inputs of scales after the weight
  int64_t k_packed;   // k that a packed group holds
};

const FormatFacts& facts(Format format) {
  static constexpr FormatFacts all[] = {
      {"Float32", Float32, 0, 1}, {"Float16", Float16, 0, 1},     {"BFloat16", BFloat16, 0, 2}, {"Int8", Uint8, 1, 4},
      {"Int8Minimum", Uint8, 2, 4}, {"Int4", Uint8, 1, 8}, {"Int4Minimum", Uint8, 2, 8}, {"W8A8", Uint8, 1, 4},
  };
  return all[static_cast<int>(format)];
}

bool has_blocks(Format f) { return f == Format::Int8 || f == Format::Int8Minimum || f == Format::Int4 || f == Format::Int4Minimum; }
bool is_quantized(Format f) { return has_blocks(f) || f == Format::W8A8; }
int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

// A shape like [36, 2, 4, 16, 4], with the experts in front where there are any.
Shape weight_shape(Format format, int64_t experts, int64_t tiles, int64_t K, int64_t block) {
  Shape s;
  auto add = [&](int64_t d) { s.dims[s.rank++] = d; };
  if (experts >= 0) add(experts);
  add(tiles);
  switch (format) {
    case Format::Float32:
    case Format::Float16: add(K), add(16); break;
    case Format::BFloat16: add((K + 1) / 2), add(16), add(2); break;
    case Format::W8A8: add((K + 3) / 4), add(16), add(4); break;
    default: add(K / block), add(block / facts(format).k_packed), add(16), add(4);
  }
  return s;
}

// Reads and checks the weight inputs from input `first` on. K < 0: known from the weight alone.
Weights read_weights(const Call& call, size_t first, Format format, int64_t K, int64_t N, int64_t* experts) {
  const FormatFacts& fact = facts(format);
  const Tensor weight = call.input(first, "weight");
  const int lead = experts ? 1 : 0;
  const int rank = (has_blocks(format) ? 5 : format == Format::Float32 || format == Format::Float16 ? 3 : 4) + lead;
  need(weight.shape.rank == rank, weight.text() + " has " + std::to_string(weight.shape.rank) + " dimensions; " + std::to_string(rank) + " are needed");
  if (experts) *experts = weight.shape[0];
  const int64_t packed = weight.shape[lead + 1];
  Weights w = {format, K, N, 0, false, weight.as<uint8_t>(), nullptr, nullptr};
  if (has_blocks(format)) {
    w.block = weight.shape[lead + 2] * fact.k_packed;
    need(w.block >= 16 && w.block <= kMaxBlock && w.block % 16 == 0,
         weight.text() + " has blocks of " + std::to_string(w.block) + "; a multiple of 16 up to " + std::to_string(kMaxBlock) + " is needed");
    if (K < 0) w.K = packed * w.block;
    need(w.K % w.block == 0, "K = " + std::to_string(w.K) + " is not a multiple of the block " + std::to_string(w.block));
  } else if (K < 0) {
    w.K = packed * fact.k_packed;
  }
  const Shape wanted = weight_shape(format, experts ? *experts : -1, tiles_of(N), w.K, w.block);
  need(weight.shape == wanted, weight.text() + " does not fit K = " + std::to_string(w.K) + ", N = " + std::to_string(N) + "; needed is " + wanted.text());
  if (!fact.scales) return w;
  Shape per = {tiles_of(N), w.block ? w.K / w.block : 0, 16};
  if (format == Format::W8A8) per = {tiles_of(N), 16};
  if (experts) per = w.block ? Shape{*experts, per[0], per[1], 16} : Shape{*experts, per[0], 16};
  for (int i = 0; i < fact.scales; i++) {
    const Tensor t = call.input(first + 1 + static_cast<size_t>(i), i ? "minimum" : "scale");
    const bool half = t.type == Float16;
    need(t.type == Float32 || (half && format != Format::W8A8), t.text() + " must be float32" + (format == Format::W8A8 ? "" : " or float16"));
    need(t.shape == per, t.text() + " does not fit " + weight.text() + "; needed is " + per.text());
    need(i == 0 || half == w.half, "scale and minimum have different types");
    (i ? w.minimum : w.scale) = t.as<uint8_t>();
    w.half = half;
  }
  return w;
}

int64_t weight_bytes(const Weights& w) {  // of one tile
  switch (w.format) {
    case Format::Float32: return w.K * 64;
    case Format::Float16: return w.K * 32;
    case Format::BFloat16: return (w.K + 1) / 2 * 64;
    case Format::W8A8: return (w.K + 3) / 4 * 64;
    case Format::Int8:
    case Format::Int8Minimum: return w.K * 16;
    default: return w.K * 8;
  }
}
int64_t scale_bytes(const Weights& w) { return w.block ? w.K / w.block * (w.half ? 32 : 64) : 64; }

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

const char* kept(const std::string& name) {  // names live as long as the library
  static std::vector<std::unique_ptr<std::string>> all;
  all.push_back(std::make_unique<std::string>(name));
  return all.back()->c_str();
}

}  // namespace

void add_products(std::vector<Operator>& to) {
  for (int f = 0; f <= static_cast<int>(Format::W8A8); f++) {
    const FormatFacts& fact = facts(static_cast<Format>(f));
    std::vector<int> weights = {fact.weight};
    for (int i = 0; i < fact.scales; i++) weights.push_back(static_cast<Format>(f) == Format::W8A8 ? Float32 : Any);
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
