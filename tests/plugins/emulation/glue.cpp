// Takes a plugin through the calls TensorRT makes, with the kernels imitated: create, ask for formats, configure,
// serialize, create again, attach, enqueue.
#include <NvInferRuntime.h>

#include <cstring>
#include <string>
#include <vector>

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

// What of CUDA's runtime the glue calls. Device memory is host memory.
extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t count, cudaStream_t) {
  return std::memset(memory, value, count), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, count), cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an imitated error"; }
}

namespace {

using namespace nvinfer1;

std::string logged;

class Log final : public ILogger {
  void log(Severity, const AsciiChar* message) noexcept override { logged += std::string(message) + "\n"; }
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &log_; }

 private:
  Log log_;
};

IPluginCreatorV3One* creator_of(const std::string& name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* const creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (creator->getPluginName() == name) return creator;
  }
  return nullptr;
}

template <class T> T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

}  // namespace

extern "C" {

const char* glue_log() { return logged.c_str(); }

const char* glue_version(const char* name) {
  static std::string text;
  IPluginCreatorV3One* const creator = creator_of(name);
  text = creator ? std::string(creator->getPluginNamespace()) + "::" + name + " " + creator->getPluginVersion() : "";
  return text.c_str();
}

// `dims` has 8 numbers a tensor, `ranks` how many count; inputs first. `wide` gives attributes as int64, as some parsers
// do. Returns 0, or the number of the step that failed.
int32_t glue_run(const char* name, int32_t attributes, const char* const* attribute_names, const int32_t* values,
                 int32_t wide, int32_t inputs, int32_t outputs, const int32_t* types, const int32_t* ranks,
                 const int64_t* dims, const void* const* in, void* const* out) {
  static Finder finder;
  setLoggerFinder(&finder);
  logged.clear();
  IPluginCreatorV3One* const creator = creator_of(name);
  if (!creator || creator->getFieldNames()->nbFields != attributes) return 1;
  std::vector<int64_t> wide_values(values, values + attributes);
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < attributes; ++i) {
    const void* const data = wide ? static_cast<const void*>(&wide_values[i]) : &values[i];
    fields.emplace_back(attribute_names[i], data, wide ? PluginFieldType::kINT64 : PluginFieldType::kINT32, 1);
  }
  PluginFieldCollection collection{};
  collection.nbFields = attributes;
  collection.fields = fields.data();
  IPluginV3* const built = creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
  if (!built) return 2;
  IPluginV3* const copy = built->clone();
  delete built;

  std::vector<DynamicPluginTensorDesc> tensors(static_cast<size_t>(inputs + outputs));
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    DynamicPluginTensorDesc& tensor = tensors[static_cast<size_t>(i)];
    tensor.desc.dims.nbDims = ranks[i];
    for (int32_t j = 0; j < ranks[i]; ++j) tensor.desc.dims.d[j] = dims[8 * i + j];
    tensor.min = tensor.max = tensor.opt = tensor.desc.dims;
    tensor.desc.type = static_cast<DataType>(types[i]);
    tensor.desc.format = TensorFormat::kLINEAR;
  }
  auto* const build = capability<IPluginV3OneBuild>(copy, PluginCapabilityType::kBUILD);
  if (build->getNbOutputs() != outputs) return 3;
  for (int32_t i = 0; i < inputs + outputs; ++i)
    if (!build->supportsFormatCombination(i, tensors.data(), inputs, outputs)) return 100 + i;
  std::vector<DataType> input_types, output_types(static_cast<size_t>(outputs));
  for (int32_t i = 0; i < inputs; ++i) input_types.push_back(static_cast<DataType>(types[i]));
  if (build->getOutputDataTypes(output_types.data(), outputs, input_types.data(), inputs)) return 4;
  for (int32_t i = 0; i < outputs; ++i)
    if (output_types[static_cast<size_t>(i)] != static_cast<DataType>(types[inputs + i])) return 200 + i;
  const DynamicPluginTensorDesc* const first_output = tensors.data() + inputs;
  if (build->configurePlugin(tensors.data(), inputs, first_output, outputs)) return 5;
  const size_t bytes = build->getWorkspaceSize(tensors.data(), inputs, first_output, outputs);

  auto* const to_serialize = capability<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
  IPluginV3* const loaded =
      creator->createPlugin("node", to_serialize->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  delete copy;
  if (!loaded) return 6;
  IPluginV3* const attached =
      capability<IPluginV3OneRuntime>(loaded, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  delete loaded;
  auto* const runtime = capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> descs;
  for (const DynamicPluginTensorDesc& tensor : tensors) descs.push_back(tensor.desc);
  if (runtime->onShapeChange(descs.data(), inputs, descs.data() + inputs, outputs)) return 7;
  std::vector<char> workspace(bytes, '\x55');
  const int32_t failed =
      runtime->enqueue(descs.data(), descs.data() + inputs, in, out, workspace.data(), nullptr) ? 8 : 0;
  delete attached;
  return failed;
}

}  // extern "C"
