// Backward of similarity_forward.cpp.
//
// Only L + F scores of a pair have a gradient, so the gradients of a slot (a token or a frame) are
// sums of few feature rows of the other side. For a block of pairs, the rows of each slot are
// listed once; then, for each slice of the width, they are summed in registers. Each slot has two
// lists:
//   gathered   rows that the slot's own maxima selected, one per pair. Their sum, times the slot's
//              weight, is the slot's gradient. A maximum is linear in the features, so the gradient
//              of the weight is the inner product of the sum with the slot's features.
//   scattered  rows whose maxima selected this slot, times the weights of these rows.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "similarity_vectors.h"

namespace tvr {
namespace {

using at::Tensor;

constexpr int64_t kPanelBytes = 3 << 17;  // features read by one slice of a block
constexpr int64_t kListBytes = 1 << 17;   // lists of one block
#ifdef __AVX512F__
constexpr int kWide = 8;  // vectors of a row summed in registers
#else
constexpr int kWide = 4;
#endif

template <typename T>
struct Entry {  // a row of a table, and its factor
  int32_t row;
  T factor;
};

// Inputs of the backward; best_frame and best_token come from the forward.
template <typename T>
struct Pairs {
  int64_t texts, videos, frames, width;
  const int64_t* offsets;
  const T* gradient;        // (A, C), halved
  const T* weights;         // (R)
  const T* frame_weights;   // (C, F); nullptr without the video part
  const uint8_t* best_frame;
  const uint8_t* best_token;
};

// Tables of one side, texts or videos: a row of D numbers for each of its slots.
template <typename T>
struct Side {
  const T* gathered_table;   // rows that its maxima select
  const T* scattered_table;  // rows whose maxima select its slots
  const T* features;         // its own rows, for the gradient of the weights
  const T* weights;          // nullptr if its maxima are not part of the scores
  T* gathered_gradient;
  T* scattered_gradient;
  T* weight_gradient;
};

// Lists of a block. Slot i has the entries gathered[gathered_ends[i - 1]] up to, not including,
// gathered[gathered_ends[i]]; `scattered` has the same form.
template <typename T>
struct Lists {
  std::vector<Entry<T>> gathered, scattered;
  std::vector<int64_t> gathered_ends, scattered_ends;

  void clear() {
    gathered.clear();
    scattered.clear();
    gathered_ends.clear();
    scattered_ends.clear();
  }

  // Appends entries to `scattered`, grouped by slot (counting sort). visit(add) calls
  // add(slot, row, factor) for every entry, in the same order both times.
  template <typename Visit>
  void scatter(int64_t slots, const Visit& visit) {
    const int64_t base = int64_t(scattered.size());
    next.assign(slots + 1, 0);
    visit([&](int64_t slot, int64_t, T) { ++next[slot + 1]; });
    for (int64_t s = 0; s < slots; ++s) next[s + 1] += next[s];
    for (int64_t s = 0; s < slots; ++s) scattered_ends.push_back(base + next[s + 1]);
    scattered.resize(base + next[slots]);
    visit([&](int64_t slot, int64_t row, T factor) {
      scattered[base + next[slot]++] = {int32_t(row), factor};
    });
  }

