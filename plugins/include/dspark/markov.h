// The sequential head of a block drafter: how the token drafted before corrects the logits of the next slot.
//
// With e = W1[previous token] and h the block's hidden row:
//   vanilla  v = e
//   gated    v = sigmoid(G [h; e] + b) * e
//   rnn      (u, c, o) = J [s; e; h] + b,  v = tanh(o),  s <- sigmoid(u) * s + (1 - sigmoid(u)) * tanh(c)
// and the corrected logits are U + W2 v. Confidence: w . [h; e] + b, before its sigmoid.
//
// All sums are float32 and have one order: 32 lanes take 8 neighbouring products in turn, then fold in halves. A warp
// computes them on the device.
#pragma once

#include "dspark/number.h"

namespace dspark {

enum class MarkovKind : int32_t { kNone = 0, kVanilla = 1, kGated = 2, kRnn = 3 };

constexpr int kMaxRank = 1024;

// Weights of the head; all of one type. Null where the kind has no such part.
template <class T> struct MarkovHead {
  MarkovKind kind;
  int rank;
  int hidden;
  int vocab;                   // of the draft: rows of w2
  int embeddings;              // rows of w1
  bool confidence_uses_token;  // the confidence reads e too
  const T* w1;                 // [embeddings, rank]
  const T* w2;                 // [vocab, rank]
  const T* mix;                // gated: [rank, hidden + rank]; rnn: [3 rank, 2 rank + hidden]
  const T* mix_bias;           // [rank] or [3 rank]
  const T* confidence;         // [hidden (+ rank)], or null for none
  const T* confidence_bias;    // [1]
  const int64_t* token_map;    // [vocab]: target ids of draft ids; null where they are the same

  // Row of w1 of a token of the target; the first or last where there is no such row.
  DSPARK_HD const T* embedding(int64_t token) const {
    return w1 + larger<int64_t>(smaller<int64_t>(token, embeddings - 1), 0) * rank;
  }
};

// One lane's part of a dot product, added to `sum`.
template <class A, class B> DSPARK_HD float lane_dot(const A* a, const B* b, int size, int lane, float sum) {
  for (int first = lane * kGroup; first < size; first += 32 * kGroup) {
    if (first + kGroup <= size) {
      float x[kGroup], y[kGroup];
      load_group(a + first, x);
      load_group(b + first, y);
      DSPARK_UNROLL
      for (int i = 0; i < kGroup; ++i) sum = fmaf(x[i], y[i], sum);
    } else {
      for (int i = first; i < size; ++i) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
    }
  }
  return sum;
}

// Sum of part(lane) over 32 lanes. On the device a whole warp calls this and each thread computes its lane.
template <class Part> DSPARK_HD float fold(Part part) {
#ifdef DSPARK_ON_DEVICE
  float sum = part(static_cast<int>(threadIdx.x % 32));
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
#else
  float sums[32];
  for (int lane = 0; lane < 32; ++lane) sums[lane] = part(lane);
  for (int step = 16; step; step >>= 1)
    for (int lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
  return sums[0];
#endif
}

// Entry i of v; for rnn also of the next state. `state` and `next` are [rank], used by rnn only; a null state is zero.
template <class T>
DSPARK_HD float correction_entry(const MarkovHead<T>& head, const T* e, const T* h, const float* state, float* next,
                                 int i) {
  const int rank = head.rank, hidden = head.hidden;
  if (head.kind == MarkovKind::kVanilla) return to_float(e[i]);
  if (head.kind == MarkovKind::kGated) {
    const T* const row = head.mix + static_cast<int64_t>(i) * (hidden + rank);
    const float gate = fold([&](int lane) {
      return lane_dot(row + hidden, e, rank, lane, lane_dot(row, h, hidden, lane, 0.0f));
    });
    return sigmoid(gate + to_float(head.mix_bias[i])) * to_float(e[i]);
  }
  float z[3];
  DSPARK_UNROLL
  for (int part = 0; part < 3; ++part) {
    const int64_t index = static_cast<int64_t>(part) * rank + i;
    const T* const row = head.mix + index * (2 * rank + hidden);
    z[part] = fold([&](int lane) {
      float sum = state ? lane_dot(row, state, rank, lane, 0.0f) : 0.0f;
      sum = lane_dot(row + rank, e, rank, lane, sum);
      return lane_dot(row + 2 * rank, h, hidden, lane, sum);
    });
    z[part] += to_float(head.mix_bias[index]);
  }
  const float update = sigmoid(z[0]);
  next[i] = fmaf(update, state ? state[i] : 0.0f, (1.0f - update) * hyperbolic_tangent(z[1]));
  return hyperbolic_tangent(z[2]);
}

// The confidence before its sigmoid.
template <class T> DSPARK_HD float confidence_logit(const MarkovHead<T>& head, const T* e, const T* h) {
  const float sum = fold([&](int lane) {
    const float part = lane_dot(head.confidence, h, head.hidden, lane, 0.0f);
    return head.confidence_uses_token ? lane_dot(head.confidence + head.hidden, e, head.rank, lane, part) : part;
  });
  return sum + to_float(head.confidence_bias[0]);
}

// Corrected logit of one token of the draft's vocabulary.
template <class T> DSPARK_HD float corrected_logit(const MarkovHead<T>& head, float base, const float* v, int token) {
  if (head.kind == MarkovKind::kNone) return base;
  const T* const row = head.w2 + static_cast<int64_t>(token) * head.rank;
  return base + fold([&](int lane) { return lane_dot(row, v, head.rank, lane, 0.0f); });
}

}  // namespace dspark
