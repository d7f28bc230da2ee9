// The four plugins; inputs, outputs and attributes are those of docs/plugins.md.
#pragma once

#include "plugin.h"

namespace dspark::trt {

class VerifyTree final : public Plugin<nvinfer1::IPluginV3OneBuild> {
 public:
  static constexpr const char* kName = "VerifyTree";
  static std::vector<const char*> attribute_names() { return {}; }

  explicit VerifyTree(std::vector<Attribute> attributes) : Plugin(kName, std::move(attributes)) {}

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  std::vector<Element> inputs() const override;
  std::vector<Element> outputs() const override;
  std::string problem(const nvinfer1::Dims* dims) const override;
  int64_t workspace(const nvinfer1::Dims* dims) const override;
};

class VerifyChain final : public Plugin<nvinfer1::IPluginV3OneBuild> {
 public:
  static constexpr const char* kName = "VerifyChain";
  static std::vector<const char*> attribute_names() { return {}; }

  explicit VerifyChain(std::vector<Attribute> attributes) : Plugin(kName, std::move(attributes)) {}

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  std::vector<Element> inputs() const override;
  std::vector<Element> outputs() const override;
  std::string problem(const nvinfer1::Dims* dims) const override;
  int64_t workspace(const nvinfer1::Dims* dims) const override;
};

// Attributes: kind (0 none, 1 vanilla, 2 gated, 3 rnn), confidence (0 none, 1 reads the hidden row, 2 the token's row
// too), mapped (1: the draft has a vocabulary of its own).
class DraftBlock final : public Plugin<nvinfer1::IPluginV3OneBuild> {
 public:
  static constexpr const char* kName = "DraftBlock";
  static std::vector<const char*> attribute_names() { return {"kind", "confidence", "mapped"}; }

  // Throws std::invalid_argument for a value outside its range.
  explicit DraftBlock(std::vector<Attribute> attributes);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  std::vector<Element> inputs() const override;
  std::vector<Element> outputs() const override;
  std::string problem(const nvinfer1::Dims* dims) const override;
  int64_t workspace(const nvinfer1::Dims* dims) const override;

 private:
  // Index of each optional input, -1 where there is none.
  struct Inputs {
    int w1 = -1, w2 = -1, mix = -1, mix_bias = -1, confidence = -1, confidence_bias = -1, token_map = -1, count = 5;
  };
  Inputs indices() const;
  DraftSizes sizes(const nvinfer1::Dims* dims) const;
};

// Attribute: caches, the number of cache tensors.
class CompactCache final : public Plugin<nvinfer1::IPluginV3OneBuildV2> {
 public:
  static constexpr const char* kName = "CompactCache";
  static std::vector<const char*> attribute_names() { return {"caches"}; }

  // Throws std::invalid_argument for a value outside its range.
  explicit CompactCache(std::vector<Attribute> attributes);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t input_count, const nvinfer1::DimsExprs* shapes,
                          int32_t shape_count, nvinfer1::DimsExprs* out, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  std::vector<Element> inputs() const override;
  std::vector<Element> outputs() const override;
  std::string problem(const nvinfer1::Dims* dims) const override;
  int64_t workspace(const nvinfer1::Dims* dims) const override;
};

}  // namespace dspark::trt
