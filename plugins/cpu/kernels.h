// What the operators ask of an instruction set: plain structs, and a table of functions over them.
//
// A function here works on ready memory in one thread. It allocates nothing, checks nothing and calls nothing outside its
// file, so that code compiled for one processor never runs on another.
#pragma once

#include <cstdint>

namespace dspark {

constexpr int kTile = 16;         // columns of a packed weight that lie together
constexpr int kRows = 8;          // rows a product holds in registers at most
constexpr int kChunk = 256;       // places of a sequence that are summed before they are merged
constexpr int kGroups = kChunk / 16;
constexpr int kRowBlock = 48;     // rows (token x head) that share one reading of a chunk's keys
constexpr int kColumns = 1024;    // logits of a slot whose statistics are taken together
constexpr int kMaxWidth = 512;    // of an attention head
constexpr int kMaxBlock = 256;    // of a quantized weight

enum class Format : int { Float32, Float16, BFloat16, Int8, Int8Minimum, Int4, Int4Minimum, W8A8 };

// Packed weights of one matrix; layouts are in docs/sequence-kernels.md.
struct Weights {
  Format format;
  int64_t K, N;
  int64_t block;          // of the formats with blocks
  bool half;              // scale and minimum are float16
  const uint8_t* data;
  const uint8_t* scale;
  const uint8_t* minimum;
};

// Activations of a product. Floats row after row, or what quantize_row makes of them; with blocks, what quantize_blocks
// makes: eight rows are interleaved block by block, so that a kernel finds all of them from one pointer.
struct Activations {
  const float* x;         // [rows, K]
  const int8_t* q;        // [rows, padded K], or [rows / 8, blocks, 8, block]
  const float* scale;     // [rows], or [rows / 8, blocks, 8], as the following
  const int32_t* start;   // first value of the integer sum, takes the weight's offset back
  const float* lift;      // scale * sum of q, what a minimum is multiplied by
};

// Where row m's block b is among interleaved ones, and how many there are room for.
inline int64_t interleaved(int64_t m, int64_t b, int64_t blocks) { return (m / kRows * blocks + b) * kRows + m % kRows; }
inline int64_t interleaved_size(int64_t rows, int64_t blocks) { return (rows + kRows - 1) / kRows * kRows * blocks; }

// Rows [row0, row1) times tiles [tile0, tile1). Row m goes to y + target[m] * N, or y + m * N without target.
struct Product {
  Weights weights;
  Activations from;
  float* y;
  const int32_t* target;
  int64_t row0, row1, tile0, tile1;
};

struct Visible {          // a key that does not lie in the slot of its place
  int32_t slot, place;
};

// Some rows of one sequence against some chunks of its keys, for one head of keys and values.
struct Attend {
  const float* query;     // [rows, key_width], turned and scaled; row = token * group + head of the group
  const float* key;       // [capacity, key_width]
  const float* value;     // [capacity, value_width]
  int64_t key_width, value_width, group;
  float softcap;
  int64_t direct;         // slots below are the places of the same number
  int64_t start, tokens;  // new rows lie in slots [start, start + tokens)
  const uint16_t* bits;   // [tokens, chunks, 16]: which direct places a token sees
  int64_t bits_chunks;
  const Visible* others;  // of all tokens; those of token t are [first[t], first[t + 1]), by ascending place
  const int32_t* first;
  int64_t row0, row1, chunk0, chunk1;
  // Chunk c and row r leave their results at (c - chunk0) * result_rows + (r - row0); a sum of 0 says that the row sees
  // nothing there. With `merge` the chunks are merged at once, into the first row1 - row0 places.
  bool merge;
  int64_t result_rows;
  float *maximum, *sum, *values;
  float* scratch;         // attend_scratch() floats, aligned to 64 bytes
};

struct Turn {             // rotary embedding of one head
  const float *x, *cos, *sin;
  float* y;
  int64_t width, turned;  // turned: columns that rotate, 2 * the width of cos
  bool interleaved;
  float scale;            // 1 for keys
};

enum class Activation : int { Silu, Gelu, GeluTanh, Sigmoid, Tanh, Softcap };

struct Set {
  const char* name;
  // row m of the interleaved q, scale, start and lift
  void (*quantize_blocks)(const float* x, int64_t K, int64_t block, Format format, int64_t m, int8_t* q, float* scale, int32_t* start, float* lift);
  // one scale for the row; q is padded with zeros to a multiple of 4
  void (*quantize_row)(const float* x, int64_t K, float range, int8_t* q, float* scale, int32_t* start);
  void (*product)(const Product&);
  void (*lookup)(const Weights&, int64_t column, float* y);
  void (*turn)(const Turn&);
  void (*attend)(const Attend&);
  // state (maximum, sum, values[width]) absorbs one more chunk
  void (*merge)(float* maximum, float* sum, float* values, float other_maximum, float other_sum, const float* other_values, int64_t width);
  void (*finish)(float sum, const float* values, int64_t width, float* y);
  // 256 mask bytes or fewer to 16 words of bits, the rest 0
  void (*mask_bits)(const uint8_t* mask, int64_t count, uint16_t* bits);
  void (*rms_norm)(const float* x, const float* skip, const float* weight, int64_t n, float epsilon, float* y, float* sum);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float epsilon, float* y);
  void (*gate)(Activation, const float* gate, const float* up, int64_t n, float* y);
  void (*unary)(Activation, const float* x, int64_t n, float cap, float* y);
  // kernels/draft.h says what these do
  void (*likely)(float* x, const float* base, const float* added, int64_t n, float* maximum, float* sum);
  float (*spread)(const float* x, int64_t n, float heat, float maximum, float* y);
  int64_t (*top)(const float* x, int64_t n, int64_t first, int64_t k, int64_t have, float* values, int32_t* columns);
};

// Floats of scratch memory that attend needs.
inline int64_t attend_scratch(int64_t key_width, int64_t value_width, int64_t tokens) {
  return key_width * 16 + kRowBlock * (kChunk + (tokens + 15) / 16 * 16 + value_width) + 64;
}

extern const Set kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Set kAvx2, kAvxVnni, kAvx512;
#elif defined(__aarch64__)
extern const Set kNeon;
#endif

// The set in use, chosen on the first call; null where DSPARK_CPU names one that does not run here.
const Set* chosen_set();
const char* chosen_set_error();   // then says why
const char* sets_that_run();      // their names, best first, separated by blanks

}  // namespace dspark
