// Norms and activations: shapes and threads.
#include <algorithm>

#include "operator.h"

namespace dspark::ort {
namespace {

// f(row) for all rows of n columns, on the session's threads.
template <class Function>
void each_row(const Call& call, int64_t rows, int64_t n, int64_t cost, const Function& f) {
  const int64_t tasks = tasks_for(rows * n * cost / 8, rows);
  call.parallel(tasks, [&](int64_t i) {
    for (int64_t m = rows * i / tasks; m < rows * (i + 1) / tasks; m++) f(m);
  });
}

Tensor matrix(const Call& call, size_t i, const char* name) {
  Tensor t = call.input(i, name);
  need(t.shape.rank >= 1, t.text() + " must have a dimension");
  return t;
}

int64_t width(const Tensor& t) { return t.shape[t.shape.rank - 1]; }

const float* vector_of(const Call& call, size_t i, const char* name, const Tensor& x) {
  const Tensor t = call.input(i, name);
  need(t.shape == Shape{width(x)}, t.text() + " does not fit " + x.text() + "; needed is [" + std::to_string(width(x)) + "]");
  return t.as<float>();
}

Tensor like(const Call& call, size_t i, const char* name, const Tensor& x) {
  Tensor t = call.input(i, name);
  need(t.shape == x.shape, t.text() + " must have the shape of " + x.text());
  return t;
}

enum Norm { Rms, SkipRms, Layer };

class NormKernel : public Kernel {
 public:
  NormKernel(int kind, const Attributes& attributes) : kind_(kind), epsilon_(attributes.real("epsilon", 1e-5f)), set_(*chosen_set()) {}

  void compute(const Call& call) const override {
    const Tensor x = matrix(call, 0, "x");
    const int64_t n = width(x), rows = n ? x.shape.size() / n : 0;
    const float* skip = kind_ == SkipRms ? like(call, 1, "skip", x).as<float>() : nullptr;
    const float* weight = vector_of(call, kind_ == SkipRms ? 2 : 1, "weight", x);
    const float* bias = kind_ == Layer ? vector_of(call, 2, "bias", x) : nullptr;
    float* y = static_cast<float*>(call.output(0, x.shape));
    float* sum = skip ? static_cast<float*>(call.output(1, x.shape)) : nullptr;
    each_row(call, rows, n, 1, [&](int64_t m) {
      const float* row = x.as<float>() + m * n;
      if (bias)
        set_.layer_norm(row, weight, bias, n, epsilon_, y + m * n);
      else
        set_.rms_norm(row, skip ? skip + m * n : nullptr, weight, n, epsilon_, y + m * n, sum ? sum + m * n : nullptr);
    });
  }

 private:
  int kind_;
  float epsilon_;
  const Set& set_;
};

class GateKernel : public Kernel {
 public:
  GateKernel(Activation kind, bool packed) : kind_(kind), packed_(packed), set_(*chosen_set()) {}

  void compute(const Call& call) const override {
    const Tensor gate = matrix(call, 0, packed_ ? "x" : "gate");
    const int64_t stride = width(gate), n = packed_ ? stride / 2 : stride;
    need(!packed_ || stride % 2 == 0, gate.text() + " must have an even number of columns: gate, then up");
    Shape shape = gate.shape;
    shape.dims[shape.rank - 1] = n;
    const float* up = packed_ ? gate.as<float>() + n : like(call, 1, "up", gate).as<float>();
    float* y = static_cast<float*>(call.output(0, shape));
    each_row(call, n ? shape.size() / n : 0, n, 4, [&](int64_t m) { set_.gate(kind_, gate.as<float>() + m * stride, up + m * stride, n, y + m * n); });
  }

 private:
  Activation kind_;
  bool packed_;
  const Set& set_;
};

class UnaryKernel : public Kernel {
 public:
  UnaryKernel(Activation kind, const Attributes& attributes) : kind_(kind), cap_(kind == Activation::Softcap ? attributes.real("cap") : 1), set_(*chosen_set()) {
    need(cap_ > 0, "cap must be positive");
  }

  void compute(const Call& call) const override {
    const Tensor x = call.input(0, "x");
    float* y = static_cast<float*>(call.output(0, x.shape));
    // Elements do not depend on each other: rows are pieces of any length.
    constexpr int64_t kPiece = 4096;
    const int64_t size = x.shape.size();
    each_row(call, (size + kPiece - 1) / kPiece, kPiece, 4, [&](int64_t m) {
      set_.unary(kind_, x.as<float>() + m * kPiece, std::min(kPiece, size - m * kPiece), cap_, y + m * kPiece);
    });
  }

 private:
  Activation kind_;
  float cap_;
  const Set& set_;
};

std::unique_ptr<Kernel> make_norm(const Operator& self, const Attributes& a) { return std::make_unique<NormKernel>(self.kind, a); }
std::unique_ptr<Kernel> make_gate(const Operator& self, const Attributes&) { return std::make_unique<GateKernel>(static_cast<Activation>(self.kind), self.inputs.size() == 1); }
std::unique_ptr<Kernel> make_unary(const Operator& self, const Attributes& a) { return std::make_unique<UnaryKernel>(static_cast<Activation>(self.kind), a); }

}  // namespace

void add_rows(std::vector<Operator>& to) {
  const std::vector<int> one = {Float32}, two = {Float32, Float32}, three = {Float32, Float32, Float32};
  to.push_back({"RMSNorm", two, one, make_norm, Rms});
  to.push_back({"SkipRMSNorm", three, two, make_norm, SkipRms});
  to.push_back({"LayerNorm", three, one, make_norm, Layer});
  const auto kind = [](Activation a) { return static_cast<int>(a); };
  to.push_back({"SiluGate", one, one, make_gate, kind(Activation::Silu)});
  to.push_back({"GeluGate", one, one, make_gate, kind(Activation::Gelu)});
  to.push_back({"GeluTanhGate", one, one, make_gate, kind(Activation::GeluTanh)});
  to.push_back({"SiluProduct", two, one, make_gate, kind(Activation::Silu)});
  to.push_back({"GeluProduct", two, one, make_gate, kind(Activation::Gelu)});
  to.push_back({"GeluTanhProduct", two, one, make_gate, kind(Activation::GeluTanh)});
  to.push_back({"Silu", one, one, make_unary, kind(Activation::Silu)});
  to.push_back({"Gelu", one, one, make_unary, kind(Activation::Gelu)});
  to.push_back({"GeluTanh", one, one, make_unary, kind(Activation::GeluTanh)});
  to.push_back({"Sigmoid", one, one, make_unary, kind(Activation::Sigmoid)});
  to.push_back({"Tanh", one, one, make_unary, kind(Activation::Tanh)});
  to.push_back({"Softcap", one, one, make_unary, kind(Activation::Softcap)});
}

}  // namespace dspark::ort
