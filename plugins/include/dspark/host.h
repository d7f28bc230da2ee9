// C interface of the host build. Tensors are contiguous, in the order and with the meaning that docs/plugins.md gives.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DSPARK_INTERFACE_VERSION 1

// Element types of logits, weights and hidden rows: 0 float32, 1 float16, 2 bfloat16.
// `threads` is the size of the imitated block, a multiple of 32 from 32 to 1024; results do not depend on it.

enum dspark_error {
  DSPARK_BAD_BATCH = 1,
  DSPARK_BAD_ROWS = 2,
  DSPARK_BAD_VOCAB = 3,
  DSPARK_BAD_THREADS = 4,
  DSPARK_BAD_DTYPE = 5,
  DSPARK_BAD_KIND = 6,
  DSPARK_BAD_RANK = 7
};

// One value per sequence.
typedef struct dspark_sampling {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
} dspark_sampling;

// A block to draft; members as in MarkovHead and docs/plugins.md. `probs`, `confidence` and `token_map` may be null.
typedef struct dspark_draft {
  int64_t batch;
  int64_t drafts;
  int32_t kind;
  int32_t rank;
  int32_t hidden;
  int32_t vocab;
  int32_t embeddings;
  int32_t confidence_uses_token;
  const void* base_logits;
  const void* hidden_rows;
  const int64_t* anchors;
  const float* temperature;
  const float* uniforms;
  const void* w1;
  const void* w2;
  const void* mix;
  const void* mix_bias;
  const void* confidence;
  const void* confidence_bias;
  const int64_t* token_map;
  int64_t* tokens;
  float* probs;
  float* confidences;
} dspark_draft;

// Cache tensors [batch, heads, capacity, row].
typedef struct dspark_cache {
  int64_t tensors;
  int64_t batch;
  int64_t capacity;
  void* const* data;
  const int64_t* heads;
  const int64_t* row_bytes;
} dspark_cache;

int32_t dspark_interface_version(void);
// function: 0 exp of numbers <= 0, 1 sigmoid, 2 tanh.
void dspark_math(int32_t function, const float* x, float* y, int64_t count);
int32_t dspark_to_float(int32_t dtype, const void* x, float* y, int64_t count);
// Weights and kept masses of one row.
int32_t dspark_masses(int32_t dtype, const void* logits, int64_t vocab, const dspark_sampling* sampling,
                      int32_t threads, float* weights, uint64_t* masses);
// One token for each of `count` rows, each with its own parameters.
int32_t dspark_draw(int32_t dtype, const void* logits, int64_t count, int64_t vocab, const dspark_sampling* sampling,
                    const float* uniforms, int32_t threads, int64_t* tokens);
int32_t dspark_verify_tree(int32_t dtype, const void* logits, const int64_t* tokens, const uint8_t* ancestors,
                           const float* uniforms, const dspark_sampling* sampling, int64_t batch, int64_t rows,
                           int64_t vocab, int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted);
int32_t dspark_verify_chain(int32_t dtype, const void* logits, const int64_t* tokens, const float* draft_probs,
                            const int64_t* drafted, const float* accept_uniforms, const float* draw_uniforms,
                            const dspark_sampling* sampling, int64_t batch, int64_t rows, int64_t vocab,
                            int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted);
int32_t dspark_draft_block(int32_t dtype, const dspark_draft* draft, int32_t threads);
int32_t dspark_compact_cache(const dspark_cache* cache, const int64_t* path, const int64_t* accepted,
                             const int64_t* starts, int64_t rows);

#ifdef __cplusplus
}
#endif
