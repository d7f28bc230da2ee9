// Rejection sampling of a chain drawn from a draft distribution q (Leviathan et al. 2023, algorithm 1).
//
// A draft stands with probability min(1, p/q); where one falls, the next token comes from norm(max(p - q, 0)).
#pragma once

#include "dspark/tree.h"

namespace dspark {

constexpr int kResidualBits = 60;
constexpr uint64_t kMinResidual = 11529215046ull;  // 1e-8 in 60 bits; less is rounding: p and q are the same

DSPARK_HD float inverse_of(uint64_t total) { return static_cast<float>(1.0 / static_cast<double>(total)); }

// A mass as a probability. The mass of one token is a float32 number, so there is one rounding here.
DSPARK_HD float probability(uint64_t mass, float inverse_total) { return static_cast<float>(mass) * inverse_total; }

DSPARK_HD bool stands(float uniform, float q, float p) {
  return static_cast<double>(uniform) * static_cast<double>(q) < static_cast<double>(p);
}

DSPARK_HD uint64_t residual_mass(float p, float q) {
  const float rest = p - q;
  if (!(rest > 0.0f)) return 0;
  const float scaled = smaller(rest, 1.0f) * 1152921504606846976.0f;  // 2^60
#ifdef __CUDA_ARCH__
  return __float2ull_rn(scaled);
#else
  return static_cast<uint64_t>(rintf(scaled));
#endif
}

// Mass of all tokens of a row.
template <class Block, class T>
DSPARK_HD uint64_t total_mass(const Block& block, SampleShared& shared, const Row<T>& row, const Weigher& weigher) {
  if (weigher.greedy || weigher.damaged) return 1ull << kMassBits;
  const int threads = block.size(), groups = row.groups();
  block.each([&](int thread) {
    if (thread == 0) shared.rest = 0;
  });
  block.each([&](int thread) {
    uint64_t sum = 0;
    for (int group = thread; group < groups; group += threads)
      row.visit(group, [&](int id, float logit) { sum += weigher.mass(logit, id); });
    block.add_together(&shared.rest, sum);
  });
  return block.read(&shared.rest);
}

// Whether the draft `token`, drawn from `draft_probs` [vocab], stands; `total` is the row's total_mass. A damaged row
// lets nothing stand, nor does a token outside the vocabulary.
template <class T>
DSPARK_HD bool accepts(const Row<T>& row, const Weigher& weigher, uint64_t total, int64_t token,
                       const float* draft_probs, float uniform) {
  if (token < 0 || token >= row.size || weigher.damaged) return false;
  const int32_t id = static_cast<int32_t>(token);
  return stands(uniform, draft_probs[id], probability(weigher.mass(row.at(id), id), inverse_of(total)));
}

// The token after the last draft that stands: from the residual if a draft fell here (`draft_probs` given), else from
// the target itself. kDamaged if the row is damaged.
template <class Block, class T>
DSPARK_HD int32_t correct(const Block& block, SampleShared& shared, const Row<T>& row, const Weigher& weigher,
                          uint64_t total, const float* draft_probs, float uniform) {
  if (weigher.damaged) return kDamaged;
  const float inverse = inverse_of(total);
  bool residual = draft_probs != nullptr;
  DSPARK_ROLLED
  for (;; residual = false) {
    if (!residual && weigher.greedy) return weigher.top_id;
    uint64_t sum;
    const int32_t token = locate(
        block, shared, row,
        [&](int32_t id, float logit) {
          const uint64_t mass = weigher.mass(logit, id);
          return residual ? residual_mass(probability(mass, inverse), draft_probs[id]) : mass;
        },
        [&](uint64_t all) { return draw_goal(all, uniform); }, &sum);
    if (!residual || sum > kMinResidual) return token;
  }
}

// Writes the verdict of one sequence: `accepted` drafts stand, `last` follows them.
template <class Block>
DSPARK_HD void conclude(const Block& block, const int64_t* tokens, int rows, int accepted, int32_t last,
                        const Verdict& verdict) {
  block.each([&](int thread) {
    for (int i = thread; i < rows; i += block.size()) {
      verdict.path[i] = i <= accepted ? i : -1;
      verdict.emitted[i] = i < accepted ? tokens[i + 1] : i == accepted ? static_cast<int64_t>(last) : -1;
    }
    if (thread == 0) *verdict.accepted = accepted;
  });
}

}  // namespace dspark
