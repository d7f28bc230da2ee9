// What the plugins have in common: names, types of tensors, attributes, cloning, and a creator.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "dspark/launch.h"
#include "dspark/version.h"
#include "log.h"

namespace dspark::trt {

using nvinfer1::DataType;

// What a tensor may hold: kSame is float32, float16 or bfloat16, the same for all tensors of the plugin marked so.
enum class Element { kSame, kFloat32, kInt64, kBool };

// A whole-number attribute: its name, and its value in one plugin.
struct Attribute {
  const char* name;
  int32_t value;
};

inline DType logits_type(DataType type) {
  return type == DataType::kHALF ? DType::kFloat16 : type == DataType::kBF16 ? DType::kBFloat16 : DType::kFloat32;
}

inline bool is_element(DataType type, Element element) {
  switch (element) {
    case Element::kFloat32: return type == DataType::kFLOAT;
    case Element::kInt64: return type == DataType::kINT64;
    case Element::kBool: return type == DataType::kBOOL;
    case Element::kSame: break;
  }
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// Build is IPluginV3OneBuild, or IPluginV3OneBuildV2 for a plugin whose outputs are its inputs.
template <class Build>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public Build,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const char* name, std::vector<Attribute> attributes) : name_(name), attributes_(std::move(attributes)) {}
  Plugin(const Plugin& other) : Plugin(other.name_, other.attributes_) { processors_ = other.processors_; }

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<Build*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  const char* getPluginName() const noexcept final { return name_; }
  const char* getPluginVersion() const noexcept final { return DSPARK_PLUGIN_VERSION; }
  const char* getPluginNamespace() const noexcept final { return DSPARK_PLUGIN_NAMESPACE; }

  int32_t getNbOutputs() const noexcept final { return static_cast<int32_t>(outputs().size()); }

  int32_t getOutputDataTypes(DataType* types, int32_t count, const DataType* input_types,
                             int32_t input_count) const noexcept final {
    const std::vector<Element> kinds = outputs();
    if (!counts_fit(input_count, count)) return 1;
    for (int32_t i = 0; i < count; ++i) {
      const Element kind = kinds[static_cast<size_t>(i)];
      types[i] = kind == Element::kInt64 ? DataType::kINT64
                 : kind == Element::kSame ? input_types[first_same()]
                                          : DataType::kFLOAT;
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t input_count,
                                 int32_t output_count) noexcept final {
    if (!counts_fit(input_count, output_count)) return false;
    std::vector<Element> kinds = inputs();
    for (const Element kind : outputs()) kinds.push_back(kind);
    const nvinfer1::PluginTensorDesc& tensor = tensors[pos].desc;
    const Element kind = kinds[static_cast<size_t>(pos)];
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR || !is_element(tensor.type, kind)) return false;
    return kind != Element::kSame || pos <= first_same() || tensor.type == tensors[first_same()].desc.type;
  }

