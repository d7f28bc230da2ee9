#include "dspark/launch.h"

#include "all.cu"

#ifndef DSPARK_LAUNCH
#define DSPARK_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace dspark {

namespace {

constexpr int kCompactThreads = 128;
constexpr int kDraftThreads = 256;  // of all draft kernels but the drawing one: more blocks fit a multiprocessor

// The kernels of a type, by one name.
template <class T> struct Kernels;

#define DSPARK_KERNELS_OF(suffix, T)                                         \
  template <> struct Kernels<T> {                                            \
    static constexpr auto verify_tree = dspark_verify_tree_##suffix;         \
    static constexpr auto walk_tree = dspark_walk_tree_##suffix;             \
    static constexpr auto verify_chain = dspark_verify_chain_##suffix;       \
    static constexpr auto walk_chain = dspark_walk_chain_##suffix;           \
    static constexpr auto draft_mix = dspark_draft_mix_##suffix;             \
    static constexpr auto draft_step = dspark_draft_step_##suffix;           \
    static constexpr auto draft_finish = dspark_draft_finish_##suffix;       \
  };

DSPARK_KERNELS_OF(f32, float)
DSPARK_KERNELS_OF(f16, Half)
DSPARK_KERNELS_OF(bf16, BFloat16)

template <class F> cudaError_t with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
  }
  return cudaErrorInvalidValue;
}

int threads_of(const LaunchOptions& options, int preferred = kBlockThreads) {
  return options.threads > 0 ? options.threads : preferred;
}

bool within(const LaunchOptions& options) {
  const int threads = threads_of(options);
  return threads >= 64 && threads <= kBlockThreads && threads % 32 == 0 && options.processors > 0;
}

bool within(const VerifySizes& sizes, const LaunchOptions& options) {
  return within(options) && sizes.batch >= 1 && sizes.batch <= kMaxBatch && sizes.rows >= 1 &&
         sizes.rows <= kMaxVerifyRows && sizes.vocab >= 1 && sizes.vocab <= kMaxVocab;
}

bool within(const DraftSizes& sizes, const LaunchOptions& options) {
  return within(options) && sizes.batch >= 1 && sizes.batch <= kMaxBatch && sizes.drafts >= 1 &&
         sizes.drafts <= kMaxVerifyRows && sizes.kind >= 0 && sizes.kind <= static_cast<int32_t>(MarkovKind::kRnn) &&
         sizes.rank >= 0 && sizes.rank <= kMaxRank && sizes.vocab >= 1 && sizes.vocab <= kMaxVocab;
}

int draft_tiles(const DraftSizes& sizes, const LaunchOptions& options) {
  const int tokens = threads_of(options, kDraftThreads) / 32 * kTokens;  // of a tile, at a time
  return smaller(smaller(3 * options.processors, kMaxTiles), (sizes.vocab + tokens - 1) / tokens);
}

dim3 verify_grid(const VerifySizes& sizes, const LaunchOptions& options) {
  const int64_t rows = static_cast<int64_t>(sizes.batch) * sizes.rows;
  const int slices = slices_for(rows, sizes.vocab, options.processors, threads_of(options));
  return dim3(static_cast<unsigned>(slices), static_cast<unsigned>(sizes.rows), static_cast<unsigned>(sizes.batch));
}

}  // namespace

int64_t verify_workspace(const VerifySizes& sizes) { return verify_workspace_bytes(sizes.batch, sizes.rows); }

cudaError_t launch_verify_tree(DType dtype, const TreeTensors& inputs, const SamplingTensors& sampling,
                               const VerifySizes& sizes, const VerdictTensors& outputs, void* workspace,
                               const LaunchOptions& options, cudaStream_t stream) {
  if (!within(sizes, options)) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* const logits = static_cast<const T*>(inputs.logits);
    const dim3 block(static_cast<unsigned>(threads_of(options)));
    if (workspace) {
      DSPARK_LAUNCH(Kernels<T>::verify_tree, verify_grid(sizes, options), block, stream, logits, inputs.tokens,
                    inputs.ancestors, inputs.uniforms, sampling.temperature, sampling.top_k, sampling.top_p,
                    sampling.min_p, sizes.rows, sizes.vocab, outputs.path, outputs.emitted, outputs.accepted,
                    workspace);
    } else {
      DSPARK_LAUNCH(Kernels<T>::walk_tree, dim3(static_cast<unsigned>(sizes.batch)), block, stream, logits,
                    inputs.tokens, inputs.ancestors, inputs.uniforms, sampling.temperature, sampling.top_k,
                    sampling.top_p, sampling.min_p, sizes.rows, sizes.vocab, outputs.path, outputs.emitted,
                    outputs.accepted);
    }
    return cudaGetLastError();
  });
}

