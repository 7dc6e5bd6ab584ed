// oneDNN's matrix products and convolutions as functions that XLA calls; compiled and registered by library.py.
//
// All arrays are float32 and lie in memory as JAX has them: images [N, H, W, C], kernels [h, w, C, D], results
// [N, OH, OW, D]. Of kernels oneDNN chooses a layout of its own, into and from which each call reorders them.

#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using dnnl::memory;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;
using Pads = ffi::Span<const int64_t>;  // top, bottom, left, right
using Tag = memory::format_tag;

namespace {

const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::desc described(memory::dims dims, Tag tag) { return memory::desc(dims, memory::data_type::f32, tag); }

// Operations hold no memory of their own, so that several threads can run one at once.
dnnl::primitive_attr without_memory() {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

// What an operation computes with, for one call.
struct Room {
  static constexpr size_t LINE = 64;
  void* data;
  explicit Room(const memory::desc& what) : data(std::aligned_alloc(LINE, (what.get_size() + LINE - 1) / LINE * LINE)) {}
  Room(const Room&) = delete;
  ~Room() { std::free(data); }
};

// The operation of these sizes, made by the first call. What is in a std::map stays where it is.
template <typename Operation, size_t N>
const Operation& kept(const std::array<int64_t, N>& sizes) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, N>, Operation> made;
  const std::lock_guard lock(mutex);
  return made.try_emplace(sizes, sizes).first->second;
}

template <typename Run>
ffi::Error guarded(Run run) {
  try {
    dnnl::stream stream(cpu());
    run(stream);
    stream.wait();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
}

// A matrix of rows and columns for each of [batch, heads], the heads before the rows in memory or inside, after them.
memory::desc matrices(int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool inside, bool transpose) {
  const int64_t row = inside ? heads * columns : columns, head = inside ? columns : rows * columns;
  memory::dims dims{batch, heads, rows, columns}, strides{heads * rows * columns, head, row, 1};
  if (transpose) std::swap(dims[2], dims[3]), std::swap(strides[2], strides[3]);
  return memory::desc(dims, memory::data_type::f32, strides);
}

// op(a) op(b), with an op for each that may transpose.
struct Product {
  memory::desc a, b, made, scratch;
  dnnl::matmul matmul;

  explicit Product(const std::array<int64_t, 10>& sizes) {
    const auto [batch, heads, m, k, n, transpose_a, transpose_b, inside_a, inside_b, inside_made] = sizes;
    a = matrices(batch, heads, transpose_a ? k : m, transpose_a ? m : k, inside_a, transpose_a);
    b = matrices(batch, heads, transpose_b ? n : k, transpose_b ? k : n, inside_b, transpose_b);
    made = matrices(batch, heads, m, n, inside_made, false);
    const dnnl::matmul::primitive_desc description(cpu(), a, b, made, without_memory());
    matmul = dnnl::matmul(description), scratch = description.scratchpad_desc();
  }
};

ffi::Error product(Array a, Array b, Result made, bool transpose_a, bool transpose_b, bool inside_a, bool inside_b,
                   bool inside_made) {
  return guarded([&](dnnl::stream& stream) {
    const auto from = a.dimensions(), to = made->dimensions();
    const int64_t heads = to[inside_made ? 2 : 1], rows = to[inside_made ? 1 : 2];
    const int64_t along = transpose_a ? from[inside_a ? 1 : 2] : from[3];
    const auto& op = kept<Product>(std::array<int64_t, 10>{to[0], heads, rows, along, to[3], transpose_a, transpose_b,
                                                           inside_a, inside_b, inside_made});
    const Room room(op.scratch);
    op.matmul.execute(stream, {{DNNL_ARG_SRC, memory(op.a, cpu(), a.typed_data())},
                               {DNNL_ARG_WEIGHTS, memory(op.b, cpu(), b.typed_data())},
                               {DNNL_ARG_DST, memory(op.made, cpu(), made->typed_data())},
                               {DNNL_ARG_SCRATCHPAD, memory(op.scratch, cpu(), room.data)}});
  });
}

enum Of { RESULT, INPUT, KERNEL };  // which of a convolution's three arrays is made from the other two

struct Convolution {
  memory::desc image, kernel, result, scratch;
  memory::desc inner;  // the kernel as oneDNN has it
  dnnl::primitive convolution;
  std::optional<dnnl::reorder> reorder;

  explicit Convolution(const std::array<int64_t, 12>& sizes) {
    const auto [of, n, h, w, c, kh, kw, d, top, bottom, left, right] = sizes;
    const memory::dims ones{1, 1}, before{top, left}, after{bottom, right};
    image = described({n, c, h, w}, Tag::nhwc);
    kernel = described({d, c, kh, kw}, Tag::hwio);
    result = described({n, d, h + top + bottom - kh + 1, w + left + right - kw + 1}, Tag::nhwc);
    const auto any = described({d, c, kh, kw}, Tag::any);
    const auto direct = dnnl::algorithm::convolution_direct;
    const auto attributes = without_memory();
    const dnnl::convolution_forward::primitive_desc forward(
        cpu(), dnnl::prop_kind::forward_training, direct, image, any, result, ones, before, after, attributes);
    if (of == RESULT) {
      convolution = dnnl::convolution_forward(forward);
      inner = forward.weights_desc(), scratch = forward.scratchpad_desc();
    } else if (of == INPUT) {
      const dnnl::convolution_backward_data::primitive_desc backward(
          cpu(), direct, image, any, result, ones, before, after, forward, attributes);
      convolution = dnnl::convolution_backward_data(backward);
      inner = backward.weights_desc(), scratch = backward.scratchpad_desc();
    } else {
      const dnnl::convolution_backward_weights::primitive_desc backward(
          cpu(), direct, image, any, result, ones, before, after, forward, attributes);
      convolution = dnnl::convolution_backward_weights(backward);
      inner = backward.diff_weights_desc(), scratch = backward.scratchpad_desc();
    }
    if (inner == kernel) return;
    const auto &from = of == KERNEL ? inner : kernel, &to = of == KERNEL ? kernel : inner;
    const dnnl::reorder::primitive_desc reordering(cpu(), from, cpu(), to, attributes);
    if (reordering.scratchpad_desc().get_size() > scratch.get_size()) scratch = reordering.scratchpad_desc();
    reorder.emplace(reordering);
  }
};

ffi::Error convolve(Of of, ffi::Span<const int64_t> image, ffi::Span<const int64_t> kernel, Pads pads, float* x, float* k,
                    float* y) {
  return guarded([&](dnnl::stream& stream) {
    const auto& op = kept<Convolution>(std::array<int64_t, 12>{of, image[0], image[1], image[2], image[3], kernel[0], kernel[1],
                                                               kernel[3], pads[0], pads[1], pads[2], pads[3]});
    const Room room(op.scratch), for_inner(op.reorder ? op.inner : memory::desc());
    const memory scratch(op.scratch, cpu(), room.data), plain(op.kernel, cpu(), k);
    const memory inner = op.reorder ? memory(op.inner, cpu(), for_inner.data) : plain;
    const auto reorder = [&](const memory& from, const memory& to) {
      if (op.reorder) op.reorder->execute(stream, {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}, {DNNL_ARG_SCRATCHPAD, scratch}});
    };
    if (of != KERNEL) reorder(plain, inner);
    op.convolution.execute(stream, {{of == INPUT ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, memory(op.image, cpu(), x)},
                                    {of == KERNEL ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, inner},
                                    {of == RESULT ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, memory(op.result, cpu(), y)},
                                    {DNNL_ARG_SCRATCHPAD, scratch}});
    if (of == KERNEL) reorder(inner, plain);
  });
}

ffi::Error result(Array x, Array k, Result y, Pads pads) {
  return convolve(RESULT, x.dimensions(), k.dimensions(), pads, x.typed_data(), k.typed_data(), y->typed_data());
}

ffi::Error input(Array y, Array k, Result x, Pads pads) {
  return convolve(INPUT, x->dimensions(), k.dimensions(), pads, x->typed_data(), k.typed_data(), y.typed_data());
}

ffi::Error kernel(Array x, Array y, Result k, Pads pads) {
  return convolve(KERNEL, x.dimensions(), k->dimensions(), pads, x.typed_data(), k->typed_data(), y.typed_data());
}

auto of_two() { return ffi::Ffi::Bind().Arg<Array>().Arg<Array>().Ret<Array>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_product, product, of_two()
                                                             .Attr<bool>("transpose_a")
                                                             .Attr<bool>("transpose_b")
                                                             .Attr<bool>("inside_a")
                                                             .Attr<bool>("inside_b")
                                                             .Attr<bool>("inside_made"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_result, result, of_two().Attr<Pads>("pads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_input, input, of_two().Attr<Pads>("pads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_kernel, kernel, of_two().Attr<Pads>("pads"));
