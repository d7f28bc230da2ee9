// What TensorRT looks for in a plugin library: IPluginRegistry::loadLibrary, trtexec and Triton call these two.
#include "plugins.h"

#if defined(_WIN32)
#define DSPARK_EXPORT extern "C" __declspec(dllexport)
#else
#define DSPARK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

DSPARK_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { dspark::trt::set_logger_finder(finder); }

DSPARK_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static dspark::trt::Creator<dspark::trt::VerifyTree> tree;
  static dspark::trt::Creator<dspark::trt::VerifyChain> chain;
  static dspark::trt::Creator<dspark::trt::DraftBlock> block;
  static dspark::trt::Creator<dspark::trt::CompactCache> compact;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&tree, &chain, &block, &compact};
  count = static_cast<int32_t>(sizeof(creators) / sizeof(creators[0]));
  return creators;
}
