// CompactCache.
#include <stdexcept>

#include "dspark/kernels.h"
#include "plugins.h"

namespace dspark::trt {

namespace {

enum : int { kPath, kAccepted, kStarts, kFirstCache };  // inputs

int64_t bytes_of(DataType type) { return type == DataType::kFLOAT ? 4 : 2; }

int64_t volume(const nvinfer1::Dims& dims) {
  int64_t product = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) product *= dims.d[i];
  return product;
}

}  // namespace

CompactCache::CompactCache(std::vector<Attribute> attributes) : Plugin(kName, std::move(attributes)) {
  if (attribute(0) < 1 || attribute(0) > kMaxCacheTensors)
    throw std::invalid_argument("caches=" + std::to_string(attribute(0)) + "; give 1 to " +
                                std::to_string(kMaxCacheTensors));
}

nvinfer1::IPluginV3* CompactCache::clone() noexcept {
  try {
    return new CompactCache(*this);
  } catch (const std::exception& error) {
    log_error(std::string(kName) + ": " + error.what());
    return nullptr;
  }
}

int32_t CompactCache::getAliasedInput(int32_t output) noexcept { return kFirstCache + output; }

std::vector<Element> CompactCache::inputs() const {
  std::vector<Element> kinds(static_cast<size_t>(kFirstCache + attribute(0)), Element::kSame);
  kinds[kPath] = kinds[kAccepted] = kinds[kStarts] = Element::kInt64;
  return kinds;
}

std::vector<Element> CompactCache::outputs() const {
  return std::vector<Element>(static_cast<size_t>(attribute(0)), Element::kSame);
}

int32_t CompactCache::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t, const nvinfer1::DimsExprs*, int32_t,
                                      nvinfer1::DimsExprs* out, int32_t output_count,
                                      nvinfer1::IExprBuilder&) noexcept {
  for (int32_t i = 0; i < output_count; ++i) out[i] = in[kFirstCache + i];
  return 0;
}

std::string CompactCache::problem(const nvinfer1::Dims* dims) const {
  if (dims[kPath].nbDims != 2) return "path has two dimensions: [batch, rows]";
  if (dims[kPath].d[0] > kMaxBatch || dims[kPath].d[1] > kMaxVerifyRows)
    return "a path of " + std::to_string(dims[kPath].d[0]) + " sequences and " + std::to_string(dims[kPath].d[1]) +
           " rows is more than the " + std::to_string(kMaxBatch) + " and " + std::to_string(kMaxVerifyRows) +
           " it takes; build the engine without plugins";
  for (int32_t i = 0; i < attribute(0); ++i) {
    const nvinfer1::Dims& cache = dims[kFirstCache + i];
    if (cache.nbDims != 4) return "a cache has four dimensions: [batch, heads, capacity, head_dim]";
    if (cache.d[2] != dims[kFirstCache].d[2]) return "all caches have the same capacity";
  }
  return "";
}

int64_t CompactCache::workspace(const nvinfer1::Dims*) const { return 0; }

int32_t CompactCache::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                              const void* const* inputs, void* const* outputs, void*,
                              cudaStream_t stream) noexcept {
  const int32_t count = attribute(0);
  const int batch = static_cast<int>(in[kPath].dims.d[0]), rows = static_cast<int>(in[kPath].dims.d[1]);
  if (batch == 0 || rows == 0) return 0;
  const int64_t element = bytes_of(in[kFirstCache].type);
  CacheTensors tensors{};
  tensors.count = count;
  bool wide = true;
  for (int32_t i = 0; i < count; ++i) {
    const nvinfer1::Dims& dims = in[kFirstCache + i].dims;
    wide = wide && dims.d[3] * element % 16 == 0 && reinterpret_cast<uintptr_t>(outputs[i]) % 16 == 0;
  }
  for (int32_t i = 0; i < count; ++i) {
    const nvinfer1::Dims& dims = in[kFirstCache + i].dims;
    // Without aliasing (a preview feature) TensorRT gives the output a buffer of its own.
    if (outputs[i] != inputs[kFirstCache + i]) {
      const size_t bytes = static_cast<size_t>(volume(dims) * element);
      const cudaError_t copied =
          cudaMemcpyAsync(outputs[i], inputs[kFirstCache + i], bytes, cudaMemcpyDeviceToDevice, stream);
      if (const int32_t failed = reported(copied)) return failed;
    }
    tensors.items[i] = {outputs[i], static_cast<int32_t>(dims.d[1]),
                        static_cast<int32_t>(dims.d[3] * element / (wide ? 16 : 1))};
  }
  const auto numbers = [&](int index) { return static_cast<const int64_t*>(inputs[index]); };
  return reported(launch_compact_cache(tensors, wide, numbers(kPath), numbers(kAccepted), numbers(kStarts), batch, rows,
                                       static_cast<int>(in[kFirstCache].dims.d[2]), stream));
}

}  // namespace dspark::trt