 private:
  std::vector<int64_t> next;
};

// Lists of one text with videos [c0, c1). Tokens gather boosted frames; frames scatter to tokens.
template <typename T>
void list_text(const Pairs<T>& p, int64_t a, int64_t c0, int64_t c1, Lists<T>& to) {
  const T* gradient = p.gradient + a * p.videos;
  const int64_t begin = p.offsets[a], slots = p.offsets[a + 1] - begin;
  for (int64_t t = begin; t < begin + slots; ++t) {
    const uint8_t* best = p.best_frame + t * p.videos;
    for (int64_t c = c0; c < c1; ++c)
      to.gathered.push_back({int32_t(c * p.frames + best[c]), gradient[c]});
    to.gathered_ends.push_back(int64_t(to.gathered.size()));
  }
  to.scatter(slots, [&](const auto& add) {
    for (int64_t f = 0; p.frame_weights && f < p.frames; ++f) {
      const uint8_t* best = p.best_token + (a * p.frames + f) * p.videos;
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t row = c * p.frames + f;
        const T factor = gradient[c] * p.frame_weights[row];
        if (best[c] != kPadding && factor != 0) add(best[c], row, factor);
      }
    }
  });
}

// Lists of one video with texts [a0, a1): frames gather tokens, and tokens scatter to frames.
template <typename T>
void list_video(const Pairs<T>& p, int64_t c, int64_t a0, int64_t a1, Lists<T>& to) {
  for (int64_t f = 0; f < p.frames; ++f) {
    // Weight 0 is a masked frame, or an underflow of the softmax, whose gradient is 0 as well.
    for (int64_t a = a0; p.frame_weights && p.frame_weights[c * p.frames + f] != 0 && a < a1; ++a) {
      const uint8_t best = p.best_token[(a * p.frames + f) * p.videos + c];
      if (best != kPadding)
        to.gathered.push_back({int32_t(p.offsets[a] + best), p.gradient[a * p.videos + c]});
    }
    to.gathered_ends.push_back(int64_t(to.gathered.size()));
  }
  to.scatter(p.frames, [&](const auto& add) {
    for (int64_t a = a0; a < a1; ++a) {
      const T gradient = p.gradient[a * p.videos + c];
      for (int64_t t = p.offsets[a]; t < p.offsets[a + 1]; ++t)
        add(p.best_frame[t * p.videos + c], t, gradient * p.weights[t]);
    }
  });
}

template <typename T, int N>
inline void sum_rows(const Entry<T>* entry, const Entry<T>* end, const T* table, int64_t width,
                     typename Vectors<T>::Value (&sum)[N]) {
  for (; entry != end; ++entry) {
    const T* row = table + entry->row * width;
    for (int k = 0; k < N; ++k) sum[k] += entry->factor * load(row + k * kLanes);
  }
}

template <typename T, int N>
inline void add_to(T* to, T factor, const typename Vectors<T>::Value (&sum)[N]) {
  for (int k = 0; k < N; ++k)
    store(to + k * kLanes, load(to + k * kLanes) + factor * sum[k]);
}

// Adds columns d to d + 16 N of the listed rows to the slots from `first` on.
template <typename T, int N>
void add_slice(const Side<T>& side, const Lists<T>& lists, int64_t first, int64_t width,
               int64_t d) {
  int64_t gathered = 0, scattered = 0;
  for (size_t i = 0; i < lists.gathered_ends.size(); ++i) {
    const int64_t slot = first + int64_t(i), at = slot * width + d;
    if (gathered < lists.gathered_ends[i]) {
      typename Vectors<T>::Value sum[N] = {}, inner = {};
      sum_rows<T, N>(&lists.gathered[gathered], &lists.gathered[0] + lists.gathered_ends[i],
                     side.gathered_table + d, width, sum);
      for (int k = 0; k < N; ++k) inner += load(side.features + at + k * kLanes) * sum[k];
      T total = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) total += inner[lane];
      side.weight_gradient[slot] += total;
      add_to<T, N>(side.gathered_gradient + at, side.weights[slot], sum);
    }
    if (scattered < lists.scattered_ends[i]) {
      typename Vectors<T>::Value sum[N] = {};
      sum_rows<T, N>(&lists.scattered[scattered], &lists.scattered[0] + lists.scattered_ends[i],
                     side.scattered_table + d, width, sum);
      add_to<T, N>(side.scattered_gradient + at, T(1), sum);
    }
    gathered = lists.gathered_ends[i];
    scattered = lists.scattered_ends[i];
  }
}

template <typename T>
void add_block(const Side<T>& side, const Lists<T>& lists, int64_t first, int64_t width) {
  int64_t d = 0;
  for (; d + kWide * kLanes <= width; d += kWide * kLanes)
    add_slice<T, kWide>(side, lists, first, width, d);
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) add_slice<T, 2>(side, lists, first, width, d);
  for (; d < width; d += kLanes) add_slice<T, 1>(side, lists, first, width, d);
}