  // Checks the largest sizes of a profile, so that a network out of bounds fails when it is built.
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t output_count) noexcept final {
    if (!counts_fit(input_count, output_count)) return 1;
    std::vector<nvinfer1::Dims> largest;
    for (int32_t i = 0; i < input_count; ++i) largest.push_back(in[i].max);
    return refused(problem(largest.data()));
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t input_count, const nvinfer1::PluginTensorDesc*,
                        int32_t output_count) noexcept final {
    if (!counts_fit(input_count, output_count)) return 1;
    std::vector<nvinfer1::Dims> sizes;
    for (int32_t i = 0; i < input_count; ++i) sizes.push_back(in[i].dims);
    return refused(problem(sizes.data()));
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept final {
    std::vector<nvinfer1::Dims> largest;
    for (int32_t i = 0; i < input_count; ++i) largest.push_back(in[i].max);
    return static_cast<size_t>(workspace(largest.data()));
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final {
    nvinfer1::IPluginV3* const copy = this->clone();
    if (copy) static_cast<Plugin*>(copy)->find_processors();
    return copy;
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final {
    fields_.clear();
    for (const Attribute& attribute : attributes_)
      fields_.emplace_back(attribute.name, &attribute.value, nvinfer1::PluginFieldType::kINT32, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    return &collection_;
  }

  // Attributes decide how a plugin is timed; shapes and types are part of the key anyway.
  const char* getTimingCacheID() noexcept final {
    timing_id_ = name_;
    for (const Attribute& attribute : attributes_) timing_id_ += "," + std::to_string(attribute.value);
    return timing_id_.c_str();
  }

 protected:
  virtual std::vector<Element> inputs() const = 0;
  virtual std::vector<Element> outputs() const = 0;

  // What is wrong with these dimensions of the inputs; empty if nothing.
  virtual std::string problem(const nvinfer1::Dims* dims) const = 0;

  // Bytes of workspace for these dimensions of the inputs.
  virtual int64_t workspace(const nvinfer1::Dims* dims) const = 0;

  int32_t attribute(size_t index) const { return attributes_[index].value; }

  LaunchOptions options() {
    if (processors_ == 0) find_processors();
    return {processors_, 0};
  }

  int32_t reported(cudaError_t error) const noexcept {
    if (error == cudaSuccess) return 0;
    log_error(std::string(name_) + ": " + cudaGetErrorString(error));
    return 1;
  }

 private:
  bool counts_fit(int32_t input_count, int32_t output_count) const noexcept {
    const size_t wanted_inputs = inputs().size(), wanted_outputs = outputs().size();
    if (static_cast<size_t>(input_count) == wanted_inputs && static_cast<size_t>(output_count) == wanted_outputs)
      return true;
    refused("given " + std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
            " outputs, but with these attributes there are " + std::to_string(wanted_inputs) + " and " +
            std::to_string(wanted_outputs));
    return false;
  }

  int32_t refused(const std::string& why) const noexcept {
    if (why.empty()) return 0;
    log_error(std::string(name_) + ": " + why);
    return 1;
  }

  int32_t first_same() const {
    const std::vector<Element> kinds = inputs();
    int32_t i = 0;
    while (kinds[static_cast<size_t>(i)] != Element::kSame) ++i;
    return i;
  }

  void find_processors() noexcept {
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
      reported(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
  }

  const char* name_;
  std::vector<Attribute> attributes_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::string timing_id_;
  int processors_ = 0;
};

// Creates plugins of type P, which has kName, the names of its attributes in attribute_names(), and a constructor that
// takes their values.
template <class P> class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const char* const name : P::attribute_names())
      fields_.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  const char* getPluginName() const noexcept override { return P::kName; }
  const char* getPluginVersion() const noexcept override { return DSPARK_PLUGIN_VERSION; }
  const char* getPluginNamespace() const noexcept override { return DSPARK_PLUGIN_NAMESPACE; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    try {
      std::vector<Attribute> attributes;
      for (const char* const name : P::attribute_names()) {
        const nvinfer1::PluginField* const field = find(given, name);
        if (field == nullptr) {
          log_error(std::string(P::kName) + ": needs the whole-number attribute '" + name + "'");
          return nullptr;
        }
        const bool wide = field->type == nvinfer1::PluginFieldType::kINT64;
        attributes.push_back({name, wide ? static_cast<int32_t>(*static_cast<const int64_t*>(field->data))
                                         : *static_cast<const int32_t*>(field->data)});
      }
      return new P(std::move(attributes));
    } catch (const std::exception& error) {
      log_error(std::string(P::kName) + ": " + error.what());
      return nullptr;
    }
  }

 private:
  static const nvinfer1::PluginField* find(const nvinfer1::PluginFieldCollection* given, const std::string& name) {
    for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
      const nvinfer1::PluginField& field = given->fields[i];
      const bool whole =
          field.type == nvinfer1::PluginFieldType::kINT32 || field.type == nvinfer1::PluginFieldType::kINT64;
      if (field.name == name && field.data != nullptr && field.length >= 1 && whole) return &field;
    }
    return nullptr;
  }

  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace dspark::trt
