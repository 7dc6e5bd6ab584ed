// oneDNN's matrix products and convolutions as functions that XLA calls; compiled and registered by library.py.
//
// All arrays are float32 and lie in memory as JAX has them: images [N, H, W, C], kernels [h, w, C, D], results
// [N, OH, OW, D]. Of kernels, and of the second operand of a single product, oneDNN chooses a layout of its own, into
// and from which each call reorders them.
//
// Each call is cut into blocks, which threads of XLA's own pool do, each by oneDNN on one thread: threads of oneDNN's
// own would wait asleep, 0.1 ms for each operation, or take the cores from XLA's.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

// OpenMP's, of the calling thread alone.
extern "C" int omp_get_max_threads(void);
extern "C" void omp_set_num_threads(int);

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

struct OneThread {
  const int before = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before); }
};

// Into how many blocks of at least so much work to cut.
int64_t parts(const ffi::ThreadPool& pool, int64_t work, int64_t block) {
  return std::max<int64_t>(1, std::min(pool.num_threads(), work / block));
}

// Calls block(0), ..., block(count - 1), on this thread and on those of the pool that are free. What a thread that comes
// late still looks at is its own.
template <typename Block>
void share(ffi::ThreadPool& pool, int64_t count, const Block& block) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr error;
  };
  const auto state = std::make_shared<State>();
  const auto work = [state, count, &block] {
    for (int64_t i; (i = state->next++) < count;) {
      std::exception_ptr error;
      try {
        const OneThread alone;
        block(i);
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard lock(state->mutex);
      if (error) state->error = error;
      if (++state->done == count) state->all_done.notify_one();
    }
  };
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); ++i) pool.Schedule([work] { work(); });
  work();
  // A thread that sleeps takes 0.1 ms to wake, and what is waited for takes about as long as what was done here.
  for (int turns = 0; state->done < count && turns < 1000; ++turns) std::this_thread::yield();
  std::unique_lock lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
  if (state->error) std::rethrow_exception(state->error);
}

template <typename Run>
ffi::Error guarded(Run run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("oneDNN: ") + error.what());
  }
}

// The i-th of so many parts of 0, ..., total - 1.
struct Range {
  int64_t begin, end;
  Range(int64_t begin, int64_t end) : begin(begin), end(end) {}
  Range(int64_t total, int64_t parts, int64_t i) : begin(total * i / parts), end(total * (i + 1) / parts) {}
  int64_t size() const { return end - begin; }
};

// The operation of these sizes, made by the first call. What is in a std::map stays where it is.
template <typename Operation, size_t N>
const Operation& kept(const std::array<int64_t, N>& sizes) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, N>, Operation> made;
  const std::lock_guard lock(mutex);
  return made.try_emplace(sizes, sizes).first->second;
}

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

// From one layout to another; add: to what is there.
struct Reorder {
  std::optional<dnnl::reorder> reorder;
  memory::desc from, to, scratch;

  Reorder() = default;
  Reorder(const memory::desc& from, const memory::desc& to, bool add = false) : from(from), to(to) {
    auto attributes = without_memory();
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    if (add) attributes.set_post_ops(sum);
    const dnnl::reorder::primitive_desc description(cpu(), from, cpu(), to, attributes);
    reorder.emplace(description), scratch = description.scratchpad_desc();
  }

  explicit operator bool() const { return reorder.has_value(); }

  void operator()(dnnl::stream& stream, void* source, void* target) const {
    const Room room(scratch);
    reorder->execute(stream, {{DNNL_ARG_FROM, memory(from, cpu(), source)},
                              {DNNL_ARG_TO, memory(to, cpu(), target)},
                              {DNNL_ARG_SCRATCHPAD, memory(scratch, cpu(), room.data)}});
  }
};

// Products.

// Matrices [batch, heads, rows, columns], of which each of the four axes lies in memory at steps of its own.
struct Matrices {
  std::array<int64_t, 4> steps;

