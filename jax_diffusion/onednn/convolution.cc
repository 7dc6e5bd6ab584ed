// Convolutions and their gradients, which XLA calls; compiled and registered by library.py. float32.
//
// All lies in memory as JAX has it: images [N, H, W, C], kernels [h, w, C, D], results [N, OH, OW, D]. Of kernels oneDNN
// chooses a layout of its own. Into it they are packed by a call apart, which XLA makes once where a loop does not change
// them, as a sampler's; kernels that are made are brought from it.

#include <deque>

#include "blocks.h"

namespace onednn {
namespace {

using Dims = ffi::Span<const int64_t>;
using Pads = Dims;  // top, bottom, left, right

enum Of { RESULT, INPUT, KERNEL };  // which of a convolution's three arrays is made from the other two

// One block of it.
struct Convolution {
  Of of;
  memory::desc image, kernel, result, scratch;
  memory::desc inner, packed;  // the kernel as oneDNN has it; as it comes, the same where that takes no more room
  Reorder pack, unpack, add;   // add: where it is made, of a block that is not the first
  dnnl::primitive convolution;

  explicit Convolution(const std::array<int64_t, 12>& sizes) : of(Of(sizes[0])) {
    const auto [_, n, h, w, c, kh, kw, d, top, bottom, left, right] = sizes;
    const auto described = [](memory::dims dims, Tag tag) { return memory::desc(dims, memory::data_type::f32, tag); };
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
    packed = of == KERNEL || inner.get_size() == kernel.get_size() ? inner : kernel;
    if (of == KERNEL)
      unpack = Reorder(inner, kernel), add = Reorder(inner, kernel, true);
    else
      pack = Reorder(kernel, packed);
  }

  // The kernel's data is packed for a convolution of which this is a part.
  void operator()(float* x, float* k, float* y, const memory::desc& packed) const {
    dnnl::stream stream(cpu());
    const bool reorders = packed != inner;
    const Room room(scratch), for_inner(reorders ? inner : memory::desc());
    if (reorders) Reorder(packed, inner)(stream, k, for_inner.data);
    convolution.execute(stream, {{of == INPUT ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, memory(image, cpu(), x)},
                                 {of == KERNEL ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS,
                                  memory(inner, cpu(), reorders ? for_inner.data : k)},
                                 {of == RESULT ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, memory(result, cpu(), y)},
                                 {DNNL_ARG_SCRATCHPAD, memory(scratch, cpu(), room.data)}});
  }
};

// The part of a convolution that makes some rows of some images, or sums over some rows of some results.
struct Part {
  Range images, image_rows, result_rows;
  int64_t top, bottom;

  Part(Of of, Range images, int64_t height, int64_t kernel, int64_t made, int64_t top, Range rows)
      : images(images), image_rows(rows), result_rows(rows) {
    // Row y of the result is made of rows y - top, ..., y - top + kernel - 1 of the image.
    if (of == INPUT)
      result_rows = {std::max<int64_t>(0, rows.begin + top - kernel + 1), std::min(made, rows.end + top)};
    else
      image_rows = {std::max<int64_t>(0, rows.begin - top), std::min(height, rows.end - 1 - top + kernel)};
    this->top = image_rows.begin - (result_rows.begin - top);
    bottom = result_rows.size() - image_rows.size() - this->top + kernel - 1;
  }
};

const Convolution& operation(Of of, int64_t n, int64_t h, int64_t w, Dims kernel, int64_t top, int64_t bottom, Pads pads) {
  return kept<Convolution>(std::array<int64_t, 12>{of, n, h, w, kernel[2], kernel[0], kernel[1], kernel[3], top, bottom,
                                                   pads[2], pads[3]});
}

const Convolution& whole(Of of, Dims image, Dims kernel, Pads pads) {
  const OneThread alone;
  return operation(of, image[0], image[1], image[2], kernel, pads[0], pads[1], pads);
}

ffi::Error convolve(ffi::ThreadPool& pool, Of of, Dims image, Dims kernel, Pads pads, int64_t block,
                    float* x, float* k, float* y) {
  return guarded([&] {
    const int64_t n = image[0], height = image[1], made = height + pads[0] + pads[1] - kernel[0] + 1;
    const int64_t width = image[2], made_width = width + pads[2] + pads[3] - kernel[1] + 1;
    const int64_t rows = of == INPUT ? height : made;
    // By images, and by rows of each where there are too few.
    const int64_t all = parts(pool, 2 * n * made * made_width * kernel[0] * kernel[1] * image[3] * kernel[3], block);
    const int64_t batches = std::min(all, n), bands = std::min(all / batches, rows);
    const int64_t count = batches * bands;
    const auto part = [&](int64_t i) {
      return Part(of, Range(n, batches, i / bands), height, kernel[0], made, pads[0], Range(rows, bands, i % bands));
    };
    const auto operation_of = [&](const Part& p) -> const Convolution& {
      return operation(of, p.images.size(), p.image_rows.size(), width, kernel, p.top, p.bottom, pads);
    };
    const auto run = [&](int64_t i, float* k, const memory::desc& packed) {
      const Part p = part(i);
      operation_of(p)(x + (p.images.begin * height + p.image_rows.begin) * width * image[3], k,
                      y + (p.images.begin * made + p.result_rows.begin) * made_width * kernel[3], packed);
    };
    if (of != KERNEL) return share(pool, count, [&](int64_t i) { run(i, k, whole(of, image, kernel, pads).packed); });
    // Each block makes a kernel of its own; they are added in the same order always.
    const OneThread alone;
    std::deque<Room> kernels;
    for (int64_t i = 0; i < count; ++i) kernels.emplace_back(operation_of(part(i)).inner);
    share(pool, count, [&](int64_t i) { run(i, static_cast<float*>(kernels[i].data), operation_of(part(i)).inner); });
    dnnl::stream stream(cpu());
    for (int64_t i = 0; i < count; ++i) {
      const auto& op = operation_of(part(i));
      (i ? op.add : op.unpack)(stream, kernels[i].data, k);
    }
  });
}

// For the result, or the input, of these sizes.
ffi::Error pack(Array k, Result packed, int64_t of, Dims image, Pads pads) {
  return guarded([&] {
    const Convolution& op = whole(Of(of), image, k.dimensions(), pads);
    const OneThread alone;
    dnnl::stream stream(cpu());
    op.pack(stream, k.typed_data(), packed->typed_data());
  });
}

ffi::Error result(ffi::ThreadPool pool, Array x, Array k, Result y, Pads pads, int64_t block) {
  return convolve(pool, RESULT, x.dimensions(), k.dimensions(), pads, block, x.typed_data(), k.typed_data(), y->typed_data());
}

ffi::Error input(ffi::ThreadPool pool, Array y, Array k, Result x, Pads pads, int64_t block) {
  return convolve(pool, INPUT, x->dimensions(), k.dimensions(), pads, block, x->typed_data(), k.typed_data(), y.typed_data());
}

ffi::Error kernel(ffi::ThreadPool pool, Array x, Array y, Result k, Pads pads, int64_t block) {
  return convolve(pool, KERNEL, x.dimensions(), k->dimensions(), pads, block, x.typed_data(), k->typed_data(), y.typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    onednn_pack, pack,
    ffi::Ffi::Bind().Arg<Array>().Ret<Array>().Attr<int64_t>("of").Attr<Dims>("image").Attr<Pads>("pads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_result, result, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_input, input, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_kernel, kernel, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));

}  // namespace onednn
