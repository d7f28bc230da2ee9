// Packed weights as inputs of an operator: formats, shapes, and how many bytes a tile has.
#pragma once

#include "operator.h"

namespace dspark::ort {

struct FormatFacts {
  const char* name;
  int weight;         // element type
  int scales;         // inputs of scales after the weight
  int64_t k_packed;   // k that a packed group holds
};

constexpr int kFormats = static_cast<int>(Format::W8A8) + 1;

const FormatFacts& facts(Format format);
std::vector<int> weight_types(Format format);  // of the inputs that hold a matrix

inline bool has_blocks(Format f) { return f == Format::Int8 || f == Format::Int8Minimum || f == Format::Int4 || f == Format::Int4Minimum; }
inline bool is_quantized(Format f) { return has_blocks(f) || f == Format::W8A8; }
inline int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

// Reads and checks the weight inputs from input `first` on. K < 0: known from the weight alone.
Weights read_weights(const Call& call, size_t first, Format format, int64_t K, int64_t N, int64_t* experts);

int64_t weight_bytes(const Weights& w);  // of one tile
int64_t scale_bytes(const Weights& w);

const char* kept(const std::string& name);  // names live as long as the library

}  // namespace dspark::ort
