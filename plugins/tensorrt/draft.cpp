// DraftBlock.
#include <stdexcept>

#include "dspark/kernels.h"
#include "plugins.h"

namespace dspark::trt {

namespace {

enum : int { kBaseLogits, kHiddenRows, kAnchors, kTemperature, kUniforms };  // inputs that are always there
enum : size_t { kKind, kConfidence, kMapped };                               // attributes

}  // namespace

DraftBlock::DraftBlock(std::vector<Attribute> attributes) : Plugin(kName, std::move(attributes)) {
  const int32_t most[] = {3, 2, 1};
  for (size_t i = 0; i < 3; ++i)
    if (attribute(i) < 0 || attribute(i) > most[i])
      throw std::invalid_argument(std::string(attribute_names()[i]) + "=" + std::to_string(attribute(i)) +
                                  "; give 0 to " + std::to_string(most[i]));
}

nvinfer1::IPluginV3* DraftBlock::clone() noexcept {
  try {
    return new DraftBlock(*this);
  } catch (const std::exception& error) {
    log_error(std::string(kName) + ": " + error.what());
    return nullptr;
  }
}

DraftBlock::Inputs DraftBlock::indices() const {
  Inputs at;
  const bool mixes = attribute(kKind) > static_cast<int32_t>(MarkovKind::kVanilla);
  if (attribute(kKind) > 0 || attribute(kConfidence) == 2) at.w1 = at.count++;
  if (attribute(kKind) > 0) at.w2 = at.count++;
  if (mixes) at.mix = at.count++;
  if (mixes) at.mix_bias = at.count++;
  if (attribute(kConfidence) > 0) at.confidence = at.count++;
  if (attribute(kConfidence) > 0) at.confidence_bias = at.count++;
  if (attribute(kMapped) > 0) at.token_map = at.count++;
  return at;
}

std::vector<Element> DraftBlock::inputs() const {
  const Inputs at = indices();
  std::vector<Element> kinds(static_cast<size_t>(at.count), Element::kSame);
  kinds[kAnchors] = Element::kInt64;
  kinds[kTemperature] = kinds[kUniforms] = Element::kFloat32;
  if (at.token_map >= 0) kinds[static_cast<size_t>(at.token_map)] = Element::kInt64;
  return kinds;
}

std::vector<Element> DraftBlock::outputs() const {
  std::vector<Element> kinds{Element::kInt64, Element::kFloat32};
  if (attribute(kConfidence) > 0) kinds.push_back(Element::kFloat32);
  return kinds;
}

int32_t DraftBlock::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t, const nvinfer1::DimsExprs*, int32_t,
                                    nvinfer1::DimsExprs* out, int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  out[0] = in[kUniforms];
  out[1] = in[kBaseLogits];
  if (output_count > 2) out[2] = in[kUniforms];
  return 0;
}

DraftSizes DraftBlock::sizes(const nvinfer1::Dims* dims) const {
  const Inputs at = indices();
  DraftSizes found{};
  found.batch = static_cast<int>(dims[kBaseLogits].d[0]);
  found.drafts = static_cast<int>(dims[kBaseLogits].d[1]);
  found.vocab = static_cast<int>(dims[kBaseLogits].d[2]);
  found.hidden = static_cast<int>(dims[kHiddenRows].d[2]);
  found.kind = attribute(kKind);
  found.confidence_uses_token = attribute(kConfidence) == 2;
  if (at.w1 >= 0) {
    found.embeddings = static_cast<int>(dims[at.w1].d[0]);
    found.rank = static_cast<int>(dims[at.w1].d[1]);
  }
  return found;
}

std::string DraftBlock::problem(const nvinfer1::Dims* dims) const {
  if (dims[kBaseLogits].nbDims != 3 || dims[kHiddenRows].nbDims != 3)
    return "base logits and hidden rows have three dimensions: [batch, drafts, vocab] and [batch, drafts, hidden]";
  const DraftSizes found = sizes(dims);
  const auto above = [](const char* what, int64_t size, int64_t limit) {
    return size <= limit ? std::string()
                         : std::to_string(size) + " " + what + " are more than the " + std::to_string(limit) +
                               " it takes; build the engine without plugins";
  };
  for (const std::string& wrong :
       {above("sequences", found.batch, kMaxBatch), above("drafts", found.drafts, kMaxVerifyRows),
        above("tokens of the vocabulary", found.vocab, kMaxVocab),
        above("numbers in a Markov row", found.rank, kMaxRank)})
    if (!wrong.empty()) return wrong;
  return "";
}

int64_t DraftBlock::workspace(const nvinfer1::Dims* dims) const { return draft_workspace(sizes(dims)); }

int32_t DraftBlock::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                            const void* const* inputs, void* const* outputs, void* workspace,
                            cudaStream_t stream) noexcept {
  const Inputs at = indices();
  const auto optional = [&](int index) { return index < 0 ? nullptr : inputs[index]; };
  std::vector<nvinfer1::Dims> dims;
  for (int i = 0; i < at.count; ++i) dims.push_back(in[i].dims);
  const DraftSizes found = sizes(dims.data());
  if (found.batch == 0 || found.drafts == 0) return 0;
  DraftTensors tensors{};
  tensors.base_logits = inputs[kBaseLogits];
  tensors.hidden_rows = inputs[kHiddenRows];
  tensors.anchors = static_cast<const int64_t*>(inputs[kAnchors]);
  tensors.temperature = static_cast<const float*>(inputs[kTemperature]);
  tensors.uniforms = static_cast<const float*>(inputs[kUniforms]);
  tensors.w1 = optional(at.w1);
  tensors.w2 = optional(at.w2);
  tensors.mix = optional(at.mix);
  tensors.mix_bias = optional(at.mix_bias);
  tensors.confidence = optional(at.confidence);
  tensors.confidence_bias = optional(at.confidence_bias);
  tensors.token_map = static_cast<const int64_t*>(optional(at.token_map));
  tensors.tokens = static_cast<int64_t*>(outputs[0]);
  tensors.probs = static_cast<float*>(outputs[1]);
  tensors.confidences = at.confidence < 0 ? nullptr : static_cast<float*>(outputs[2]);
  return reported(
      launch_draft_block(logits_type(in[kBaseLogits].type), tensors, found, workspace, options(), stream));
}

}  // namespace dspark::trt
