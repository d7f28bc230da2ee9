// Kernels of DraftBlock; their launch contract is in dspark/kernels.h.
//
// The slots of a block depend on each other only through the token drafted before, which `draw` leaves in `tokens` for
// the kernels of the next slot.
#include "dspark/chain.h"
#include "dspark/kernels.h"
#include "types.h"

namespace dspark {

struct DraftWorkspace {
  DrawnFrom* drawn;  // [batch, drafts]
  float* v;          // [batch, rank]
  float* states[2];  // [batch, rank]
  uint64_t* best;    // [batch, tiles]

  __device__ DraftWorkspace(void* memory, int64_t batch, int64_t drafts, int64_t rank) {
    char* at = static_cast<char*>(memory);
    drawn = reinterpret_cast<DrawnFrom*>(at);
    at += aligned(batch * drafts * static_cast<int64_t>(sizeof(DrawnFrom)));
    for (float** each : {&v, &states[0], &states[1]}) {
      *each = reinterpret_cast<float*>(at);
      at += aligned(batch * rank * 4);
    }
    best = reinterpret_cast<uint64_t*>(at);
  }
};

// The token before a slot.
__device__ inline int64_t token_before(const int64_t* anchors, const int64_t* tokens, int64_t sequence, int drafts,
                                       int slot) {
  return slot == 0 ? anchors[sequence] : tokens[sequence * drafts + slot - 1];
}

// v of a slot, an entry by each warp; for rnn also the next state.
template <class T>
__device__ void draft_mix(const MarkovHead<T>& head, int drafts, int slot, const T* hidden_rows,
                          const int64_t* anchors, const int64_t* tokens, void* memory) {
  const int64_t sequence = blockIdx.y;
  const DraftWorkspace workspace(memory, gridDim.y, drafts, head.rank);
  const int entry = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
  if (entry >= head.rank) return;  // whole warps
  float* const state = workspace.states[slot % 2] + sequence * head.rank;
  float* const next = workspace.states[(slot + 1) % 2] + sequence * head.rank;
  const T* const e = head.embedding(token_before(anchors, tokens, sequence, drafts, slot));
  const T* const h = hidden_rows + (sequence * drafts + slot) * head.hidden;
  const float v = correction_entry(head, e, h, slot == 0 ? nullptr : state, next, entry);
  if (threadIdx.x % 32 == 0) workspace.v[sequence * head.rank + entry] = v;
}

constexpr int kTokens = 4;  // rows of w2 a warp reads together

// Corrected logits of a slot, some tokens by each warp in turn, for up to kDraftSequences sequences.
template <class T>
__device__ void draft_step(const MarkovHead<T>& head, int drafts, int slot, int batch, const T* base_logits,
                           const int64_t* anchors, const int64_t* tokens, float* probs, void* memory) {
  alignas(16) __shared__ float v[kDraftSequences][kMaxRank];
  __shared__ uint64_t best[kDraftSequences];
  const DraftWorkspace workspace(memory, batch, drafts, head.rank);
  const int first = static_cast<int>(blockIdx.y) * kDraftSequences, count = smaller(batch - first, kDraftSequences);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
  const int rank = head.kind == MarkovKind::kNone ? 0 : head.rank;
  for (int i = thread; i < count * rank; i += threads) {
    const int s = i / rank, entry = i % rank;
    const int64_t sequence = first + s;
    v[s][entry] = head.kind == MarkovKind::kVanilla
                      ? to_float(head.embedding(token_before(anchors, tokens, sequence, drafts, slot))[entry])
                      : workspace.v[sequence * rank + entry];
  }
  if (thread < kDraftSequences) best[thread] = 0;
  __syncthreads();
  uint64_t mine = 0;  // of sequence `lane`
  const int warps = static_cast<int>(gridDim.x) * threads / 32;
  int token = (static_cast<int>(blockIdx.x) * threads + thread) / 32;
  for (; token < head.vocab; token += kTokens * warps) {
    float logits[kTokens];  // of sequence `lane`
    DSPARK_ROLLED
    for (int s = 0; s < count; ++s) {
      const T* const base = base_logits + (static_cast<int64_t>(first + s) * drafts + slot) * head.vocab;
      DSPARK_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        const int here = smaller(token + i * warps, head.vocab - 1);
        const float found = corrected_logit(head, to_float(base[here]), v[s], here);
        if (lane == s) logits[i] = found;
      }
    }
    if (lane >= count) continue;
    float* const row = probs + (static_cast<int64_t>(first + lane) * drafts + slot) * head.vocab;
    DSPARK_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      const int here = token + i * warps;
      if (here >= head.vocab) continue;
      row[here] = logits[i];
      mine = larger(mine, argmax_key(logits[i], here));
    }
  }
  if (lane < count && mine)
    atomicMax(reinterpret_cast<unsigned long long*>(&best[lane]), static_cast<unsigned long long>(mine));
  __syncthreads();
  if (thread < count) workspace.best[static_cast<int64_t>(first + thread) * gridDim.x + blockIdx.x] = best[thread];
}

// Draws the slot's token of a sequence from its corrected logits.
__device__ inline void draft_draw(int drafts, int slot, int vocab, int tiles, int rank, const float* temperature,
                                  const float* uniforms, const int64_t* token_map, const float* probs,
                                  int64_t* tokens, void* memory) {
  __shared__ SampleShared shared;
  const DeviceBlock block;
  const int64_t sequence = blockIdx.x, index = sequence * drafts + slot;
  const DraftWorkspace workspace(memory, gridDim.x, drafts, rank);
  block.each([&](int thread) {
    if (thread == 0) shared.best = 0;
  });
  block.each([&](int thread) {
    uint64_t key = 0;
    for (int i = thread; i < tiles; i += block.size()) key = larger(key, workspace.best[sequence * tiles + i]);
    block.raise_together(&shared.best, key);
  });
  const uint64_t best = block.read(&shared.best);
  const Row<float> row{probs + index * vocab, vocab};
  uint64_t total;
  const Weigher weigher = weigh(block, shared, row, {temperature[sequence], 1.0f, 0.0f, 0}, best);
  const int32_t token = draw(block, shared, row, weigher, uniforms[index], &total);
  if (threadIdx.x != 0) return;
  tokens[index] = token >= 0 && token_map ? token_map[token] : token;
  workspace.drawn[index] = {weigher, inverse_of(total)};
}

