#include "weights.h"

namespace dspark::ort {

const FormatFacts& facts(Format format) {
  static constexpr FormatFacts all[] = {
      {"Float32", Float32, 0, 1}, {"Float16", Float16, 0, 1},     {"BFloat16", BFloat16, 0, 2}, {"Int8", Uint8, 1, 4},
      {"Int8Minimum", Uint8, 2, 4}, {"Int4", Uint8, 1, 8}, {"Int4Minimum", Uint8, 2, 8}, {"W8A8", Uint8, 1, 4},
  };
  return all[static_cast<int>(format)];
}

std::vector<int> weight_types(Format format) {
  std::vector<int> types = {facts(format).weight};
  for (int i = 0; i < facts(format).scales; i++) types.push_back(format == Format::W8A8 ? Float32 : Any);
  return types;
}

namespace {

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

}  // namespace

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

const char* kept(const std::string& name) {
  static std::vector<std::unique_ptr<std::string>> all;
  all.push_back(std::make_unique<std::string>(name));
  return all.back()->c_str();
}

}  // namespace dspark::ort
