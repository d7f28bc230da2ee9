#include "operator.h"

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace dspark::ort {
namespace {

std::string type_name(int type) {
  switch (type) {
    case Float32: return "float32";
    case Uint8: return "uint8";
    case Int64: return "int64";
    case Bool: return "bool";
    case Float16: return "float16";
    case BFloat16: return "bfloat16";
    default: return "type " + std::to_string(type);
  }
}

void check(OrtStatus* status) {
  if (status) throw Failure{status};
}

struct Release {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};
struct Kept {
  std::unique_ptr<char, Release> block;
  size_t bytes = 0;
};

}  // namespace

Shape::Shape(std::initializer_list<int64_t> given) : rank(static_cast<int>(given.size())) { std::copy(given.begin(), given.end(), dims); }

int64_t Shape::size(int from) const {
  int64_t n = 1;
  for (int i = from; i < rank; i++) n *= dims[i];
  return n;
}

bool Shape::operator==(const Shape& other) const { return rank == other.rank && std::equal(dims, dims + rank, other.dims); }

std::string Shape::text() const {
  std::string s = "[";
  for (int i = 0; i < rank; i++) s += (i ? ", " : "") + std::to_string(dims[i]);
  return s + "]";
}

std::string Tensor::text() const { return name + " " + type_name(type) + " " + shape.text(); }

Tensor Call::input(size_t i, const char* name) const {
  Tensor t;
  t.name = name;
  const OrtValue* value = nullptr;
  check(input_value(api_, context_, i, &value));
  need(value != nullptr, t.name + " is missing");
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(type_and_shape(api_, value, &info));
  size_t rank = 0;
  OrtStatus* status = element_type(api_, info, &t.type);
  if (!status) status = dimension_count(api_, info, &rank);
  if (!status && rank <= kMaxRank) status = dimensions(api_, info, t.shape.dims, rank);
  release_type_and_shape(api_, info);
  check(status);
  need(rank <= kMaxRank, t.name + " has " + std::to_string(rank) + " dimensions; at most 8 are supported");
  t.shape.rank = static_cast<int>(rank);
  check(tensor_data(api_, const_cast<OrtValue*>(value), &t.data));
  return t;
}

void* Call::output(size_t i, const Shape& shape) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(output_value(api_, context_, i, shape.dims, static_cast<size_t>(shape.rank), &value));
  need(value != nullptr, "output " + std::to_string(i) + " is missing");
  check(tensor_data(api_, value, &data));
  return data;
}

void Call::run(size_t count, void (*f)(void*, size_t), void* data) const { check(parallel_for(api_, context_, f, count, 0, data)); }

int64_t Attributes::integer(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  OrtStatus* status = attribute_int(api_, info_, name, &value);
  if (!status) return value;
  release_status(api_, status);
  return otherwise;
}

float Attributes::real(const char* name, float otherwise) const {
  float value = 0;
  OrtStatus* status = attribute_float(api_, info_, name, &value);
  if (!status) return value;
  release_status(api_, status);
  return otherwise;
}

int64_t Attributes::integer(const char* name) const {
  const int64_t value = integer(name, INT64_MIN);
  need(value != INT64_MIN, std::string("the attribute ") + name + " (int) is missing");
  return value;
}

float Attributes::real(const char* name) const {
  float value = 0;
  OrtStatus* status = attribute_float(api_, info_, name, &value);
  if (status) release_status(api_, status);
  need(!status, std::string("the attribute ") + name + " (float) is missing");
  return value;
}

void refuse(const std::string& text) { throw Refusal{text}; }

void* memory(Memory which, size_t bytes) {
  thread_local Kept kept[2];
  Kept& mine = kept[which == Memory::Task];
  if (mine.bytes < bytes) {
    mine.block.reset();
    mine.bytes = 0;
    mine.block.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    mine.bytes = bytes;
  }
  return mine.block.get();
}

int64_t tasks_for(int64_t work, int64_t limit) {
  static const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  // A task is worth a thread's attention from some microseconds on; more than a few for each thread only cost.
  return std::max<int64_t>(1, std::min({work / 5000, 4 * threads, limit}));
}

}  // namespace dspark::ort
