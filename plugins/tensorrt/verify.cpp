// VerifyTree and VerifyChain.
#include "dspark/kernels.h"
#include "plugins.h"

namespace dspark::trt {

namespace {

template <class P> nvinfer1::IPluginV3* copy_of(const P& plugin) noexcept {
  try {
    return new P(plugin);
  } catch (const std::exception& error) {
    log_error(std::string(P::kName) + ": " + error.what());
    return nullptr;
  }
}

// Both: path and emitted [batch, rows], accepted [batch], after tokens [batch, rows] at input 1.
int32_t verdict_shapes(const nvinfer1::DimsExprs& tokens, nvinfer1::DimsExprs* out) {
  out[0] = out[1] = tokens;
  out[2].nbDims = 1;
  out[2].d[0] = tokens.d[0];
  return 0;
}

VerifySizes sizes_of(const nvinfer1::Dims& logits) {
  return {static_cast<int>(logits.d[0]), static_cast<int>(logits.d[1]), static_cast<int>(logits.d[2])};
}

std::string wrong_sizes(const nvinfer1::Dims& logits) {
  if (logits.nbDims != 3)
    return "logits have " + std::to_string(logits.nbDims) + " dimensions; give [batch, rows, vocab]";
  const int64_t limits[] = {kMaxBatch, kMaxVerifyRows, kMaxVocab};
  const char* const names[] = {"sequences", "rows", "tokens of the vocabulary"};
  for (int i = 0; i < 3; ++i)
    if (logits.d[i] > limits[i])
      return std::to_string(logits.d[i]) + " " + names[i] + " are more than the " + std::to_string(limits[i]) +
             " it takes; build the engine with smaller profiles or without plugins";
  return "";
}

SamplingTensors sampling_of(const void* const* inputs) {
  return {static_cast<const float*>(inputs[0]), static_cast<const int64_t*>(inputs[1]),
          static_cast<const float*>(inputs[2]), static_cast<const float*>(inputs[3])};
}

VerdictTensors verdicts_of(void* const* outputs) {
  return {static_cast<int64_t*>(outputs[0]), static_cast<int64_t*>(outputs[1]), static_cast<int64_t*>(outputs[2])};
}

// TensorRT promises nothing about what a workspace holds.
cudaError_t cleared(void* workspace, const VerifySizes& sizes, cudaStream_t stream) {
  return cudaMemsetAsync(workspace, 0, static_cast<size_t>(verify_workspace(sizes)), stream);
}

}  // namespace

nvinfer1::IPluginV3* VerifyTree::clone() noexcept { return copy_of(*this); }

std::vector<Element> VerifyTree::inputs() const {
  return {Element::kSame,    Element::kInt64, Element::kBool,    Element::kFloat32,
          Element::kFloat32, Element::kInt64, Element::kFloat32, Element::kFloat32};
}

std::vector<Element> VerifyTree::outputs() const { return {Element::kInt64, Element::kInt64, Element::kInt64}; }

int32_t VerifyTree::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t, const nvinfer1::DimsExprs*, int32_t,
                                    nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder&) noexcept {
  return verdict_shapes(in[1], out);
}

std::string VerifyTree::problem(const nvinfer1::Dims* dims) const { return wrong_sizes(dims[0]); }

int64_t VerifyTree::workspace(const nvinfer1::Dims* dims) const { return verify_workspace(sizes_of(dims[0])); }

int32_t VerifyTree::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                            const void* const* inputs, void* const* outputs, void* workspace,
                            cudaStream_t stream) noexcept {
  const VerifySizes sizes = sizes_of(in[0].dims);
  if (sizes.batch == 0 || sizes.rows == 0) return 0;
  if (const int32_t failed = reported(cleared(workspace, sizes, stream))) return failed;
  const TreeTensors tensors{inputs[0], static_cast<const int64_t*>(inputs[1]), static_cast<const uint8_t*>(inputs[2]),
                            static_cast<const float*>(inputs[3])};
  return reported(launch_verify_tree(logits_type(in[0].type), tensors, sampling_of(inputs + 4), sizes,
                                     verdicts_of(outputs), workspace, options(), stream));
}

nvinfer1::IPluginV3* VerifyChain::clone() noexcept { return copy_of(*this); }

std::vector<Element> VerifyChain::inputs() const {
  return {Element::kSame,    Element::kInt64,   Element::kFloat32, Element::kInt64,   Element::kFloat32,
          Element::kFloat32, Element::kFloat32, Element::kInt64,   Element::kFloat32, Element::kFloat32};
}

std::vector<Element> VerifyChain::outputs() const { return {Element::kInt64, Element::kInt64, Element::kInt64}; }

int32_t VerifyChain::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t, const nvinfer1::DimsExprs*, int32_t,
                                     nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder&) noexcept {
  return verdict_shapes(in[1], out);
}

std::string VerifyChain::problem(const nvinfer1::Dims* dims) const { return wrong_sizes(dims[0]); }

int64_t VerifyChain::workspace(const nvinfer1::Dims* dims) const { return verify_workspace(sizes_of(dims[0])); }

int32_t VerifyChain::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                             const void* const* inputs, void* const* outputs, void* workspace,
                             cudaStream_t stream) noexcept {
  const VerifySizes sizes = sizes_of(in[0].dims);
  if (sizes.batch == 0 || sizes.rows == 0) return 0;
  if (const int32_t failed = reported(cleared(workspace, sizes, stream))) return failed;
  const ChainTensors tensors{inputs[0],
                             static_cast<const int64_t*>(inputs[1]),
                             static_cast<const float*>(inputs[2]),
                             static_cast<const int64_t*>(inputs[3]),
                             static_cast<const float*>(inputs[4]),
                             static_cast<const float*>(inputs[5])};
  return reported(launch_verify_chain(logits_type(in[0].type), tensors, sampling_of(inputs + 6), sizes,
                                      verdicts_of(outputs), workspace, options(), stream));
}

}  // namespace dspark::trt
