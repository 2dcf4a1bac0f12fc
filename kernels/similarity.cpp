// The similarity of one token set with all videos, and its gradients, for float and double on a
// CPU. kernels/reference.py defines it and its letters; kernels/similarity.py is the caller.
//
// Forward: tiles of texts x videos. One matrix product fills a scratch that stays in the cache;
// videos lie side by side in it, so that maxima run across vector lanes. Kept are the sums and one
// byte per maximum. Backward: a pair has only L + F scores with a gradient, hence sums of few rows
// instead of dense products. A maximum is linear in its features, so the gradient of a weight is
// the inner product of those sums with the features, and no maximum need be stored.
// Every sum runs in an order that does not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;              // videos side by side, and the unit of width
constexpr int64_t kGroups = 4;              // lanes of videos in one matrix product
constexpr int64_t kScratchBytes = 1 << 19;  // the scores of one tile
constexpr int64_t kPanelBytes = 1 << 18;    // the features that one backward tile reads
#ifdef __AVX512F__
constexpr int kWide = 8;  // vectors of a row that are summed in registers
#else
constexpr int kWide = 4;
#endif

template <typename T>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Value __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(int32_t))));
};
template <>
struct Vectors<double> {
  typedef double Value __attribute__((vector_size(kLanes * sizeof(double))));
  typedef int64_t Index __attribute__((vector_size(kLanes * sizeof(int64_t))));
};

template <typename T>
inline typename Vectors<T>::Value load(const T* from) {
  typename Vectors<T>::Value value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void store(T* to, const typename Vectors<T>::Value& value) {
  std::memcpy(to, &value, sizeof(value));
}

// The largest of `count` vectors that lie `stride` apart, lane by lane, and where it stood first.
// A NaN anywhere makes the pair NaN: its token or frame is NaN everywhere, in the first slot too.
template <typename T>
inline void first_maximum(const T* from, int64_t stride, int64_t count,
                          typename Vectors<T>::Value& best, typename Vectors<T>::Index& where) {
  typename Vectors<T>::Value top = load(from);
  typename Vectors<T>::Index at = {}, here = {};
  for (int64_t n = 1; n < count; ++n) {
    const typename Vectors<T>::Value value = load(from + n * stride);
    const auto larger = value > top;
    here += 1;
    top = larger ? value : top;
    at = larger ? here : at;
  }
  best = top;
  where = at;
}

// ---------------------------------------------------------------------------------- forward

struct Sizes {
  int64_t texts, videos, tokens, frames, width, groups;
};

// (C, F, ...) as (groups, F, lanes, ...), zeros where there is no video.
Tensor in_lanes(const Tensor& table, const Sizes& n) {
  std::vector<int64_t> padding(2 * table.dim(), 0);
  padding.back() = n.groups * kLanes - n.videos;
  const Tensor padded = at::constant_pad_nd(table, padding);
  std::vector<int64_t> shape = {n.groups, kLanes};
  shape.insert(shape.end(), padded.sizes().begin() + 1, padded.sizes().end());
  return padded.view(shape).transpose(1, 2).contiguous();
}

template <typename T>
struct Tables {  // in lanes, except `weights`
  const T* weights;
  const T* frame_weights;
  const T* strength;         // nullptr without neighbour frames
  const int64_t* neighbour;
  T* scores;
  uint8_t* best_frame;       // nullptr where no gradient is wanted
  uint8_t* best_token;
};

// One text with one group of videos; `scores` is its first row in the scratch, `step` a row.
template <typename T>
void score_group(const T* scores, int64_t step, int64_t text, int64_t group, const Sizes& n,
                 const Tables<T>& to) {
  typename Vectors<T>::Value sum = {}, best;
  typename Vectors<T>::Index where;
  const int64_t first = group * kLanes;
  const int64_t used = std::min(kLanes, n.videos - first);
  const int64_t table = group * n.frames * kLanes;
  for (int64_t t = 0; t < n.tokens; ++t) {
    const T* row = scores + t * step;
    first_maximum(row, kLanes, n.frames, best, where);
    if (to.strength) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t slot = table + where[lane] * kLanes + lane;
        const T related = row[to.neighbour[slot] * kLanes + lane];
        best[lane] += T(0.5) * to.strength[slot] * related;
      }
    }
    sum += to.weights[text * n.tokens + t] * best;
    if (to.best_frame) {
      uint8_t* kept = to.best_frame + (text * n.videos + first) * n.tokens + t;
      for (int64_t lane = 0; lane < used; ++lane) kept[lane * n.tokens] = uint8_t(where[lane]);
    }
  }
  for (int64_t f = 0; f < n.frames; ++f) {
    first_maximum(scores + f * kLanes, step, n.tokens, best, where);
    sum += load(to.frame_weights + table + f * kLanes) * best;
    if (to.best_token) {
      uint8_t* kept = to.best_token + (text * n.videos + first) * n.frames + f;
      for (int64_t lane = 0; lane < used; ++lane) kept[lane * n.frames] = uint8_t(where[lane]);
    }
  }
  T* out = to.scores + text * n.videos + first;
  for (int64_t lane = 0; lane < used; ++lane) out[lane] = sum[lane] / 2;
}

