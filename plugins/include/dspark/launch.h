// Launches of the kernels from C++, with grids and workspaces chosen as dspark/kernels.h describes.
//
// All pointers inside arguments are to device memory. Nothing here allocates, waits or copies, so every
// call can be captured in a CUDA graph. cudaErrorInvalidValue: a size outside its limits.
#pragma once

#ifndef DSPARK_EMULATED
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

#include "dspark/compact.h"
#include "dspark/number.h"

namespace dspark {

struct SamplingTensors {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
};

struct VerdictTensors {
  int64_t* path;
  int64_t* emitted;
  int64_t* accepted;
};

struct VerifySizes {
  int batch;
  int rows;
  int vocab;
};

// How to launch: `processors` multiprocessors, blocks of `threads`, 0 for the default.
struct LaunchOptions {
  int processors;
  int threads;
};

struct TreeTensors {
  const void* logits;
  const int64_t* tokens;
  const uint8_t* ancestors;
  const float* uniforms;
};

struct ChainTensors {
  const void* logits;
  const int64_t* tokens;
  const float* draft_probs;
  const int64_t* drafted;
  const float* accept_uniforms;
  const float* draw_uniforms;
};

// Bytes of workspace; the verify kernels find it zeroed and leave it zeroed.
int64_t verify_workspace(const VerifySizes& sizes);

// With a null workspace, one block walks each sequence: slower, but needs none.
cudaError_t launch_verify_tree(DType dtype, const TreeTensors& inputs, const SamplingTensors& sampling,
                               const VerifySizes& sizes, const VerdictTensors& outputs, void* workspace,
                               const LaunchOptions& options, cudaStream_t stream);
cudaError_t launch_verify_chain(DType dtype, const ChainTensors& inputs, const SamplingTensors& sampling,
                                const VerifySizes& sizes, const VerdictTensors& outputs, void* workspace,
                                const LaunchOptions& options, cudaStream_t stream);

struct DraftSizes {
  int batch;
  int drafts;
  int32_t kind;  // MarkovKind
  int rank;
  int hidden;
  int vocab;
  int embeddings;
  bool confidence_uses_token;
};

// Members that a kind does not have are null.
struct DraftTensors {
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
};

int64_t draft_workspace(const DraftSizes& sizes);
cudaError_t launch_draft_block(DType dtype, const DraftTensors& tensors, const DraftSizes& sizes, void* workspace,
                               const LaunchOptions& options, cudaStream_t stream);

// Addresses and row sizes in bytes are multiples of 16 for `wide`, and row_units counts units of 16 bytes then, else
// bytes.
cudaError_t launch_compact_cache(const CacheTensors& tensors, bool wide, const int64_t* path, const int64_t* accepted,
                                 const int64_t* starts, int batch, int rows, int capacity, cudaStream_t stream);

}  // namespace dspark
