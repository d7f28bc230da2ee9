// The kernels behind the C interface of the host build, so that the same tests run both.
//
// `threads` of each function is the block; `emulation_configure` sets the rest of a launch.
#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "device.h"

#include "dspark/host.h"
#include "../../../plugins/kernels/launch.cu"

namespace {

using namespace dspark;

int processors = 4;
bool with_workspace = true;

SamplingTensors tensors_of(const dspark_sampling* sampling) {
  return {sampling->temperature, sampling->top_k, sampling->top_p, sampling->min_p};
}

// Memory at the very end of an allocation. What is needed zeroed must be left zeroed.
int32_t checked(cudaError_t error, const std::vector<char>& workspace) {
  if (error != cudaSuccess) return 100;
  return std::all_of(workspace.begin(), workspace.end(), [](char byte) { return byte == 0; }) ? 0 : 101;
}

}  // namespace

extern "C" {

void emulation_configure(uint32_t seed, int32_t processors_, int32_t with_workspace_) {
  emulation::random_numbers.seed(seed);
  processors = processors_;
  with_workspace = with_workspace_ != 0;
}

int32_t dspark_verify_tree(int32_t dtype, const void* logits, const int64_t* tokens, const uint8_t* ancestors,
                           const float* uniforms, const dspark_sampling* sampling, int64_t batch, int64_t rows,
                           int64_t vocab, int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted) {
  const VerifySizes sizes{static_cast<int>(batch), static_cast<int>(rows), static_cast<int>(vocab)};
  std::vector<char> workspace(static_cast<size_t>(verify_workspace(sizes)), 0);
  return checked(launch_verify_tree(static_cast<DType>(dtype), {logits, tokens, ancestors, uniforms},
                                    tensors_of(sampling), sizes, {path, emitted, accepted},
                                    with_workspace ? workspace.data() : nullptr, {processors, threads}, nullptr),
                 workspace);
}

int32_t dspark_verify_chain(int32_t dtype, const void* logits, const int64_t* tokens, const float* draft_probs,
                            const int64_t* drafted, const float* accept_uniforms, const float* draw_uniforms,
                            const dspark_sampling* sampling, int64_t batch, int64_t rows, int64_t vocab,
                            int32_t threads, int64_t* path, int64_t* emitted, int64_t* accepted) {
  const VerifySizes sizes{static_cast<int>(batch), static_cast<int>(rows), static_cast<int>(vocab)};
  std::vector<char> workspace(static_cast<size_t>(verify_workspace(sizes)), 0);
  return checked(launch_verify_chain(static_cast<DType>(dtype),
                                     {logits, tokens, draft_probs, drafted, accept_uniforms, draw_uniforms},
                                     tensors_of(sampling), sizes, {path, emitted, accepted},
                                     with_workspace ? workspace.data() : nullptr, {processors, threads}, nullptr),
                 workspace);
}

int32_t dspark_draft_block(int32_t dtype, const dspark_draft* d, int32_t threads) {
  const DraftSizes sizes{static_cast<int>(d->batch), static_cast<int>(d->drafts), d->kind,       d->rank, d->hidden,
                         d->vocab,                   d->embeddings,               d->confidence_uses_token != 0};
  const DraftTensors tensors{d->base_logits, d->hidden_rows, d->anchors,  d->temperature, d->uniforms,
                             d->w1,          d->w2,          d->mix,      d->mix_bias,    d->confidence,
                             d->confidence_bias, d->token_map, d->tokens, d->probs,       d->confidences};
  const LaunchOptions options{processors, threads};
  std::vector<char> workspace(static_cast<size_t>(draft_workspace(sizes)), '\x7f');  // any contents will do
  return launch_draft_block(static_cast<DType>(dtype), tensors, sizes, workspace.data(), options, nullptr) ? 100 : 0;
}

int32_t dspark_compact_cache(const dspark_cache* cache, const int64_t* path, const int64_t* accepted,
                             const int64_t* starts, int64_t rows) {
  bool wide = true;
  for (int64_t t = 0; t < cache->tensors; ++t)
    wide = wide && cache->row_bytes[t] % 16 == 0 && reinterpret_cast<uintptr_t>(cache->data[t]) % 16 == 0;
  CacheTensors tensors{};
  tensors.count = static_cast<int32_t>(cache->tensors);
  for (int64_t t = 0; t < cache->tensors; ++t)
    tensors.items[t] = {cache->data[t], static_cast<int32_t>(cache->heads[t]),
                        static_cast<int32_t>(cache->row_bytes[t] / (wide ? 16 : 1))};
  return launch_compact_cache(tensors, wide, path, accepted, starts, static_cast<int>(cache->batch),
                              static_cast<int>(rows), static_cast<int>(cache->capacity), nullptr)
             ? 100
             : 0;
}

}  // extern "C"

// Launches from outside, as CUDA's driver takes them: a kernel by name, and a pointer to each argument.
namespace {

using Kernel = std::function<void(void* const*)>;

template <class... A, size_t... I>
Kernel with_arguments(void (*kernel)(A...), std::index_sequence<I...>) {
  return [kernel](void* const* values) { kernel(*static_cast<std::remove_const_t<A>*>(values[I])...); };
}
template <class... A> Kernel callable(void (*kernel)(A...)) {
  return with_arguments(kernel, std::index_sequence_for<A...>{});
}

#define DSPARK_NAMED(name) {#name, callable(name)}
#define DSPARK_NAMED_OF(suffix)                                                                                    \
  DSPARK_NAMED(dspark_verify_tree_##suffix), DSPARK_NAMED(dspark_verify_chain_##suffix),                           \
      DSPARK_NAMED(dspark_walk_tree_##suffix), DSPARK_NAMED(dspark_walk_chain_##suffix),                           \
      DSPARK_NAMED(dspark_draft_mix_##suffix), DSPARK_NAMED(dspark_draft_step_##suffix),                           \
      DSPARK_NAMED(dspark_draft_finish_##suffix)

const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> found{
      DSPARK_NAMED_OF(f32), DSPARK_NAMED_OF(f16), DSPARK_NAMED_OF(bf16), DSPARK_NAMED(dspark_draft_draw),
      DSPARK_NAMED(dspark_compact_cache_table_16), DSPARK_NAMED(dspark_compact_cache_table_1)};
  return found;
}

}  // namespace

extern "C" {

int32_t emulation_launch(const char* kernel, const uint32_t* grid, uint32_t threads, void* const* values) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) return 1;
  emulation::launch(dim3(grid[0], grid[1], grid[2]), dim3(threads), [&] { found->second(values); });
  return 0;
}

int64_t emulation_verify_workspace(int64_t batch, int64_t rows) { return verify_workspace_bytes(batch, rows); }
int64_t emulation_draft_workspace(int64_t batch, int64_t drafts, int64_t rank) {
  return draft_workspace_bytes(batch, drafts, rank, kMaxTiles);
}
int64_t emulation_cache_table() { return sizeof(CacheTensors); }

}  // extern "C"