template <typename T>
void score_all(const Tensor& tokens, const Tensor& panels, const Sizes& n, const Tables<T>& to) {
  const int64_t row_bytes = n.tokens * kGroups * n.frames * kLanes * int64_t(sizeof(T));
  const int64_t text_step = std::clamp<int64_t>(kScratchBytes / row_bytes, 1, std::max<int64_t>(1, n.texts));
  const int64_t group_step = std::clamp<int64_t>(n.groups, 1, kGroups);
  const int64_t across = (n.groups + group_step - 1) / group_step;
  const int64_t down = (n.texts + text_step - 1) / text_step;
  const Tensor rows = tokens.view({n.texts * n.tokens, n.width});
  at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const int64_t in_group = n.frames * kLanes;
    const Tensor scratch =
        at::empty({text_step * n.tokens * group_step * in_group}, tokens.options());
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t text = tile / across * text_step, group = tile % across * group_step;
      const int64_t num_texts = std::min(text_step, n.texts - text);
      const int64_t num_groups = std::min(group_step, n.groups - group);
      const int64_t height = num_texts * n.tokens, step = num_groups * in_group;
      Tensor out = scratch.narrow(0, 0, height * step).view({height, step});
      at::mm_out(out, rows.narrow(0, text * n.tokens, height),
                 panels.narrow(0, group * in_group, step).t());
      const T* found = out.const_data_ptr<T>();
      for (int64_t a = 0; a < num_texts; ++a)
        for (int64_t g = 0; g < num_groups; ++g)
          score_group(found + a * n.tokens * step + g * in_group, step, text + a, group + g, n, to);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& tokens_in, const Tensor& weights_in,
                                           const Tensor& frames, const Tensor& frame_weights_in,
                                           const std::optional<Tensor>& strength_in,
                                           const std::optional<Tensor>& neighbour_in, bool keep) {
  const Tensor tokens = tokens_in.contiguous(), weights = weights_in.contiguous();
  Sizes n{tokens.size(0), frames.size(0), tokens.size(1), frames.size(1), tokens.size(2), 0};
  n.groups = (n.videos + kLanes - 1) / kLanes;
  const Tensor panels = in_lanes(frames, n).view({n.groups * n.frames * kLanes, n.width});
  const Tensor frame_weights = in_lanes(frame_weights_in, n);
  Tensor strength, neighbour;
  if (strength_in) strength = in_lanes(*strength_in, n);
  if (neighbour_in) neighbour = in_lanes(*neighbour_in, n);
  const Tensor scores = at::empty({n.texts, n.videos}, tokens.options());
  const auto bytes = tokens.options().dtype(at::kByte);
  const int64_t kept = keep ? n.texts : 0;
  const Tensor best_frame = at::empty({kept, n.videos, n.tokens}, bytes);
  const Tensor best_token = at::empty({kept, n.videos, n.frames}, bytes);
  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "similarity_forward", [&] {
    score_all<scalar_t>(
        tokens, panels, n,
        {weights.const_data_ptr<scalar_t>(), frame_weights.const_data_ptr<scalar_t>(),
         strength.defined() ? strength.const_data_ptr<scalar_t>() : nullptr,
         neighbour.defined() ? neighbour.const_data_ptr<int64_t>() : nullptr,
         scores.data_ptr<scalar_t>(), keep ? best_frame.data_ptr<uint8_t>() : nullptr,
         keep ? best_token.data_ptr<uint8_t>() : nullptr});
  });
  return {scores, best_frame, best_token};
}