cudaError_t launch_verify_chain(DType dtype, const ChainTensors& inputs, const SamplingTensors& sampling,
                                const VerifySizes& sizes, const VerdictTensors& outputs, void* workspace,
                                const LaunchOptions& options, cudaStream_t stream) {
  if (!within(sizes, options)) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* const logits = static_cast<const T*>(inputs.logits);
    const dim3 block(static_cast<unsigned>(threads_of(options)));
    if (workspace) {
      DSPARK_LAUNCH(Kernels<T>::verify_chain, verify_grid(sizes, options), block, stream, logits, inputs.tokens,
                    inputs.draft_probs, inputs.drafted, inputs.accept_uniforms, inputs.draw_uniforms,
                    sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sizes.rows, sizes.vocab,
                    outputs.path, outputs.emitted, outputs.accepted, workspace);
    } else {
      DSPARK_LAUNCH(Kernels<T>::walk_chain, dim3(static_cast<unsigned>(sizes.batch)), block, stream, logits,
                    inputs.tokens, inputs.draft_probs, inputs.drafted, inputs.accept_uniforms, inputs.draw_uniforms,
                    sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sizes.rows, sizes.vocab,
                    outputs.path, outputs.emitted, outputs.accepted);
    }
    return cudaGetLastError();
  });
}

int64_t draft_workspace(const DraftSizes& sizes) {
  return draft_workspace_bytes(sizes.batch, sizes.drafts, sizes.rank, kMaxTiles);
}

cudaError_t launch_draft_block(DType dtype, const DraftTensors& tensors, const DraftSizes& sizes, void* workspace,
                               const LaunchOptions& options, cudaStream_t stream) {
  if (!within(sizes, options)) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto as = [](const void* data) { return static_cast<const T*>(data); };
    const int threads = threads_of(options, kDraftThreads), tiles = draft_tiles(sizes, options);
    const int per_block = threads / 32;
    const dim3 block(static_cast<unsigned>(threads)), draw_block(static_cast<unsigned>(threads_of(options)));
    const dim3 mix_grid(static_cast<unsigned>((sizes.rank + per_block - 1) / per_block),
                        static_cast<unsigned>(sizes.batch));
    const dim3 step_grid(static_cast<unsigned>(tiles),
                         static_cast<unsigned>((sizes.batch + kDraftSequences - 1) / kDraftSequences));
    const bool mixes = sizes.kind > static_cast<int32_t>(MarkovKind::kVanilla);
    for (int slot = 0; slot < sizes.drafts; ++slot) {
      if (mixes)
        DSPARK_LAUNCH(Kernels<T>::draft_mix, mix_grid, block, stream, sizes.kind, sizes.rank, sizes.hidden,
                      sizes.embeddings, sizes.drafts, slot, as(tensors.hidden_rows), tensors.anchors, tensors.tokens,
                      as(tensors.w1), as(tensors.mix), as(tensors.mix_bias), workspace);
      DSPARK_LAUNCH(Kernels<T>::draft_step, step_grid, block, stream, sizes.kind, sizes.rank, sizes.vocab,
                    sizes.embeddings, sizes.drafts, slot, sizes.batch, as(tensors.base_logits), tensors.anchors,
                    tensors.tokens, as(tensors.w1), as(tensors.w2), tensors.probs, workspace);
      DSPARK_LAUNCH(dspark_draft_draw, dim3(static_cast<unsigned>(sizes.batch)), draw_block, stream, sizes.drafts, slot,
                    sizes.vocab, tiles, sizes.rank, tensors.temperature, tensors.uniforms, tensors.token_map,
                    tensors.probs, tensors.tokens, workspace);
    }
    const int finishers = smaller((sizes.vocab + threads - 1) / threads, 16);
    const dim3 finish_grid(static_cast<unsigned>(finishers + 1), static_cast<unsigned>(sizes.drafts),
                           static_cast<unsigned>(sizes.batch));
    DSPARK_LAUNCH(Kernels<T>::draft_finish, finish_grid, block, stream, sizes.rank, sizes.hidden, sizes.vocab,
                  sizes.embeddings, sizes.drafts, static_cast<int32_t>(sizes.confidence_uses_token),
                  as(tensors.hidden_rows), tensors.anchors, tensors.tokens, as(tensors.w1), as(tensors.confidence),
                  as(tensors.confidence_bias), tensors.confidence ? tensors.confidences : nullptr, tensors.probs,
                  workspace);
    return cudaGetLastError();
  });
}

cudaError_t launch_compact_cache(const CacheTensors& tensors, bool wide, const int64_t* path, const int64_t* accepted,
                                 const int64_t* starts, int batch, int rows, int capacity, cudaStream_t stream) {
  if (tensors.count < 0 || tensors.count > kMaxCacheTensors || batch < 1 || batch > kMaxBatch || rows < 1 ||
      rows > kMaxVerifyRows || capacity < 1)
    return cudaErrorInvalidValue;
  int64_t columns = 0;
  for (int i = 0; i < tensors.count; ++i)
    columns = larger(columns, static_cast<int64_t>(tensors.items[i].heads) * tensors.items[i].row_units);
  if (columns == 0 || rows == 1) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((columns + kCompactThreads - 1) / kCompactThreads),
                  static_cast<unsigned>(batch), static_cast<unsigned>(tensors.count));
  if (wide) {
    DSPARK_LAUNCH(dspark_compact_cache_16, grid, dim3(kCompactThreads), stream, tensors, path, accepted, starts, rows,
                  capacity);
  } else {
    DSPARK_LAUNCH(dspark_compact_cache_1, grid, dim3(kCompactThreads), stream, tensors, path, accepted, starts,
                  rows, capacity);
  }
  return cudaGetLastError();
}

}  // namespace dspark