// Corrected logits to probabilities; the first tile of each slot computes its confidence instead.
template <class T>
__device__ void draft_finish(const MarkovHead<T>& head, int drafts, const T* hidden_rows, const int64_t* anchors,
                             const int64_t* tokens, float* confidences, float* probs, void* memory) {
  const int slot = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int64_t sequence = blockIdx.z, index = sequence * drafts + slot;
  if (blockIdx.x == 0) {
    if (confidences == nullptr || thread >= 32) return;
    const T* const e =
        head.confidence_uses_token ? head.embedding(token_before(anchors, tokens, sequence, drafts, slot)) : nullptr;
    const float confidence = confidence_logit(head, e, hidden_rows + index * head.hidden);
    if (thread == 0) confidences[index] = confidence;
    return;
  }
  const DraftWorkspace workspace(memory, gridDim.z, drafts, head.rank);
  const DrawnFrom drawn = workspace.drawn[index];
  float* const row = probs + index * head.vocab;
  const int stride = static_cast<int>((gridDim.x - 1) * blockDim.x);
  for (int token = static_cast<int>((blockIdx.x - 1) * blockDim.x) + thread; token < head.vocab; token += stride)
    row[token] = drawn.weigher.damaged ? 0.0f : probability(drawn.weigher.mass(row[token], token), drawn.inverse_total);
}

}  // namespace dspark

DSPARK_KERNEL(1)
dspark_draft_draw(int32_t drafts, int32_t slot, int32_t vocab, int32_t tiles, int32_t rank, const float* temperature,
                  const float* uniforms, const int64_t* token_map, const float* probs, int64_t* tokens,
                  void* workspace) {
  dspark::draft_draw(drafts, slot, vocab, tiles, rank, temperature, uniforms, token_map, probs, tokens, workspace);
}

#define DSPARK_DRAFT_KERNELS(suffix, T)                                                                                \
  DSPARK_KERNEL(1)                                                                                                     \
  dspark_draft_mix_##suffix(int32_t kind, int32_t rank, int32_t hidden, int32_t embeddings, int32_t drafts,            \
                            int32_t slot, const T* hidden_rows, const int64_t* anchors, const int64_t* tokens,         \
                            const T* w1, const T* mix, const T* mix_bias, void* workspace) {                           \
    dspark::MarkovHead<T> head{};                                                                                      \
    head.kind = static_cast<dspark::MarkovKind>(kind);                                                                 \
    head.rank = rank;                                                                                                  \
    head.hidden = hidden;                                                                                              \
    head.embeddings = embeddings;                                                                                      \
    head.w1 = w1;                                                                                                      \
    head.mix = mix;                                                                                                    \
    head.mix_bias = mix_bias;                                                                                          \
    dspark::draft_mix<T>(head, drafts, slot, hidden_rows, anchors, tokens, workspace);                                 \
  }                                                                                                                    \
  DSPARK_KERNEL(1)                                                                                                     \
  dspark_draft_step_##suffix(int32_t kind, int32_t rank, int32_t vocab, int32_t embeddings, int32_t drafts,            \
                             int32_t slot, int32_t batch, const T* base_logits, const int64_t* anchors,                \
                             const int64_t* tokens, const T* w1, const T* w2, float* probs, void* workspace) {         \
    dspark::MarkovHead<T> head{};                                                                                      \
    head.kind = static_cast<dspark::MarkovKind>(kind);                                                                 \
    head.rank = rank;                                                                                                  \
    head.vocab = vocab;                                                                                                \
    head.embeddings = embeddings;                                                                                      \
    head.w1 = w1;                                                                                                      \
    head.w2 = w2;                                                                                                      \
    dspark::draft_step<T>(head, drafts, slot, batch, base_logits, anchors, tokens, probs, workspace);                  \
  }                                                                                                                    \
  DSPARK_KERNEL(1)                                                                                                     \
  dspark_draft_finish_##suffix(int32_t rank, int32_t hidden, int32_t vocab, int32_t embeddings, int32_t drafts,        \
                               int32_t uses_token, const T* hidden_rows, const int64_t* anchors,                       \
                               const int64_t* tokens, const T* w1, const T* confidence, const T* confidence_bias,      \
                               float* confidences, float* probs, void* workspace) {                                    \
    dspark::MarkovHead<T> head{};                                                                                      \
    head.rank = rank;                                                                                                  \
    head.hidden = hidden;                                                                                              \
    head.vocab = vocab;                                                                                                \
    head.embeddings = embeddings;                                                                                      \
    head.confidence_uses_token = uses_token != 0;                                                                      \
    head.w1 = w1;                                                                                                      \
    head.confidence = confidence;                                                                                      \
    head.confidence_bias = confidence_bias;                                                                            \
    dspark::draft_finish<T>(head, drafts, hidden_rows, anchors, tokens, confidences, probs, workspace);                \
  }

DSPARK_DRAFT_KERNELS(f32, float)
DSPARK_DRAFT_KERNELS(f16, dspark::Half)
DSPARK_DRAFT_KERNELS(bf16, dspark::BFloat16)
