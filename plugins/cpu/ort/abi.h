// The entries of ONNX Runtime's C table that the operators use, by place. The table only grows, so a place never changes;
// version 17 of the interface has all of these.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;

constexpr uint32_t kOrtApiVersion = 17;

struct OrtApi {
  void* entry[320];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Null where a default serves.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, void*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

namespace dspark::ort {

enum Type : int { Any = 0, Float32 = 1, Uint8 = 2, Int64 = 7, Bool = 9, Float16 = 10, BFloat16 = 16 };

template <int Place, class Result, class... Given>
Result entry(const OrtApi* api, Given... given) {
  return reinterpret_cast<Result (*)(Given...)>(api->entry[Place])(given...);
}

inline OrtStatus* create_status(const OrtApi* api, int code, const char* text) { return entry<0, OrtStatus*>(api, code, text); }
inline void release_status(const OrtApi* api, OrtStatus* s) { entry<93, void>(api, s); }
inline OrtStatus* create_domain(const OrtApi* api, const char* name, OrtCustomOpDomain** out) { return entry<26, OrtStatus*>(api, name, out); }
inline OrtStatus* add_operator(const OrtApi* api, OrtCustomOpDomain* d, const OrtCustomOp* op) { return entry<27, OrtStatus*>(api, d, op); }
inline OrtStatus* add_domain(const OrtApi* api, OrtSessionOptions* o, OrtCustomOpDomain* d) { return entry<28, OrtStatus*>(api, o, d); }
inline OrtStatus* tensor_data(const OrtApi* api, OrtValue* v, void** out) { return entry<51, OrtStatus*>(api, v, out); }
inline OrtStatus* element_type(const OrtApi* api, const OrtTensorTypeAndShapeInfo* i, int* out) { return entry<60, OrtStatus*>(api, i, out); }
inline OrtStatus* dimension_count(const OrtApi* api, const OrtTensorTypeAndShapeInfo* i, size_t* out) { return entry<61, OrtStatus*>(api, i, out); }
inline OrtStatus* dimensions(const OrtApi* api, const OrtTensorTypeAndShapeInfo* i, int64_t* out, size_t n) { return entry<62, OrtStatus*>(api, i, out, n); }
inline OrtStatus* type_and_shape(const OrtApi* api, const OrtValue* v, OrtTensorTypeAndShapeInfo** out) { return entry<65, OrtStatus*>(api, v, out); }
inline void release_type_and_shape(const OrtApi* api, OrtTensorTypeAndShapeInfo* i) { entry<99, void>(api, i); }
inline OrtStatus* attribute_float(const OrtApi* api, const OrtKernelInfo* i, const char* name, float* out) { return entry<85, OrtStatus*>(api, i, name, out); }
inline OrtStatus* attribute_int(const OrtApi* api, const OrtKernelInfo* i, const char* name, int64_t* out) { return entry<86, OrtStatus*>(api, i, name, out); }
inline OrtStatus* input_value(const OrtApi* api, const OrtKernelContext* c, size_t i, const OrtValue** out) { return entry<90, OrtStatus*>(api, c, i, out); }
inline OrtStatus* output_value(const OrtApi* api, OrtKernelContext* c, size_t i, const int64_t* d, size_t n, OrtValue** out) {
  return entry<91, OrtStatus*>(api, c, i, d, n, out);
}
inline OrtStatus* parallel_for(const OrtApi* api, const OrtKernelContext* c, void (*f)(void*, size_t), size_t total, size_t batches, void* data) {
  return entry<274, OrtStatus*>(api, c, f, total, batches, data);
}

}  // namespace dspark::ort