// Adds the gradients of all `rows` of one side (texts or videos), each with all `others` of the
// other side, block by block. A row has `slots` slots on average, one of the other
// side `rows_each`.
template <typename T, typename List, typename First>
void all_blocks(const Side<T>& side, int64_t rows, int64_t others, int64_t slots, int64_t rows_each,
                int64_t width, const List& list, const First& first_slot) {
  const int64_t slice = std::min<int64_t>(width, kWide * kLanes) * int64_t(sizeof(T));
  const int64_t panel = std::max<int64_t>(1, kPanelBytes / (rows_each * slice));
  const int64_t row_bytes =
      (slots + rows_each) * std::min(panel, others) * int64_t(sizeof(Entry<T>));
  const int64_t step = std::max<int64_t>(1, kListBytes / std::max<int64_t>(1, row_bytes));
  at::parallel_for(0, (rows + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    Lists<T> lists;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t r0 = block * step, r1 = std::min(rows, r0 + step);
      for (int64_t o = 0; o < others; o += panel) {
        lists.clear();
        for (int64_t r = r0; r < r1; ++r) list(r, o, std::min(others, o + panel), lists);
        add_block(side, lists, first_slot(r0), width);
      }
    }
  });
}

// Pads the width to a multiple of kLanes.
Tensor whole_lanes(const Tensor& features) {
  const int64_t missing = (kLanes - features.size(-1) % kLanes) % kLanes;
  return missing ? at::constant_pad_nd(features, {0, missing}) : features.contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gradient, const Tensor& tokens_in, const Tensor& weights_in,
    const Tensor& offsets, const Tensor& frames_in, const std::optional<Tensor>& frame_weights_in,
    const std::optional<Tensor>& boosted_in, const Tensor& best_frame, const Tensor& best_token) {
  const int64_t width = tokens_in.size(1);
  const Tensor tokens = whole_lanes(tokens_in), frames = whole_lanes(frames_in);
  const Tensor boosted = boosted_in ? whole_lanes(*boosted_in) : frames;
  const Tensor weights = weights_in.contiguous(), pairs = at::mul(gradient, 0.5).contiguous();
  Tensor frame_weights, d_frame_weights = at::empty({0}, tokens.options());
  if (frame_weights_in) {
    frame_weights = frame_weights_in->contiguous();
    d_frame_weights = at::zeros_like(frame_weights);
  }
  const Tensor d_tokens = at::zeros_like(tokens), d_weights = at::zeros_like(weights);
  const Tensor d_frames = at::zeros_like(frames);
  const Tensor d_boosted = boosted_in ? at::zeros_like(boosted) : d_frames;
  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "similarity_backward", [&] {
    using T = scalar_t;
    const Pairs<T> p{gradient.size(0), gradient.size(1), frames.size(1), tokens.size(1),
                     offsets.const_data_ptr<int64_t>(), pairs.const_data_ptr<T>(),
                     weights.const_data_ptr<T>(),
                     frame_weights_in ? frame_weights.const_data_ptr<T>() : nullptr,
                     best_frame.const_data_ptr<uint8_t>(), best_token.const_data_ptr<uint8_t>()};
    if (p.texts == 0 || p.videos == 0) return;
    const T* x = tokens.const_data_ptr<T>();
    const T* v = frames.const_data_ptr<T>();
    T* d_x = d_tokens.data_ptr<T>();
    const Side<T> text_side{boosted.const_data_ptr<T>(), v, x, p.weights, d_x, d_x,
                          d_weights.data_ptr<T>()};
    const Side<T> video_side{x, x, v, p.frame_weights, d_frames.data_ptr<T>(),
                           d_boosted.data_ptr<T>(),
                           frame_weights_in ? d_frame_weights.data_ptr<T>() : nullptr};
    const int64_t tokens_each = std::max<int64_t>(1, tokens.size(0) / p.texts);
    all_blocks(
        text_side, p.texts, p.videos, tokens_each, p.frames, p.width,
        [&](int64_t a, int64_t c0, int64_t c1, Lists<T>& to) { list_text(p, a, c0, c1, to); },
        [&](int64_t a) { return p.offsets[a]; });
    all_blocks(
        video_side, p.videos, p.texts, p.frames, tokens_each, p.width,
        [&](int64_t c, int64_t a0, int64_t a1, Lists<T>& to) { list_video(p, c, a0, a1, to); },
        [&](int64_t c) { return c * p.frames; });
  });
  const auto cut = [&](const Tensor& x) { return x.narrow(-1, 0, width); };
  return {cut(d_tokens), d_weights, cut(d_frames), d_frame_weights, cut(d_boosted)};
}

}  // namespace
}  // namespace tvr

TORCH_LIBRARY_IMPL(tvr_kernels, CPU, library) {
  library.impl("similarity_backward", &tvr::backward);
}
