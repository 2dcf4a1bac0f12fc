// The gradients of similarity_forward.cpp's sums.
//
// A pair has only L + F scores with a gradient, so the gradients are sums of few rows of the other
// side's features instead of dense products. For a block of pairs the rows that each slot needs are
// listed once; then, for a slice of the width, a slot's rows are summed in registers. The two sides
// do the same work with roles swapped:
//   own  rows that the slot's maxima met, each once a pair, times the slot's weight. A maximum is
//        linear in its features, so the weight's gradient is their inner product with the sum, and
//        no maximum need be stored.
//   met  rows whose maxima met the slot, times their weights.

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

constexpr int64_t kPanelBytes = 3 << 17;  // the features that one slice of a block reads
constexpr int64_t kListBytes = 1 << 17;   // the lists of one block
#ifdef __AVX512F__
constexpr int kWide = 8;  // vectors of a row that are summed in registers
#else
constexpr int kWide = 4;
#endif

template <typename T>
struct Entry {  // one row of a table, and its factor
  int32_t row;
  T factor;
};

// The pairs and their maxima, as the forward left them.
template <typename T>
struct Pairs {
  int64_t texts, videos, frames, width;
  const int64_t* offsets;
  const T* gradient;        // (A, C), halved
  const T* weights;         // (R)
  const T* frame_weights;   // (C, F), nullptr without the video part
  const uint8_t* best_frame;
  const uint8_t* best_token;
};

// What one side reads and writes, a row of D for each of its slots (tokens, or frames).
template <typename T>
struct Side {
  const T* own_table;   // rows that its maxima chose from
  const T* met_table;   // rows that chose among its slots
  const T* features;    // its slots, for the gradient of their weights
  const T* weights;     // nullptr: its maxima are no part of the sum
  T* own_gradient;
  T* met_gradient;
  T* weight_gradient;
};

// Lists of a block: those of slot i are own[own_ends[i - 1]] to own[own_ends[i]], met likewise.
template <typename T>
struct Lists {
  std::vector<Entry<T>> own, met;
  std::vector<int64_t> own_ends, met_ends;

  void clear() {
    own.clear();
    met.clear();
    own_ends.clear();
    met_ends.clear();
  }

  // Adds to `met` what `visit` finds, slot by slot and in its order; visit(take) calls
  // take(slot, row, factor) for each entry, alike both times.
  template <typename Visit>
  void sort_in(int64_t slots, const Visit& visit) {
    const int64_t base = int64_t(met.size());
    places.assign(slots + 1, 0);
    visit([&](int64_t slot, int64_t, T) { ++places[slot + 1]; });
    for (int64_t s = 0; s < slots; ++s) places[s + 1] += places[s];
    for (int64_t s = 0; s < slots; ++s) met_ends.push_back(base + places[s + 1]);
    met.resize(base + places[slots]);
    visit([&](int64_t slot, int64_t row, T factor) {
      met[base + places[slot]++] = {int32_t(row), factor};
    });
  }

 private:
  std::vector<int64_t> places;
};

// One text with videos [c0, c1): its tokens' own rows are boosted frames, those met are frames.
template <typename T>
void list_text(const Pairs<T>& p, int64_t a, int64_t c0, int64_t c1, Lists<T>& to) {
  const T* gradient = p.gradient + a * p.videos;
  const int64_t begin = p.offsets[a], slots = p.offsets[a + 1] - begin;
  for (int64_t t = begin; t < begin + slots; ++t) {
    const uint8_t* best = p.best_frame + t * p.videos;
    for (int64_t c = c0; c < c1; ++c)
      to.own.push_back({int32_t(c * p.frames + best[c]), gradient[c]});
    to.own_ends.push_back(int64_t(to.own.size()));
  }
  to.sort_in(slots, [&](const auto& take) {
    for (int64_t f = 0; p.frame_weights && f < p.frames; ++f) {
      const uint8_t* best = p.best_token + (a * p.frames + f) * p.videos;
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t row = c * p.frames + f;
        const T factor = gradient[c] * p.frame_weights[row];
        if (best[c] != kPadding && factor != 0) take(best[c], row, factor);
      }
    }
  });
}

