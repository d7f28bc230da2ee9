// The host build of the arithmetic in include/dspark, behind a C interface.
//
// It needs a C++17 compiler and nothing else. The tests compare it with the Python reference; it is also what the
// device results are compared with, bit for bit. Functions return 0, or a number that says which argument is wrong.
#include "dspark/host.h"

#include <memory>
#include <vector>

#include "dspark/chain.h"
#include "dspark/compact.h"
#include "dspark/markov.h"

namespace {

using namespace dspark;

SamplingParams params_of(const dspark_sampling& sampling, int64_t i) {
  return {sampling.temperature[i], sampling.top_p[i], sampling.min_p[i], sampling.top_k[i]};
}

int32_t checked(int64_t batch, int64_t rows, int64_t vocab, int32_t threads) {
  if (batch < 0) return DSPARK_BAD_BATCH;
  if (rows < 1 || rows > kMaxRows) return DSPARK_BAD_ROWS;
  if (vocab < 1 || vocab > kMaxVocab) return DSPARK_BAD_VOCAB;
  if (threads < 32 || threads > 1024 || threads % 32) return DSPARK_BAD_THREADS;
  return 0;
}

template <class F> int32_t with_type(int32_t dtype, F f) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
  }
  return DSPARK_BAD_DTYPE;
}

template <class T> int32_t draft(const dspark_draft* d, const HostBlock& block) {
  const MarkovHead<T> head{static_cast<MarkovKind>(d->kind),
                           d->rank,
                           d->hidden,
                           d->vocab,
                           d->embeddings,
                           d->confidence_uses_token != 0,
                           static_cast<const T*>(d->w1),
                           static_cast<const T*>(d->w2),
                           static_cast<const T*>(d->mix),
                           static_cast<const T*>(d->mix_bias),
                           static_cast<const T*>(d->confidence),
                           static_cast<const T*>(d->confidence_bias),
                           d->token_map};
  const auto shared = std::make_unique<SampleShared>();
  std::vector<float> v(d->rank), state(d->rank), next(d->rank), logits(d->vocab);
  for (int64_t b = 0; b < d->batch; ++b) {
    int64_t previous = d->anchors[b];
    for (int64_t k = 0; k < d->drafts; ++k) {
      const int64_t slot = b * d->drafts + k;
      const T* const h = static_cast<const T*>(d->hidden_rows) + slot * d->hidden;
      const T* const e = head.rank ? head.embedding(previous) : nullptr;
      if (head.kind != MarkovKind::kNone) {
        for (int i = 0; i < d->rank; ++i) v[i] = correction_entry(head, e, h, k ? state.data() : nullptr, next.data(), i);
        if (head.kind == MarkovKind::kRnn) state.swap(next);
      }
      if (head.confidence) d->confidences[slot] = confidence_logit(head, e, h);
      const T* const base = static_cast<const T*>(d->base_logits) + slot * d->vocab;
      for (int i = 0; i < d->vocab; ++i) logits[i] = corrected_logit(head, to_float(base[i]), v.data(), i);
      const Row<float> row{logits.data(), d->vocab};
      const Weigher weigher = weigh(block, *shared, row, {d->temperature[b], 1.0f, 0.0f, 0});
      uint64_t total;
      const int32_t token = draw(block, *shared, row, weigher, d->uniforms[slot], &total);
      previous = d->tokens[slot] = token >= 0 && d->token_map ? d->token_map[token] : token;
      if (!d->probs) continue;
      for (int i = 0; i < d->vocab; ++i)
        d->probs[slot * d->vocab + i] =
            token < 0 ? 0.0f : probability(weigher.mass(logits[i], i), inverse_of(total));
    }
  }
  return 0;
}

template <class Unit>
void compact(const dspark_cache* cache, const int64_t* path, const int64_t* accepted, const int64_t* starts,
             int64_t rows) {
  for (int64_t t = 0; t < cache->tensors; ++t) {
    const int64_t heads = cache->heads[t], units = cache->row_bytes[t] / static_cast<int64_t>(sizeof(Unit));
    for (int64_t b = 0; b < cache->batch; ++b)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t unit = 0; unit < units; ++unit) {
          Unit* const sequence = static_cast<Unit*>(cache->data[t]) + (b * heads + head) * cache->capacity * units;
          compact_column(sequence + unit, units, cache->capacity, starts[b], path + b * rows, static_cast<int>(rows),
                         accepted[b]);
        }
  }
}

}  // namespace

