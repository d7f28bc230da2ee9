#include "log.h"

#include <mutex>

namespace dspark::trt {

namespace {

std::mutex guard;
nvinfer1::ILoggerFinder* logger_finder = nullptr;

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  const std::lock_guard<std::mutex> lock(guard);
  logger_finder = finder;
}

void log_error(const std::string& message) noexcept {
  const std::lock_guard<std::mutex> lock(guard);
  if (logger_finder == nullptr) return;
  if (nvinfer1::ILogger* const logger = logger_finder->findLogger())
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

}  // namespace dspark::trt
