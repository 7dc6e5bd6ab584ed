// How a call is cut into blocks, which threads of XLA's own pool do, each by oneDNN on one thread: threads of oneDNN's own
// would wait asleep, 0.1 ms for each operation, or take the cores from XLA's.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

// OpenMP's, of the calling thread alone.
extern "C" int omp_get_max_threads(void);
extern "C" void omp_set_num_threads(int);

namespace onednn {

namespace ffi = xla::ffi;
using dnnl::memory;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;
using Tag = memory::format_tag;

// What every call is given; then its attributes.
inline auto of_two() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>(); }

inline const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

struct OneThread {
  const int before = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before); }
};

// Into how many blocks of at least so much work to cut.
inline int64_t parts(const ffi::ThreadPool& pool, int64_t work, int64_t block) {
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
inline dnnl::primitive_attr without_memory() {
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

}  // namespace onednn
