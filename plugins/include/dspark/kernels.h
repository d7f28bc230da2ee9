// The launch contract of the kernels: names, arguments, grids, blocks and workspaces.
//
// Kernels are `extern "C"`. A name ends in the type of the logits, weights and hidden rows: f32, f16 or bf16. Arguments
// are pointers to device memory, int32 and nothing else (but for one struct, below); tensors are contiguous, with the
// meaning that docs/plugins.md gives. `threads` is any multiple of 32 from 64 to kBlockThreads. Results depend on
// neither grid nor block. No kernel takes dynamic shared memory. A grid follows from sizes alone, so a launch can be
// captured in a CUDA graph.
//
// dspark_verify_tree_{T}(logits, tokens, ancestors, uniforms, temperature, top_k, top_p, min_p, rows, vocab,
//                        path, emitted, accepted, workspace)
//   grid (slices, rows, batch), block `threads`. Each block reads a slice of a row once; the last block of a row draws,
//   the last row of a sequence walks. `slices` is free, see slices_for.
// dspark_verify_chain_{T}(logits, tokens, draft_probs, drafted, accept_uniforms, draw_uniforms, temperature, top_k,
//                         top_p, min_p, rows, vocab, path, emitted, accepted, workspace)
//   The same grid.
// Workspace of both: verify_workspace_bytes(batch, rows), zeroed before the first launch; a launch leaves it zeroed.
//
// dspark_walk_tree_{T}(logits, tokens, ancestors, uniforms, temperature, top_k, top_p, min_p, rows, vocab,
//                      path, emitted, accepted)
// dspark_walk_chain_{T}(... as verify_chain, without workspace)
//   grid (batch), block `threads`. The same outputs by one block a sequence, which reads only rows it reaches: for
//   callers without a workspace, such as a kernel embedded in a TensorRT plan.
//
// dspark_draft_mix_{T}(kind, rank, hidden, embeddings, drafts, slot, hidden_rows, anchors, tokens, w1, mix, mix_bias,
//                      workspace)
//   grid (ceil(rank / (threads / 32)), batch); launched for kinds gated and rnn only.
// dspark_draft_step_{T}(kind, rank, vocab, embeddings, drafts, slot, batch, base_logits, anchors, tokens, w1, w2, probs,
//                       workspace)
//   grid (tiles, ceil(batch / kDraftSequences)); tiles is free up to kMaxTiles. `probs` float32 [batch, drafts, vocab]
//   receives corrected logits.
// dspark_draft_draw(drafts, slot, vocab, tiles, rank, temperature, uniforms, token_map, probs, tokens, workspace)
//   grid (batch), block `threads`; `tiles` of the step before it. token_map may be null.
// dspark_draft_finish_{T}(rank, hidden, vocab, embeddings, drafts, uses_token, hidden_rows, anchors, tokens, w1,
//                         confidence, confidence_bias, confidences, probs, workspace)
//   grid (tiles + 1, drafts, batch). Turns corrected logits into probabilities; computes confidences, unless null.
//   A block is: for every slot [mix], step, draw; then finish. Workspace: draft_workspace_bytes, contents free.
//
// dspark_compact_cache_{U}(CacheTensors by value, path, accepted, starts, rows, capacity)
// dspark_compact_cache_table_{U}(const CacheTensors* in device memory, path, accepted, starts, rows, capacity)
//   U is the size of a unit in bytes, 16 where all addresses and rows are multiples of it, else 1. Grid (tiles, batch,
//   tensors), block `threads`: tiles * threads cover heads * row_units of the largest tensor.
#pragma once

#include "dspark/compact.h"
#include "dspark/markov.h"
#include "dspark/sample.h"

namespace dspark {

constexpr int kMaxBatch = 256;
constexpr int kMaxVerifyRows = 128;
constexpr int kMaxTiles = 1024;  // of a draft step
constexpr int kDraftSequences = 8;  // of one block of a draft step: they share the reading of w2

DSPARK_HD constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// What the block of a row leaves for the one that ends the sequence. `drawn` is a token, or whether a draft stands.
struct RowVerdict {
  Weigher weigher;
  uint64_t total;
  int32_t drawn;
};

// best_key, verdict and ticket of each row, ticket of each sequence.
constexpr int64_t verify_workspace_bytes(int64_t batch, int64_t rows) {
  return aligned(batch * rows * 8) + aligned(batch * rows * static_cast<int64_t>(sizeof(RowVerdict))) +
         aligned(batch * rows * 4) + aligned(batch * 4);
}

// Blocks a row is shared by: enough for the whole device, none without work. `processors` is the number of
// multiprocessors.
constexpr int slices_for(int64_t rows_of_all, int64_t vocab, int processors, int threads) {
  const int64_t most = (vocab + static_cast<int64_t>(threads) * kGroup - 1) / (static_cast<int64_t>(threads) * kGroup);
  const int64_t wanted = (4 * static_cast<int64_t>(processors) + rows_of_all - 1) / rows_of_all;
  return static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

// What a slot was drawn from, kept for its probabilities.
struct DrawnFrom {
  Weigher weigher;
  float inverse_total;
};

// DrawnFrom of each slot; v; two states; best_key of each tile.
constexpr int64_t draft_workspace_bytes(int64_t batch, int64_t drafts, int64_t rank, int64_t tiles) {
  return aligned(batch * drafts * static_cast<int64_t>(sizeof(DrawnFrom))) + 3 * aligned(batch * rank * 4) +
         aligned(batch * tiles * 8);
}

}  // namespace dspark
