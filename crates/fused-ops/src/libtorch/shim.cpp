// Operations of ATen that the tch crate does not bind. Every function returns null, or a message that the caller
// frees with shim_free; tensors that it returns belong to the caller.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_rms_norm.h>
#include <ATen/ops/_fused_rms_norm_backward.h>
#include <torch/version.h>

#include <cstdlib>
#include <cstring>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace {

char *message(const char *text) {
  char *copy = static_cast<char *>(std::malloc(std::strlen(text) + 1));
  std::strcpy(copy, text);
  return copy;
}

std::vector<at::Tensor> list(at::Tensor *const *tensors, size_t count) {
  std::vector<at::Tensor> all;
  all.reserve(count);
  for (size_t i = 0; i < count; ++i)
    all.push_back(*tensors[i]);
  return all;
}

// A mask of attention that is aligned at the last key.
constexpr int64_t from_bottom_right = 2;

// Most elements whose thresholds are kept: 256 MiB.
constexpr int64_t most_kept = 64 << 20;

at::Tensor made_thresholds(const at::Tensor &like) {
  auto mask = [](const at::Tensor &x, int shift) {
    // A logical shift of the 32 bits, which are signed here.
    return at::bitwise_and(at::bitwise_right_shift(x, shift), static_cast<int64_t>((1u << (32 - shift)) - 1));
  };
  auto i = at::arange(like.numel(), like.options());
  i = at::bitwise_xor(i, mask(i, 16)).mul_(static_cast<int32_t>(0x85ebca6bu));
  i = at::bitwise_xor(i, mask(i, 13)).mul_(static_cast<int32_t>(0xc2b2ae35u));
  return mask(i, 16);
}

// The thresholds of a weight's elements, which only depend on their places: kept for the next weight.
at::Tensor thresholds(const at::Tensor &like) {
  thread_local at::Tensor kept;
  if (like.numel() > most_kept)
    return made_thresholds(like);
  if (!kept.defined() || kept.device() != like.device() || kept.numel() < like.numel())
    kept = made_thresholds(like);
  return kept.narrow(0, 0, like.numel());
}

// Kernels of attention add in a fixed order only where LibTorch is strict about it.
struct Strict {
  bool was = at::globalContext().deterministicAlgorithmsWarnOnly();
  bool on = at::globalContext().deterministicAlgorithms();
  Strict() { at::globalContext().setDeterministicAlgorithms(on, false); }
  ~Strict() { at::globalContext().setDeterministicAlgorithms(on, was); }
};

template <typename F> char *guarded(F &&body) {
  try {
    c10::NoGradGuard no_grad;
    body();
    return nullptr;
  } catch (const std::exception &error) {
    return message(error.what());
  }
}

} // namespace