// --------------------------------------------------------------------------------- backward

// One side of the pairs. The text side has `slots` tokens in each row, and its maxima name slots
// of the other side; the video side likewise. The two sides do the same work with roles swapped.
template <typename T>
struct Side {
  int64_t rows, slots;
  int64_t row_step;             // from a row to the next in a table of pairs
  const T* weights;             // (rows, slots)
  const T* features;            // (rows, slots, D), as scored by this side's own maxima
  const T* met;                 // the same slots, as the other side's maxima see them
  const uint8_t* maxima;        // which slot of the other side each slot met
  T* own_gradient;              // of `features`
  T* met_gradient;              // of `met`
  T* weight_gradient;
};

// sum += factor x row, N vectors wide, in memory.
template <typename T, int N>
inline void add_row(T* sum, T factor, const T* row) {
  for (int k = 0; k < N; ++k)
    store(sum + k * kLanes, load(sum + k * kLanes) + factor * load(row + k * kLanes));
}

// For rows [r0, r1) of one side and [o0, o1) of the other, columns d on, N vectors of them.
template <typename T, int N>
void add_gradients(const Side<T>& mine, const Side<T>& other, const T* pair_gradient, int64_t width,
                   int64_t r0, int64_t r1, int64_t o0, int64_t o1, int64_t d) {
  for (int64_t r = r0; r < r1; ++r) {
    const T* pairs = pair_gradient + r * mine.row_step;
    for (int64_t s = 0; s < mine.slots; ++s) {
      // Weight 0 is a masked slot (or an underflown softmax, which passes no gradient either).
      const int64_t slot = r * mine.slots + s;
      if (mine.weights[slot] == 0) continue;
      typename Vectors<T>::Value sum[N] = {};
      for (int64_t o = o0; o < o1; ++o) {
        const int64_t pair = r * mine.row_step + o * other.row_step;
        const int64_t chosen = o * other.slots + mine.maxima[pair * mine.slots + s];
        const T factor = pairs[o * other.row_step];
        const T* row = other.met + chosen * width + d;
        for (int k = 0; k < N; ++k) sum[k] += factor * load(row + k * kLanes);
      }
      T* gradient = mine.own_gradient + slot * width + d;
      const T* feature = mine.features + slot * width + d;
      typename Vectors<T>::Value inner = {};
      for (int k = 0; k < N; ++k) {
        inner += load(feature + k * kLanes) * sum[k];
        store(gradient + k * kLanes, load(gradient + k * kLanes) + mine.weights[slot] * sum[k]);
      }
      T total = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) total += inner[lane];
      mine.weight_gradient[slot] += total;
    }
    // What the other side's maxima, each with its weight, send to the slots of this row.
    for (int64_t o = o0; o < o1; ++o) {
      const uint8_t* maxima =
          other.maxima + (r * mine.row_step + o * other.row_step) * other.slots;
      for (int64_t s = 0; s < other.slots; ++s) {
        const T factor = pairs[o * other.row_step] * other.weights[o * other.slots + s];
        if (factor == 0) continue;
        const int64_t chosen = r * mine.slots + maxima[s];
        add_row<T, N>(mine.met_gradient + chosen * width + d, factor,
                      other.features + (o * other.slots + s) * width + d);
      }
    }
  }
}

