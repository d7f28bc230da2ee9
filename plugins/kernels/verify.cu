// Kernels of VerifyTree and VerifyChain; their launch contract is in dspark/kernels.h.
#include "verify.h"

namespace dspark {

struct VerifyWorkspace {
  uint64_t* best;         // [batch, rows] best_key so far
  RowVerdict* verdicts;   // [batch, rows]
  uint32_t* row_tickets;  // [batch, rows] slices that are done
  uint32_t* tickets;      // [batch] rows that are done

  __device__ VerifyWorkspace(void* memory, int64_t batch, int64_t rows) {
    char* at = static_cast<char*>(memory);
    best = reinterpret_cast<uint64_t*>(at);
    at += aligned(batch * rows * 8);
    verdicts = reinterpret_cast<RowVerdict*>(at);
    at += aligned(batch * rows * static_cast<int64_t>(sizeof(RowVerdict)));
    row_tickets = reinterpret_cast<uint32_t*>(at);
    at += aligned(batch * rows * 4);
    tickets = reinterpret_cast<uint32_t*>(at);
  }
};

// Whether this block is the last of `count` to arrive. What the others wrote before is then visible to all its threads.
__device__ inline bool arrives_last(uint32_t* ticket, uint32_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) + 1 == count;
  }
  __syncthreads();
  const bool result = last;
  if (result) __threadfence();
  __syncthreads();
  return result;
}

// Reads this block's slice of its row. True for the last block of the row, which finds the row's best_key in *best.
template <class T>
__device__ bool read_slice(const DeviceBlock& block, SampleShared& shared, const Row<T>& row,
                           const VerifyWorkspace& workspace, int64_t index, uint64_t* best) {
  const int groups = row.groups(), slices = static_cast<int>(gridDim.x), slice = static_cast<int>(blockIdx.x);
  const int each_has = (groups + slices - 1) / slices;
  const int first = smaller(slice * each_has, groups), last = smaller(first + each_has, groups);
  const uint64_t key = best_key(block, shared, row, first, last);
  if (slices == 1) {
    *best = key;
    return true;
  }
  if (threadIdx.x == 0)
    atomicMax(reinterpret_cast<unsigned long long*>(&workspace.best[index]), static_cast<unsigned long long>(key));
  if (!arrives_last(&workspace.row_tickets[index], static_cast<uint32_t>(slices))) return false;
  *best = workspace.best[index];
  return true;
}

// Leaves the workspace of a sequence as it was before the launch.
__device__ inline void clear(const VerifyWorkspace& workspace, int64_t sequence, int rows) {
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
    workspace.best[sequence * rows + row] = 0;
    workspace.row_tickets[sequence * rows + row] = 0;
    workspace.verdicts[sequence * rows + row] = RowVerdict{};
  }
  if (threadIdx.x == 0) workspace.tickets[sequence] = 0;
}

union VerifyShared {
  SampleShared sample;
  WalkShared walk;
  __device__ VerifyShared() {}
};

template <class T>
__device__ void verify_tree(const T* logits, const int64_t* tokens, const uint8_t* ancestors, const float* uniforms,
                            const Sampling& sampling, int rows, int vocab, const Verdicts& verdicts, void* memory) {
  __shared__ VerifyShared shared;
  const DeviceBlock block;
  const int64_t sequence = blockIdx.z, index = sequence * rows + blockIdx.y;
  const VerifyWorkspace workspace(memory, gridDim.z, rows);
  const Row<T> row{logits + index * vocab, vocab};
  uint64_t best, total;
  if (!read_slice(block, shared.sample, row, workspace, index, &best)) return;
  const Weigher weigher = weigh(block, shared.sample, row, sampling.of(sequence), best);
  const int32_t token = draw(block, shared.sample, row, weigher, uniforms[index], &total);
  if (threadIdx.x == 0) workspace.verdicts[index].drawn = token;
  if (!arrives_last(&workspace.tickets[sequence], static_cast<uint32_t>(rows))) return;
  const Tree tree{tokens + sequence * rows, ancestors + sequence * rows * rows, rows};
  const RowVerdict* const of_rows = workspace.verdicts + sequence * rows;
  walk(block, shared.walk, tree, [&](int at) { return of_rows[at].drawn; }, verdicts.of(sequence, rows));
  clear(workspace, sequence, rows);
}

template <class T>
__device__ void verify_chain(const Chain<T>& chain, int64_t sequence, const Verdicts& verdicts, void* memory) {
  __shared__ SampleShared shared;
  const DeviceBlock block;
  const int rows = chain.rows, at = static_cast<int>(blockIdx.y);
  const int64_t index = sequence * rows + at;
  const VerifyWorkspace workspace(memory, gridDim.z, rows);
  const Row<T> row = chain.row(at);
  uint64_t best;
  if (!read_slice(block, shared, row, workspace, index, &best)) return;
  const Weigher weigher = weigh(block, shared, row, chain.params, best);
  const uint64_t total = total_mass(block, shared, row, weigher);
  if (threadIdx.x == 0)
    workspace.verdicts[index] = {weigher, total, chain.draft_stands(at, weigher, total) ? 1 : 0};
  if (!arrives_last(&workspace.tickets[sequence], static_cast<uint32_t>(rows))) return;
  const RowVerdict* const of_rows = workspace.verdicts + sequence * rows;
  int accepted = 0;
  while (accepted < rows - 1 && of_rows[accepted].drawn) ++accepted;
  const RowVerdict here = of_rows[accepted];
  chain.conclude_at(block, shared, accepted, here.weigher, here.total, verdicts.of(sequence, rows));
  clear(workspace, sequence, rows);
}

}  // namespace dspark

#define DSPARK_VERIFY_KERNELS(suffix, T)                                                                               \
  DSPARK_KERNEL(2) dspark_verify_tree_##suffix(                                                                        \
      const T* logits, const int64_t* tokens, const uint8_t* ancestors, const float* uniforms,                         \
      const float* temperature, const int64_t* top_k, const float* top_p, const float* min_p, int32_t rows,            \
      int32_t vocab, int64_t* path, int64_t* emitted, int64_t* accepted, void* workspace) {                            \
    dspark::verify_tree<T>(logits, tokens, ancestors, uniforms, {temperature, top_k, top_p, min_p}, rows, vocab,       \
                           {path, emitted, accepted}, workspace);                                                      \
  }                                                                                                                    \
  DSPARK_KERNEL(1) dspark_verify_chain_##suffix(                                                                       \
      const T* logits, const int64_t* tokens, const float* draft_probs, const int64_t* drafted,                        \
      const float* accept_uniforms, const float* draw_uniforms, const float* temperature, const int64_t* top_k,        \
      const float* top_p, const float* min_p, int32_t rows, int32_t vocab, int64_t* path, int64_t* emitted,            \
      int64_t* accepted, void* workspace) {                                                                            \
    const dspark::Chain<T> chain(logits, tokens, draft_probs, drafted, accept_uniforms, draw_uniforms,                 \
                                 {temperature, top_k, top_p, min_p}, rows, vocab, blockIdx.z);                         \
    dspark::verify_chain<T>(chain, blockIdx.z, {path, emitted, accepted}, workspace);                                  \
  }

DSPARK_VERIFY_KERNELS(f32, float)
DSPARK_VERIFY_KERNELS(f16, dspark::Half)
DSPARK_VERIFY_KERNELS(bf16, dspark::BFloat16)