  // inside: the heads lie within the rows.
  Matrices(int64_t heads, int64_t rows, int64_t columns, bool inside, bool transpose)
      : steps{heads * rows * columns, inside ? columns : rows * columns, inside ? heads * columns : columns, 1} {
    if (transpose) std::swap(steps[2], steps[3]);
  }

  int64_t at(int64_t batch, int64_t head, int64_t row, int64_t column) const {
    return batch * steps[0] + head * steps[1] + row * steps[2] + column * steps[3];
  }
};

// op(a) op(b) of one block.
struct Product {
  memory::desc a, b, made, scratch;
  memory::desc inner;  // b as oneDNN has it, where it is one matrix
  Reorder reorder;
  dnnl::matmul matmul;

  explicit Product(const std::array<int64_t, 17>& s) {
    const auto described = [&s](int64_t rows, int64_t columns, size_t i) {
      return memory::desc({s[0], s[1], rows, columns}, memory::data_type::f32, memory::dims(&s[i], &s[i] + 4));
    };
    a = described(s[2], s[3], 5), b = described(s[3], s[4], 9), made = described(s[2], s[4], 13);
    const auto any = memory::desc({1, 1, s[3], s[4]}, memory::data_type::f32, Tag::any);
    const dnnl::matmul::primitive_desc description(cpu(), a, s[0] * s[1] == 1 ? any : b, made, without_memory());
    matmul = dnnl::matmul(description), inner = description.weights_desc(), scratch = description.scratchpad_desc();
    if (inner != b) reorder = Reorder(b, inner);
  }

  void operator()(float* a_data, float* b_data, float* made_data) const {
    dnnl::stream stream(cpu());
    const Room room(scratch), for_inner(reorder ? inner : memory::desc());
    if (reorder) reorder(stream, b_data, for_inner.data);
    matmul.execute(stream, {{DNNL_ARG_SRC, memory(a, cpu(), a_data)},
                            {DNNL_ARG_WEIGHTS, memory(inner, cpu(), reorder ? for_inner.data : b_data)},
                            {DNNL_ARG_DST, memory(made, cpu(), made_data)},
                            {DNNL_ARG_SCRATCHPAD, memory(scratch, cpu(), room.data)}});
  }
};

// Of so many blocks of rows by columns those that read the least: each reads its rows of one operand and its columns of
// the other.
std::pair<int64_t, int64_t> cuts(int64_t rows, int64_t columns, int64_t parts) {
  std::pair<int64_t, int64_t> best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t i = 1; i <= parts; ++i)
    if (const int64_t reads = i * columns + parts / i * rows; parts % i == 0 && i <= rows && parts / i <= columns && reads < least)
      best = {i, parts / i}, least = reads;
  return best;
}

ffi::Error product(ffi::ThreadPool pool, Array a, Array b, Result made, bool transpose_a, bool transpose_b, bool inside_a,
                   bool inside_b, bool inside_made, int64_t block) {
  return guarded([&] {
    const auto from = a.dimensions(), to = made->dimensions();
    const int64_t batch = to[0], heads = to[inside_made ? 2 : 1], m = to[inside_made ? 1 : 2], n = to[3];
    const int64_t k = transpose_a ? from[inside_a ? 1 : 2] : from[3];
    const Matrices of_a(heads, transpose_a ? k : m, transpose_a ? m : k, inside_a, transpose_a);
    const Matrices of_b(heads, transpose_b ? n : k, transpose_b ? k : n, inside_b, transpose_b);
    const Matrices of_made(heads, m, n, inside_made, false);
    const int64_t all = parts(pool, 2 * batch * heads * m * n * k, block), batches = std::min(all, batch), groups = std::min(all / batches, heads);
    const auto [rows, columns] = cuts(m, n, all / batches / groups);
    share(pool, batches * groups * rows * columns, [&, rows = rows, columns = columns](int64_t i) {
      const Range e(batch, batches, i / (groups * rows * columns)), h(heads, groups, i / (rows * columns) % groups);
      const Range r(m, rows, i / columns % rows), c(n, columns, i % columns);
      std::array<int64_t, 17> sizes{e.size(), h.size(), r.size(), k, c.size()};
      auto end = sizes.begin() + 5;
      for (const auto* steps : {&of_a.steps, &of_b.steps, &of_made.steps}) end = std::copy(steps->begin(), steps->end(), end);
      kept<Product>(sizes)(a.typed_data() + of_a.at(e.begin, h.begin, r.begin, 0),
                           b.typed_data() + of_b.at(e.begin, h.begin, 0, c.begin),
                           made->typed_data() + of_made.at(e.begin, h.begin, r.begin, c.begin));
    });
  });
}

