// What an operator sees of ONNX Runtime: tensors, attributes, threads and refusals. Code behind this may throw; a refusal or
// lack of memory becomes a status where it would leave for ONNX Runtime.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../kernels.h"
#include "abi.h"

namespace dspark::ort {

struct Refusal {
  std::string text;
};

struct Failure {  // a status of ONNX Runtime's own, passed on
  OrtStatus* status;
};

constexpr int kMaxRank = 8;

struct Shape {
  int rank = 0;
  int64_t dims[kMaxRank] = {};

  Shape() = default;
  Shape(std::initializer_list<int64_t> given);
  int64_t operator[](int i) const { return dims[i]; }
  int64_t size(int from = 0) const;  // product of the dimensions from that one on
  bool operator==(const Shape& other) const;
  std::string text() const;          // "[2, 3]"
};

struct Tensor {
  std::string name;
  int type = Any;
  Shape shape;
  void* data = nullptr;

  template <class T>
  const T* as() const { return static_cast<const T*>(data); }
  std::string text() const;          // "weight uint8 [2, 3]"
};

class Call {
 public:
  Call(const OrtApi* api, OrtKernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t i, const char* name) const;
  void* output(size_t i, const Shape& shape) const;

  // f(0) .. f(count - 1) on the session's threads; in this one where there is but one.
  template <class Function>
  void parallel(int64_t count, const Function& f) const {
    if (count == 1) return f(0);
    if (count <= 0) return;
    struct Shared {
      const Function& f;
      std::atomic<bool> out_of_memory{false};
    } shared{f};
    run(static_cast<size_t>(count), [](void* data, size_t i) {
      auto& mine = *static_cast<Shared*>(data);
      try {
        mine.f(static_cast<int64_t>(i));
      } catch (...) {
        mine.out_of_memory = true;
      }
    }, &shared);
    if (shared.out_of_memory) throw std::bad_alloc();
  }

 private:
  void run(size_t count, void (*f)(void*, size_t), void* data) const;
  const OrtApi* api_;
  OrtKernelContext* context_;
};

class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  int64_t integer(const char* name) const;                   // required
  int64_t integer(const char* name, int64_t otherwise) const;
  float real(const char* name) const;                        // required
  float real(const char* name, float otherwise) const;

 private:
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

struct Operator {
  const char* name;
  std::vector<int> inputs, outputs;                          // element types
  std::unique_ptr<Kernel> (*make)(const Operator& self, const Attributes& attributes);
  int kind = 0;                                              // for families that share a kernel
};

void add_products(std::vector<Operator>& to);
void add_attention(std::vector<Operator>& to);
void add_rows(std::vector<Operator>& to);
void add_drafts(std::vector<Operator>& to);

[[noreturn]] void refuse(const std::string& text);
inline void need(bool ok, const std::string& text) {
  if (!ok) refuse(text);
}

// Memory that a thread keeps from call to call, aligned to 64 bytes. One for the thread that computes an operator, one for
// tasks; each is valid until the next request of its kind.
enum class Memory { Operator, Task };
void* memory(Memory which, size_t bytes);

// Hands out pieces of one block.
class Pieces {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  void take(Memory which) { base_ = static_cast<char*>(memory(which, bytes_)); }
  template <class T>
  T* at(size_t offset) const { return reinterpret_cast<T*>(base_ + offset); }

 private:
  size_t bytes_ = 0;
  char* base_ = nullptr;
};

// How many tasks for this much work (in units of about a nanosecond), at most `limit`.
int64_t tasks_for(int64_t work, int64_t limit);

}  // namespace dspark::ort
