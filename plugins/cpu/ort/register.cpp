// The library's C interface: RegisterCustomOps, and which instruction set runs.
#include <algorithm>
#include <cstring>

#include "operator.h"

// The name of an operator to leave out: tests ask what a bundle does with a library that lacks one.
#ifndef DSPARK_WITHOUT
#define DSPARK_WITHOUT ""
#endif

#if defined(_WIN32)
#define DSPARK_EXPORT extern "C" __declspec(dllexport)
#else
#define DSPARK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace dspark::ort {
namespace {

struct Held {  // what ONNX Runtime holds for one node
  const OrtApi* api;
  const char* name;
  std::unique_ptr<Kernel> kernel;
};

// Runs f; what it throws becomes a status.
template <class Function>
OrtStatus* guarded(const OrtApi* api, const char* name, Function f) {
  constexpr int kFail = 1, kInvalidArgument = 2;
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const Refusal& refusal) {
    try {
      return create_status(api, kInvalidArgument, (std::string(name) + ": " + refusal.text).c_str());
    } catch (...) {
      return create_status(api, kInvalidArgument, "refused; out of memory for the reason");
    }
  } catch (const std::bad_alloc&) {
    return create_status(api, kFail, "a sequence kernel ran out of memory");
  } catch (...) {
    return create_status(api, kFail, "a sequence kernel failed");
  }
}

struct Registered : OrtCustomOp {
  Operator op;

  explicit Registered(Operator given) : OrtCustomOp{}, op(std::move(given)) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp* self) { return of(self).name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp* self) { return of(self).inputs.size(); };
    GetInputType = [](const OrtCustomOp* self, size_t i) { return of(self).inputs[i]; };
    GetOutputTypeCount = [](const OrtCustomOp* self) { return of(self).outputs.size(); };
    GetOutputType = [](const OrtCustomOp* self, size_t i) { return of(self).outputs[i]; };
    GetInputCharacteristic = GetOutputCharacteristic = GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = GetVariadicOutputMinArity = GetVariadicOutputHomogeneity =
        [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** out) {
      const Operator& op = of(self);
      return guarded(api, op.name, [&] { *out = new Held{api, op.name, op.make(op, Attributes(api, info))}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Held& held = *static_cast<Held*>(kernel);
      return guarded(held.api, held.name, [&] { held.kernel->compute(Call(held.api, context)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Held*>(kernel); };
  }

  static const Operator& of(const OrtCustomOp* self) { return static_cast<const Registered*>(self)->op; }
};

const std::vector<std::unique_ptr<Registered>>& registered() {
  static const auto made = [] {
    std::vector<Operator> operators;
    add_products(operators);
    add_attention(operators);
    add_rows(operators);
    add_drafts(operators);
    std::vector<std::unique_ptr<Registered>> all;
    for (Operator& op : operators)
      if (std::strcmp(op.name, DSPARK_WITHOUT) != 0) all.push_back(std::make_unique<Registered>(std::move(op)));
    return all;
  }();
  return made;
}

const std::string& operator_names() {
  static const auto made = [] {
    std::vector<std::string> names;
    for (const auto& each : registered()) names.push_back(each->op.name);
    std::sort(names.begin(), names.end());
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
    return text;
  }();
  return made;
}

}  // namespace
}  // namespace dspark::ort

DSPARK_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dspark::ort;
  const OrtApi* api = base->GetApi(kOrtApiVersion);
  if (!api) {
    const OrtApi* first = base->GetApi(1);  // which every version has, with the entry for statuses
    return guarded(first, "the sequence kernels", [&] {
      refuse("ONNX Runtime " + std::string(base->GetVersionString()) + " is too old for them; install 1." +
             std::to_string(kOrtApiVersion) + " or later");
    });
  }
  return guarded(api, "dspark", [&] {
    need(dspark::chosen_set() != nullptr, dspark::chosen_set_error());
    OrtCustomOpDomain* domain = nullptr;
    auto check = [](OrtStatus* status) {
      if (status) throw Failure{status};
    };
    check(create_domain(api, "dspark", &domain));
    for (const auto& op : registered()) check(add_operator(api, domain, op.get()));
    check(add_domain(api, options, domain));
  });
}

// Name of the instruction set in use; null where DSPARK_CPU names one that does not run here, and dspark_cpu_error() says so.
DSPARK_EXPORT const char* dspark_cpu_set() {
  const dspark::Set* set = dspark::chosen_set();
  return set ? set->name : nullptr;
}
DSPARK_EXPORT const char* dspark_cpu_error() { return dspark::chosen_set_error(); }
DSPARK_EXPORT const char* dspark_cpu_sets() { return dspark::sets_that_run(); }

// Names of all operators that RegisterCustomOps registers, sorted, separated by blanks; null without memory for them.
DSPARK_EXPORT const char* dspark_cpu_operators() {
  try {
    return dspark::ort::operator_names().c_str();
  } catch (...) {
    return nullptr;
  }
}
