// Messages to the logger TensorRT hands a plugin library.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace dspark::trt {

// Before the first call, and where TensorRT gives no logger, messages are dropped.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

void log_error(const std::string& message) noexcept;

}  // namespace dspark::trt