// One video with texts [a0, a1): both its own rows and those met are tokens.
template <typename T>
void list_video(const Pairs<T>& p, int64_t c, int64_t a0, int64_t a1, Lists<T>& to) {
  for (int64_t f = 0; f < p.frames; ++f) {
    // A weight of 0 is a masked frame, or an underflown softmax, which passes no gradient either.
    for (int64_t a = a0; p.frame_weights && p.frame_weights[c * p.frames + f] != 0 && a < a1; ++a) {
      const uint8_t best = p.best_token[(a * p.frames + f) * p.videos + c];
      if (best != kPadding)
        to.own.push_back({int32_t(p.offsets[a] + best), p.gradient[a * p.videos + c]});
    }
    to.own_ends.push_back(int64_t(to.own.size()));
  }
  to.sort_in(p.frames, [&](const auto& take) {
    for (int64_t a = a0; a < a1; ++a) {
      const T gradient = p.gradient[a * p.videos + c];
      for (int64_t t = p.offsets[a]; t < p.offsets[a + 1]; ++t)
        take(p.best_frame[t * p.videos + c], t, gradient * p.weights[t]);
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

// Columns d to d + 16 N of the slots from `first` on whose rows are listed.
template <typename T, int N>
void add_slice(const Side<T>& side, const Lists<T>& lists, int64_t first, int64_t width, int64_t d) {
  int64_t own = 0, met = 0;
  for (size_t i = 0; i < lists.own_ends.size(); ++i) {
    const int64_t slot = first + int64_t(i), at = slot * width + d;
    if (own < lists.own_ends[i]) {
      typename Vectors<T>::Value sum[N] = {}, inner = {};
      sum_rows<T, N>(&lists.own[own], &lists.own[0] + lists.own_ends[i], side.own_table + d, width,
                     sum);
      for (int k = 0; k < N; ++k) inner += load(side.features + at + k * kLanes) * sum[k];
      T total = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) total += inner[lane];
      side.weight_gradient[slot] += total;
      add_to<T, N>(side.own_gradient + at, side.weights[slot], sum);
    }
    if (met < lists.met_ends[i]) {
      typename Vectors<T>::Value sum[N] = {};
      sum_rows<T, N>(&lists.met[met], &lists.met[0] + lists.met_ends[i], side.met_table + d, width,
                     sum);
      add_to<T, N>(side.met_gradient + at, T(1), sum);
    }
    own = lists.own_ends[i];
    met = lists.met_ends[i];
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

// `rows` of one side (texts or videos) with `others` of the other, block by block.
template <typename T, typename List, typename First>
void all_blocks(const Side<T>& side, int64_t rows, int64_t others, int64_t slots, int64_t rows_each,
                int64_t width, const List& list, const First& first_slot) {
  const int64_t slice = std::min<int64_t>(width, kWide * kLanes) * int64_t(sizeof(T));
  const int64_t panel = std::max<int64_t>(1, kPanelBytes / (rows_each * slice));
  const int64_t of_row = (slots + rows_each) * std::min(panel, others) * int64_t(sizeof(Entry<T>));
  const int64_t step = std::max<int64_t>(1, kListBytes / std::max<int64_t>(1, of_row));
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

// Width a multiple of the lanes.
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
    const Side<T> of_text{boosted.const_data_ptr<T>(), v, x, p.weights, d_x, d_x,
                          d_weights.data_ptr<T>()};
    const Side<T> of_video{x, x, v, p.frame_weights, d_frames.data_ptr<T>(),
                           d_boosted.data_ptr<T>(),
                           frame_weights_in ? d_frame_weights.data_ptr<T>() : nullptr};
    const int64_t tokens_each = std::max<int64_t>(1, tokens.size(0) / p.texts);
    all_blocks(
        of_text, p.texts, p.videos, tokens_each, p.frames, p.width,
        [&](int64_t a, int64_t c0, int64_t c1, Lists<T>& to) { list_text(p, a, c0, c1, to); },
        [&](int64_t a) { return p.offsets[a]; });
    all_blocks(
        of_video, p.videos, p.texts, p.frames, tokens_each, p.width,
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