// Convolutions.

enum Of { RESULT, INPUT, KERNEL };  // which of a convolution's three arrays is made from the other two

// One block of it.
struct Convolution {
  Of of;
  memory::desc image, kernel, result, scratch;
  memory::desc inner;    // the kernel as oneDNN has it
  Reorder reorder, add;  // of the kernel; add: where it is made, of a block that is not the first
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
    if (of == KERNEL)
      reorder = Reorder(inner, kernel), add = Reorder(inner, kernel, true);
    else if (inner != kernel)
      reorder = Reorder(kernel, inner);
  }

  // The kernel's data is as JAX has it, or, where it is made, as oneDNN has it.
  void operator()(float* x, float* k, float* y) const {
    dnnl::stream stream(cpu());
    const bool reorders = of != KERNEL && reorder;
    const Room room(scratch), for_inner(reorders ? inner : memory::desc());
    if (reorders) reorder(stream, k, for_inner.data);
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

ffi::Error convolve(ffi::ThreadPool& pool, Of of, ffi::Span<const int64_t> image, ffi::Span<const int64_t> kernel, Pads pads,
                    int64_t block, float* x, float* k, float* y) {
  return guarded([&] {
    const int64_t n = image[0], height = image[1], made = height + pads[0] + pads[1] - kernel[0] + 1;
    const int64_t width = image[2], made_width = width + pads[2] + pads[3] - kernel[1] + 1;
    const int64_t rows = of == INPUT ? height : made;
    // By images, and by rows of each where there are too few.
    const int64_t all = parts(pool, 2 * n * made * made_width * kernel[0] * kernel[1] * image[3] * kernel[3], block);
    const int64_t batches = std::min(all, n), bands = std::min(all / batches, rows);
    const auto run = [&](int64_t i, float* k) -> const Convolution& {
      const Part part(of, Range(n, batches, i / bands), height, kernel[0], made, pads[0], Range(rows, bands, i % bands));
      const auto& op = kept<Convolution>(std::array<int64_t, 12>{of, part.images.size(), part.image_rows.size(), width, image[3],
                                                                 kernel[0], kernel[1], kernel[3], part.top, part.bottom, pads[2],
                                                                 pads[3]});
      if (k)
        op(x + (part.images.begin * height + part.image_rows.begin) * width * image[3], k,
           y + (part.images.begin * made + part.result_rows.begin) * made_width * kernel[3]);
      return op;
    };
    if (of != KERNEL) return share(pool, batches * bands, [&](int64_t i) { run(i, k); });
    // Each block makes a kernel of its own; they are added in the same order always.
    std::deque<Room> kernels;
    const OneThread alone;
    for (int64_t i = 0; i < batches * bands; ++i) kernels.emplace_back(run(i, nullptr).inner);
    share(pool, batches * bands, [&](int64_t i) { run(i, static_cast<float*>(kernels[i].data)); });
    dnnl::stream stream(cpu());
    for (int64_t i = 0; i < batches * bands; ++i) {
      const auto& op = run(i, nullptr);
      (i ? op.add : op.reorder)(stream, kernels[i].data, k);
    }
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

auto of_two() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_product, product, of_two()
                                                             .Attr<bool>("transpose_a")
                                                             .Attr<bool>("transpose_b")
                                                             .Attr<bool>("inside_a")
                                                             .Attr<bool>("inside_b")
                                                             .Attr<bool>("inside_made")
                                                             .Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_result, result, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_input, input, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_kernel, kernel, of_two().Attr<Pads>("pads").Attr<int64_t>("block"));