template <typename T>
void gradients_of(const Side<T>& mine, const Side<T>& other, const T* pair_gradient,
                  int64_t width) {
  const int64_t bytes = other.slots * kWide * kLanes * int64_t(sizeof(T));
  const int64_t other_step = std::max<int64_t>(1, kPanelBytes / bytes);
  at::parallel_for(0, mine.rows, 1, [&](int64_t r0, int64_t r1) {
    for (int64_t o0 = 0; o0 < other.rows; o0 += other_step) {
      const int64_t o1 = std::min(other.rows, o0 + other_step);
      int64_t d = 0;
      for (; d + kWide * kLanes <= width; d += kWide * kLanes)
        add_gradients<T, kWide>(mine, other, pair_gradient, width, r0, r1, o0, o1, d);
      for (; d < width; d += kLanes)
        add_gradients<T, 1>(mine, other, pair_gradient, width, r0, r1, o0, o1, d);
    }
  });
}

// Width a multiple of the lanes.
Tensor whole_lanes(const Tensor& features) {
  const int64_t missing = (kLanes - features.size(2) % kLanes) % kLanes;
  return missing ? at::constant_pad_nd(features, {0, missing}) : features.contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& gradient, const Tensor& tokens_in, const Tensor& weights_in,
    const Tensor& frames_in, const Tensor& frame_weights_in,
    const std::optional<Tensor>& boosted_in, const Tensor& best_frame, const Tensor& best_token) {
  const int64_t width = tokens_in.size(2);
  const Tensor tokens = whole_lanes(tokens_in), frames = whole_lanes(frames_in);
  const Tensor boosted = boosted_in ? whole_lanes(*boosted_in) : frames;
  const Tensor weights = weights_in.contiguous(), frame_weights = frame_weights_in.contiguous();
  const Tensor pairs = at::mul(gradient, 0.5).contiguous();
  const Tensor d_tokens = at::zeros_like(tokens), d_weights = at::zeros_like(weights);
  const Tensor d_frames = at::zeros_like(frames), d_frame_weights = at::zeros_like(frame_weights);
  const Tensor d_boosted = boosted_in ? at::zeros_like(boosted) : d_frames;
  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "similarity_backward", [&] {
    using T = scalar_t;
    const int64_t num_texts = tokens.size(0), num_videos = frames.size(0);
    const T* x = tokens.const_data_ptr<T>();
    T* d_x = d_tokens.data_ptr<T>();
    // A token's maximum chooses among the boosted frames, a frame's among the tokens.
    const Side<T> text{num_texts, tokens.size(1), num_videos, weights.const_data_ptr<T>(), x, x,
                       best_frame.const_data_ptr<uint8_t>(), d_x, d_x, d_weights.data_ptr<T>()};
    const Side<T> video{num_videos, frames.size(1), 1, frame_weights.const_data_ptr<T>(),
                        frames.const_data_ptr<T>(), boosted.const_data_ptr<T>(),
                        best_token.const_data_ptr<uint8_t>(), d_frames.data_ptr<T>(),
                        d_boosted.data_ptr<T>(), d_frame_weights.data_ptr<T>()};
    gradients_of(text, video, pairs.const_data_ptr<T>(), tokens.size(2));
    gradients_of(video, text, pairs.const_data_ptr<T>(), tokens.size(2));
  });
  const auto cut = [&](const Tensor& x) { return x.narrow(2, 0, width); };
  return {cut(d_tokens), d_weights, cut(d_frames), d_frame_weights, cut(d_boosted)};
}

}  // namespace

TORCH_LIBRARY(tvr_kernels, library) {
  library.def(
      "similarity_forward(Tensor tokens, Tensor weights, Tensor frames, Tensor frame_weights,"
      " Tensor? strength, Tensor? neighbour, bool keep) -> (Tensor, Tensor, Tensor)");
  library.def(
      "similarity_backward(Tensor gradient, Tensor tokens, Tensor weights, Tensor frames,"
      " Tensor frame_weights, Tensor? boosted, Tensor best_frame, Tensor best_token)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tvr_kernels, CPU, library) {
  library.impl("similarity_forward", &forward);
  library.impl("similarity_backward", &backward);
}
