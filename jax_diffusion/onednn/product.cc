// Matrix products, which XLA calls; compiled and registered by library.py. float32.

#include <utility>

#include "blocks.h"

namespace onednn {
namespace {

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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(onednn_product, product, of_two()
                                                             .Attr<bool>("transpose_a")
                                                             .Attr<bool>("transpose_b")
                                                             .Attr<bool>("inside_a")
                                                             .Attr<bool>("inside_b")
                                                             .Attr<bool>("inside_made")
                                                             .Attr<int64_t>("block"));

}  // namespace onednn