extern "C" {

void shim_free(char *text) { std::free(text); }

// Version of the library that this was built with.
const char *shim_version() { return TORCH_VERSION; }

// One AdamW step of `count` parameters with the same settings, in place. `divisor` divides the gradients, or is null.
char *shim_adamw(at::Tensor *const *parameters, at::Tensor *const *gradients, at::Tensor *const *first,
                 at::Tensor *const *second, size_t count, double step, double lr, double beta1, double beta2,
                 double weight_decay, double eps, const at::Tensor *divisor) {
  return guarded([&] {
    auto p = list(parameters, count);
    auto options = p.front().options().dtype(at::kFloat);
    // The kernel takes a step for each tensor; all are the same.
    std::vector<at::Tensor> steps(count, at::full({}, step, options));
    std::optional<at::Tensor> scale;
    if (divisor)
      scale = *divisor;
    at::_fused_adamw_(p, list(gradients, count), list(first, count), list(second, count), {}, steps, lr, beta1, beta2,
                      weight_decay, eps, false, false, scale, std::nullopt);
  });
}

// Euclidean norm of all elements of all tensors, on their device.
char *shim_norm(at::Tensor *const *tensors, size_t count, at::Tensor **out) {
  return guarded([&] {
    auto norms = at::_foreach_norm(list(tensors, count), 2);
    for (auto &norm : norms)
      norm = norm.to(at::kFloat);
    *out = new at::Tensor(at::linalg_vector_norm(at::stack(norms), 2).reshape({1}));
  });
}

// Attention of variable lengths, causal from the bottom right: [tokens, heads, dim] of 16 bits, on CUDA.
char *shim_flash_forward(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v, const at::Tensor *starts_q,
                         const at::Tensor *starts_k, int64_t max_q, int64_t max_k, double scale, int64_t window,
                         at::Tensor **out, at::Tensor **lse) {
  return guarded([&] {
    std::optional<int64_t> left, right;
    if (window > 0) {
      left = window - 1;
      right = 0;
    }
    auto result = at::_flash_attention_forward(*q, *k, *v, *starts_q, *starts_k, max_q, max_k, 0.0, true, false, scale,
                                               left, right);
    *out = new at::Tensor(std::get<0>(result));
    *lse = new at::Tensor(std::get<1>(result));
  });
}

char *shim_flash_backward(const at::Tensor *grad, const at::Tensor *q, const at::Tensor *k, const at::Tensor *v,
                          const at::Tensor *out, const at::Tensor *lse, const at::Tensor *starts_q,
                          const at::Tensor *starts_k, int64_t max_q, int64_t max_k, double scale, int64_t window,
                          at::Tensor **dq, at::Tensor **dk, at::Tensor **dv) {
  return guarded([&] {
    std::optional<int64_t> left, right;
    if (window > 0) {
      left = window - 1;
      right = 0;
    }
    Strict strict;
    // Only read where there is dropout.
    auto random = at::empty({2}, q->options().dtype(at::kUInt64));
    auto unused = at::empty({}, q->options().dtype(at::kUInt64));
    auto result = at::_flash_attention_backward(*grad, *q, *k, *v, *out, *lse, *starts_q, *starts_k, max_q, max_k, 0.0,
                                                true, random, unused, scale, left, right);
    *dq = new at::Tensor(std::get<0>(result));
    *dk = new at::Tensor(std::get<1>(result));
    *dv = new at::Tensor(std::get<2>(result));
  });
}

// The same in 32 bits, whose keys have as many heads as the queries.
char *shim_efficient_forward(const at::Tensor *q, const at::Tensor *k, const at::Tensor *v, const at::Tensor *starts_q,
                             const at::Tensor *starts_k, int64_t max_q, int64_t max_k, double scale, int64_t window,
                             at::Tensor **out, at::Tensor **lse) {
  return guarded([&] {
    auto seen = window > 0 ? std::optional<int64_t>(window) : std::nullopt;
    auto result = at::_efficient_attention_forward(q->unsqueeze(0), k->unsqueeze(0), v->unsqueeze(0), {}, *starts_q,
                                                   *starts_k, max_q, max_k, 0.0, from_bottom_right, true, scale, {},
                                                   seen);
    *out = new at::Tensor(std::get<0>(result).squeeze(0));
    *lse = new at::Tensor(std::get<1>(result));
  });
}

char *shim_efficient_backward(const at::Tensor *grad, const at::Tensor *q, const at::Tensor *k, const at::Tensor *v,
                              const at::Tensor *out, const at::Tensor *lse, const at::Tensor *starts_q,
                              const at::Tensor *starts_k, int64_t max_q, int64_t max_k, double scale, int64_t window,
                              at::Tensor **dq, at::Tensor **dk, at::Tensor **dv) {
  return guarded([&] {
    auto seen = window > 0 ? std::optional<int64_t>(window) : std::nullopt;
    Strict strict;
    // Only read where there is dropout.
    auto unused = at::empty({}, at::TensorOptions().dtype(at::kLong));
    auto result = at::_efficient_attention_backward(
        grad->unsqueeze(0), q->unsqueeze(0), k->unsqueeze(0), v->unsqueeze(0), {}, out->unsqueeze(0), *starts_q,
        *starts_k, max_q, max_k, *lse, 0.0, unused, unused, from_bottom_right, false, scale, {}, seen);
    *dq = new at::Tensor(std::get<0>(result).squeeze(0));
    *dk = new at::Tensor(std::get<1>(result).squeeze(0));
    *dv = new at::Tensor(std::get<2>(result).squeeze(0));
  });
}

// Root-mean-square norm of rows of f32.
char *shim_rms_norm(const at::Tensor *x, const at::Tensor *w, double eps, at::Tensor **out) {
  return guarded([&] { *out = new at::Tensor(std::get<0>(at::_fused_rms_norm(*x, w->sizes(), *w, eps))); });
}

char *shim_rms_norm_backward(const at::Tensor *grad, const at::Tensor *x, const at::Tensor *w, double eps,
                             at::Tensor **dx, at::Tensor **dw) {
  return guarded([&] {
    auto rstd = std::get<1>(at::_fused_rms_norm(*x, w->sizes(), *w, eps));
    auto result = at::_fused_rms_norm_backward(*grad, *x, w->sizes(), rstd, *w, {true, true});
    *dx = new at::Tensor(std::get<0>(result));
    *dw = new at::Tensor(std::get<1>(result));
  });
}

// A tensor of the CPU, bf16 or f32, in memory that `release` gives back to its owner at the tensor's end.
char *shim_adopt(void *data, const int64_t *sizes, size_t dimensions, bool narrow, void (*release)(void *), void *owner,
                 at::Tensor **out) {
  return guarded([&] {
    auto done = [release, owner](void *) { release(owner); };
    auto options = at::TensorOptions().dtype(narrow ? at::kBFloat16 : at::kFloat);
    *out = new at::Tensor(at::from_blob(data, at::IntArrayRef(sizes, dimensions), done, options));
  });
}

// A tensor of the host on a device; nothing waits for the copy.
char *shim_upload(const at::Tensor *host, int device, at::Tensor **out) {
  return guarded([&] {
    c10::Device to(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    *out = new at::Tensor(host->pin_memory().to(to, host->scalar_type(), true));
  });
}

// f32 to bf16, rounded up from a threshold that depends on the place of each element: see kernels/dither.rs.
char *shim_dither(const at::Tensor *weight, at::Tensor **out) {
  return guarded([&] {
    auto bits = weight->contiguous().view(at::kInt).flatten();
    // Infinity stays what it is: its lower half is 0, so that nothing is carried. What is no number could carry into its
    // sign, or lose what makes it none.
    auto sum = at::where(weight->contiguous().flatten().isnan(), bits.bitwise_or(0x400000), bits + thresholds(bits));
    auto high = sum.view(at::kShort).view({-1, 2}).select(1, 1).contiguous();
    *out = new at::Tensor(high.view(at::kBFloat16).view(weight->sizes()));
  });
}

// Sums in an order of their own, so that a run that is resumed ends with the same bits; a warning where a kernel has none.
char *shim_deterministic() {
  return guarded([&] {
    at::globalContext().setDeterministicAlgorithms(true, true);
    // Memory that is about to be written need not be filled before.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

// Bytes that the allocator has had in use at most on a device, and the device's memory; zeros where that is not known.
char *shim_memory(int device, uint64_t *peak, uint64_t *total) {
  return guarded([&] {
    *peak = *total = 0;
    if (!at::globalContext().hasCUDA())
      return;
    c10::DeviceGuard on(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
    auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *peak = static_cast<uint64_t>(stats.reserved_bytes[0].peak);
#ifndef _WIN32
    // Of the CUDA runtime that LibTorch has loaded; its headers are not part of LibTorch.
    using MemGetInfo = int (*)(size_t *, size_t *);
    if (auto ask = reinterpret_cast<MemGetInfo>(dlsym(RTLD_DEFAULT, "cudaMemGetInfo"))) {
      size_t free = 0, all = 0;
      if (ask(&free, &all) == 0)
        *total = all;
    }
#endif
  });
}

} // extern "C"
