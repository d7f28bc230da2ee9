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
  if (weigher.greedy) return 1ull << kMassBits;
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

// Whether the draft `token`, drawn from `draft_probs` [vocab], stands. A damaged row lets nothing stand, nor does a
// token outside the vocabulary.
template <class Block, class T>
DSPARK_HD bool accepts(const Block& block, SampleShared& shared, const Row<T>& row, const SamplingParams& params,
                       int64_t token, const float* draft_probs, float uniform) {
  if (token < 0 || token >= row.size) return false;
  const Weigher weigher = weigh(block, shared, row, params);
  if (weigher.damaged) return false;
  const uint64_t total = total_mass(block, shared, row, weigher);
  const int32_t id = static_cast<int32_t>(token);
  return stands(uniform, draft_probs[id], probability(weigher.mass(row.at(id), id), inverse_of(total)));
}

// The token after the last draft that stands: from the residual if a draft fell here (`draft_probs` given), else from
// the target itself. kDamaged if the row is damaged.
template <class Block, class T>
DSPARK_HD int32_t correct(const Block& block, SampleShared& shared, const Row<T>& row, const SamplingParams& params,
                          const float* draft_probs, float uniform) {
  const Weigher weigher = weigh(block, shared, row, params);
  uint64_t total;
  if (weigher.damaged || draft_probs == nullptr) return draw(block, shared, row, weigher, uniform, &total);
  const float inverse = inverse_of(total_mass(block, shared, row, weigher));
  const int32_t token = locate(
      block, shared, row,
      [&](int32_t id, float logit) {
        return residual_mass(probability(weigher.mass(logit, id), inverse), draft_probs[id]);
      },
      [&](uint64_t all) { return draw_goal(all, uniform); }, &total);
  return total > kMinResidual ? token : draw(block, shared, row, weigher, uniform, &total);
}

// Writes the verdict of one sequence: `stood` [drafted] tells which drafts stand by themselves.
template <class Block, class T>
DSPARK_HD void conclude(const Block& block, SampleShared& shared, const T* logits, int rows, int vocab,
                        const int64_t* tokens, const float* draft_probs, int64_t drafted, const int32_t* stood,
                        const float* uniforms, const SamplingParams& params, const Verdict& verdict) {
  const int drafts = static_cast<int>(smaller<int64_t>(larger<int64_t>(drafted, 0), rows - 1));
  int accepted = 0;
  while (accepted < drafts && stood[accepted]) ++accepted;
  const Row<T> row{logits + static_cast<int64_t>(accepted) * vocab, vocab};
  const float* const probs = accepted < drafts ? draft_probs + static_cast<int64_t>(accepted) * vocab : nullptr;
  const int32_t last = correct(block, shared, row, params, probs, uniforms[accepted]);
  block.each([&](int thread) {
    for (int i = thread; i < rows; i += block.size()) {
      verdict.path[i] = i <= accepted ? i : -1;
      verdict.emitted[i] = i < accepted ? tokens[i + 1] : i == accepted ? static_cast<int64_t>(last) : -1;
    }
    if (thread == 0) *verdict.accepted = accepted;
  });
}

}  // namespace dspark
