// Kernels of VerifyTree and VerifyChain by one block a sequence, without a workspace; see dspark/kernels.h.
//
// Arguments are inputs, numbers, outputs: the order in which TensorRT launches a kernel embedded in a plan.
#include "verify.h"

namespace dspark {

// One block walks a sequence and draws only where it comes by.
template <class T>
__device__ void walk_tree(const T* logits, const int64_t* tokens, const uint8_t* ancestors, const float* uniforms,
                          const Sampling& sampling, int rows, int vocab, const Verdicts& verdicts) {
  __shared__ SampleShared shared;
  __shared__ WalkShared walking;
  const DeviceBlock block;
  const int64_t sequence = blockIdx.x;
  const SamplingParams params = sampling.of(sequence);
  const Tree tree{tokens + sequence * rows, ancestors + sequence * rows * rows, rows};
  const auto draw_at = [&](int at) {
    const Row<T> row{logits + (sequence * rows + at) * vocab, vocab};
    uint64_t total;
    return draw(block, shared, row, weigh(block, shared, row, params), uniforms[sequence * rows + at], &total);
  };
  walk(block, walking, tree, draw_at, verdicts.of(sequence, rows));
}

template <class T> __device__ void walk_chain(const Chain<T>& chain, const Verdict& verdict) {
  __shared__ SampleShared shared;
  const DeviceBlock block;
  DSPARK_ROLLED
  for (int at = 0;; ++at) {
    const Row<T> row = chain.row(at);
    const Weigher weigher = weigh(block, shared, row, chain.params);
    const uint64_t total = total_mass(block, shared, row, weigher);
    if (chain.draft_stands(at, weigher, total)) continue;
    chain.conclude_at(block, shared, at, weigher, total, verdict);
    return;
  }
}

}  // namespace dspark

#define DSPARK_WALK_KERNELS(suffix, T)                                                                                 \
  DSPARK_KERNEL(2) dspark_walk_tree_##suffix(                                                                          \
      const T* logits, const int64_t* tokens, const uint8_t* ancestors, const float* uniforms,                         \
      const float* temperature, const int64_t* top_k, const float* top_p, const float* min_p, int32_t rows,            \
      int32_t vocab, int64_t* path, int64_t* emitted, int64_t* accepted) {                                             \
    dspark::walk_tree<T>(logits, tokens, ancestors, uniforms, {temperature, top_k, top_p, min_p}, rows, vocab,         \
                         {path, emitted, accepted});                                                                   \
  }                                                                                                                    \
  DSPARK_KERNEL(1) dspark_walk_chain_##suffix(                                                                         \
      const T* logits, const int64_t* tokens, const float* draft_probs, const int64_t* drafted,                        \
      const float* accept_uniforms, const float* draw_uniforms, const float* temperature, const int64_t* top_k,        \
      const float* top_p, const float* min_p, int32_t rows, int32_t vocab, int64_t* path, int64_t* emitted,            \
      int64_t* accepted) {                                                                                             \
    const dspark::Chain<T> chain(logits, tokens, draft_probs, drafted, accept_uniforms, draw_uniforms,                 \
                                 {temperature, top_k, top_p, min_p}, rows, vocab, blockIdx.x);                         \
    dspark::walk_chain<T>(chain, dspark::Verdicts{path, emitted, accepted}.of(blockIdx.x, rows));                      \
  }

DSPARK_WALK_KERNELS(f32, float)
DSPARK_WALK_KERNELS(f16, dspark::Half)
DSPARK_WALK_KERNELS(bf16, dspark::BFloat16)