extern "C" {

int32_t dspark_interface_version() { return DSPARK_INTERFACE_VERSION; }

void dspark_math(int32_t function, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    y[i] = function == 0 ? exp_negative(x[i]) : function == 1 ? sigmoid(x[i]) : hyperbolic_tangent(x[i]);
}

int32_t dspark_to_float(int32_t dtype, const void* x, float* y, int64_t count) {
  return with_type(dtype, [&](auto type) {
    for (int64_t i = 0; i < count; ++i) y[i] = to_float(static_cast<const decltype(type)*>(x)[i]);
    return 0;
  });
}

int32_t dspark_masses(int32_t dtype, const void* logits, int64_t vocab, const dspark_sampling* sampling,
                      int32_t threads, float* weights, uint64_t* masses) {
  if (const int32_t wrong = checked(1, 1, vocab, threads)) return wrong;
  return with_type(dtype, [&](auto type) {
    const Row<decltype(type)> row{static_cast<const decltype(type)*>(logits), static_cast<int>(vocab)};
    const auto shared = std::make_unique<SampleShared>();
    const Weigher weigher = weigh(HostBlock(threads), *shared, row, params_of(*sampling, 0));
    for (int i = 0; i < row.size; ++i) {
      weights[i] = weigher.weight(row.at(i));
      masses[i] = weigher.damaged ? 0 : weigher.mass(row.at(i), i);
    }
    return 0;
  });
}

int32_t dspark_draw(int32_t dtype, const void* logits, int64_t count, int64_t vocab, const dspark_sampling* sampling,
                    const float* uniforms, int32_t threads, int64_t* tokens) {
  if (const int32_t wrong = checked(count, 1, vocab, threads)) return wrong;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const HostBlock block(threads);
    const auto shared = std::make_unique<SampleShared>();
    for (int64_t i = 0; i < count; ++i) {
      const Row<T> row{static_cast<const T*>(logits) + i * vocab, static_cast<int>(vocab)};
      uint64_t total;
      const Weigher weigher = weigh(block, *shared, row, params_of(*sampling, i));
      tokens[i] = draw(block, *shared, row, weigher, uniforms[i], &total);
    }
    return 0;
  });
}

int32_t dspark_verify_tree(int32_t dtype, const void* logits, const int64_t* tokens, const uint8_t* ancestors,
                           const float* uniforms, const dspark_sampling* sampling, int64_t batch, int64_t rows,
                           int64_t vocab, int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted) {
  if (const int32_t wrong = checked(batch, rows, vocab, threads)) return wrong;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const HostBlock block(threads);
    const auto shared = std::make_unique<SampleShared>();
    WalkShared walking{};
    for (int64_t b = 0; b < batch; ++b) {
      const auto drawn = [&](int r) {
        const Row<T> row{static_cast<const T*>(logits) + (b * rows + r) * vocab, static_cast<int>(vocab)};
        uint64_t total;
        const Weigher weigher = weigh(block, *shared, row, params_of(*sampling, b));
        return draw(block, *shared, row, weigher, uniforms[b * rows + r], &total);
      };
      const Tree tree{tokens + b * rows, ancestors + b * rows * rows, static_cast<int>(rows)};
      walk(block, walking, tree, drawn, {path + b * rows, emitted + b * rows, accepted + b});
    }
    return 0;
  });
}

int32_t dspark_verify_chain(int32_t dtype, const void* logits, const int64_t* tokens, const float* draft_probs,
                            const int64_t* drafted, const float* accept_uniforms, const float* draw_uniforms,
                            const dspark_sampling* sampling, int64_t batch, int64_t rows, int64_t vocab,
                            int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted) {
  if (const int32_t wrong = checked(batch, rows, vocab, threads)) return wrong;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const HostBlock block(threads);
    const auto shared = std::make_unique<SampleShared>();
    const int64_t drafts = rows - 1;
    for (int64_t b = 0; b < batch; ++b) {
      const float* const probs = draft_probs + b * drafts * vocab;
      const SamplingParams params = params_of(*sampling, b);
      for (int64_t i = 0;; ++i) {
        const Row<T> row{static_cast<const T*>(logits) + (b * rows + i) * vocab, static_cast<int>(vocab)};
        const Weigher weigher = weigh(block, *shared, row, params);
        const uint64_t total = total_mass(block, *shared, row, weigher);
        const float* const q = i < drafts && i < drafted[b] ? probs + i * vocab : nullptr;
        if (q && accepts(row, weigher, total, tokens[b * rows + i + 1], q, accept_uniforms[b * drafts + i])) continue;
        const int32_t last = correct(block, *shared, row, weigher, total, q, draw_uniforms[b * rows + i]);
        conclude(block, tokens + b * rows, static_cast<int>(rows), static_cast<int>(i), last,
                 {path + b * rows, emitted + b * rows, accepted + b});
        break;
      }
    }
    return 0;
  });
}

int32_t dspark_draft_block(int32_t dtype, const dspark_draft* draft_of, int32_t threads) {
  if (const int32_t wrong = checked(draft_of->batch, 1, draft_of->vocab, threads)) return wrong;
  if (draft_of->kind < 0 || draft_of->kind > static_cast<int32_t>(MarkovKind::kRnn)) return DSPARK_BAD_KIND;
  if (draft_of->rank < 0 || draft_of->rank > kMaxRank) return DSPARK_BAD_RANK;
  return with_type(dtype, [&](auto type) { return draft<decltype(type)>(draft_of, HostBlock(threads)); });
}

int32_t dspark_compact_cache(const dspark_cache* cache, const int64_t* path, const int64_t* accepted,
                             const int64_t* starts, int64_t rows) {
  if (rows < 1 || rows > kMaxRows) return DSPARK_BAD_ROWS;
  bool wide = true;
  for (int64_t t = 0; t < cache->tensors; ++t)
    wide = wide && cache->row_bytes[t] % 16 == 0 && reinterpret_cast<uintptr_t>(cache->data[t]) % 16 == 0;
  if (wide) {
    compact<Unit16>(cache, path, accepted, starts, rows);
  } else {
    compact<uint8_t>(cache, path, accepted, starts, rows);
  }
  return 0;
}

}  // extern "C"
