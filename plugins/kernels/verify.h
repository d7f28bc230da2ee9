// What the kernels of VerifyTree and VerifyChain have in common.
#pragma once

#include "dspark/chain.h"
#include "dspark/kernels.h"
#include "types.h"

namespace dspark {

struct Sampling {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;

  __device__ SamplingParams of(int64_t sequence) const {
    return {temperature[sequence], top_p[sequence], min_p[sequence], top_k[sequence]};
  }
};

struct Verdicts {
  int64_t* path;
  int64_t* emitted;
  int64_t* accepted;

  __device__ Verdict of(int64_t sequence, int rows) const {
    return {path + sequence * rows, emitted + sequence * rows, accepted + sequence};
  }
};

// What both kernels of a chain are given, of one sequence.
template <class T> struct Chain {
  const T* logits;
  const int64_t* tokens;
  const float* draft_probs;
  int64_t drafted;
  const float* accept_uniforms;
  const float* draw_uniforms;
  SamplingParams params;
  int rows, vocab;

  __device__ Chain(const T* all_logits, const int64_t* all_tokens, const float* all_probs, const int64_t* all_drafted,
                   const float* all_accepts, const float* all_draws, const Sampling& sampling, int rows_, int vocab_,
                   int64_t sequence)
      : logits(all_logits + sequence * rows_ * vocab_),
        tokens(all_tokens + sequence * rows_),
        draft_probs(all_probs + sequence * (rows_ - 1) * vocab_),
        drafted(all_drafted[sequence]),
        accept_uniforms(all_accepts + sequence * (rows_ - 1)),
        draw_uniforms(all_draws + sequence * rows_),
        params(sampling.of(sequence)),
        rows(rows_),
        vocab(vocab_) {}

  __device__ Row<T> row(int at) const { return {logits + static_cast<int64_t>(at) * vocab, vocab}; }

  __device__ bool is_draft(int at) const { return at < rows - 1 && at < drafted; }

  // The draft probabilities of a row, null where the drafts have ended.
  __device__ const float* probs(int at) const {
    return is_draft(at) ? draft_probs + static_cast<int64_t>(at) * vocab : nullptr;
  }

  __device__ bool draft_stands(int at, const Weigher& weigher, uint64_t total) const {
    return is_draft(at) && accepts(row(at), weigher, total, tokens[at + 1], probs(at), accept_uniforms[at]);
  }

  __device__ void conclude_at(const DeviceBlock& block, SampleShared& shared, int accepted, const Weigher& weigher,
                              uint64_t total, const Verdict& verdict) const {
    const float uniform = draw_uniforms[accepted];
    const int32_t last = correct(block, shared, row(accepted), weigher, total, probs(accepted), uniform);
    conclude(block, tokens, rows, accepted, last, verdict);
  }
};

}  // namespace dspark
