// The similarity of one token set with all videos, for float and double on a CPU.
// kernels/reference.py defines it and its letters; kernels/similarity.py is the caller.
//
// Tokens are packed, so that padding costs nothing: of the R valid tokens, text a has those from
// offsets[a] to offsets[a + 1]. A tile is one matrix product of some texts with some videos, in a
// scratch that stays in the cache. Videos are contiguous in it, so that one vector instruction
// advances the maxima of 16 videos. The results are the scores and, for the backward, one byte per
// maximum:
//   best_frame (R, C)     index of the best frame of each token
//   best_token (A, F, C)  index of the best token of each frame, or kPadding
// The order of every sum is independent of the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "similarity_vectors.h"

namespace tvr {
namespace {

using at::Tensor;

constexpr int64_t kGroups = 4;              // groups of 16 videos in one matrix product
constexpr int64_t kScratchBytes = 1 << 19;  // the scores of one tile

using Linear = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                      c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

struct Shape {
  int64_t texts, tokens, videos, frames, width, groups;
};

template <typename T>
struct Tables {  // inputs and outputs; "in lanes" is the layout of in_lanes()
  const int64_t* offsets;    // (A + 1)
  const bool* padded;        // (A) true if the text has a padded slot, which has similarity 0
  const T* weights;          // (R)
  const T* frame_weights;    // in lanes; nullptr skips the video part
  const T* strength;         // in lanes; nullptr without neighbour frames
  const int64_t* neighbour;  // in lanes
  T* scores;                 // (A, C)
  uint8_t* best_frame;       // nullptr if no gradient is needed
  uint8_t* best_token;
};

// Rearranges (C, F, ...) to (groups, F, lanes, ...), with zeros after the last video.
Tensor in_lanes(const Tensor& table, const Shape& n) {
  std::vector<int64_t> padding(2 * table.dim(), 0);
  padding.back() = n.groups * kLanes - n.videos;
  const Tensor padded = padding.back() ? at::constant_pad_nd(table, padding) : table;
  std::vector<int64_t> shape = {n.groups, kLanes};
  shape.insert(shape.end(), padded.sizes().begin() + 1, padded.sizes().end());
  return padded.reshape(shape).transpose(1, 2).contiguous();
}

// Maximum of `count` vectors, `stride` apart, and its first index, lane by lane. The scores of a
// token or frame with a NaN are all NaN, the first one too, so the maximum is NaN.
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

template <typename Index>
inline void store_bytes(uint8_t* to, const Index& where, int64_t used) {
  for (int64_t lane = 0; lane < used; ++lane) to[lane] = uint8_t(where[lane]);
}

// Scores one text with one group of videos. `scores` is the text's first row in the scratch, and
// `step` is the length of a row.
template <typename T>
void score_group(const T* scores, int64_t step, int64_t text, int64_t group, const Shape& n,
                 const Tables<T>& to) {
  typename Vectors<T>::Value sum = {}, best;
  typename Vectors<T>::Index where;
  const int64_t first = group * kLanes, used = std::min(kLanes, n.videos - first);
  const int64_t table = group * n.frames * kLanes;
  const int64_t begin = to.offsets[text], count = to.offsets[text + 1] - begin;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = scores + t * step;
    first_maximum(row, kLanes, n.frames, best, where);
    if (to.strength) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t slot = table + where[lane] * kLanes + lane;
        best[lane] += T(0.5) * to.strength[slot] * row[to.neighbour[slot] * kLanes + lane];
      }
    }
    sum += to.weights[begin + t] * best;
    if (to.best_frame) store_bytes(to.best_frame + (begin + t) * n.videos + first, where, used);
  }
  for (int64_t f = 0; to.frame_weights && f < n.frames; ++f) {
    first_maximum(scores + f * kLanes, step, count, best, where);
    if (to.padded[text]) {
      const auto below = best < T(0);
      best = below ? typename Vectors<T>::Value{} : best;
      where = below ? typename Vectors<T>::Index{} + kPadding : where;
    }
    sum += load(to.frame_weights + table + f * kLanes) * best;
    if (to.best_token)
      store_bytes(to.best_token + (text * n.frames + f) * n.videos + first, where, used);
  }
  T* out = to.scores + text * n.videos + first;
  for (int64_t lane = 0; lane < used; ++lane) out[lane] = sum[lane] / 2;
}

// First text of each tile. A tile has as many texts as the scratch holds, and at least one.
std::vector<int64_t> tile_starts(const int64_t* offsets, int64_t texts, int64_t most_rows) {
  std::vector<int64_t> starts = {0};
  for (int64_t text = 1; text < texts; ++text)
    if (offsets[text + 1] - offsets[starts.back()] > most_rows) starts.push_back(text);
  starts.push_back(texts);
  return starts;
}

template <typename T>
void score_all(const Tensor& tokens, const Tensor& panels, const Shape& n, const Tables<T>& to,
               bool fast, bool onednn) {
  if (n.texts == 0 || n.videos == 0) return;
  const int64_t in_group = n.frames * kLanes;
  const int64_t group_step = std::clamp<int64_t>(n.groups, 1, kGroups);
  const int64_t across = (n.groups + group_step - 1) / group_step;
  const int64_t most_rows = kScratchBytes / (group_step * in_group * int64_t(sizeof(T)));
  const std::vector<int64_t> starts = tile_starts(to.offsets, n.texts, most_rows);
  int64_t tallest = 0;
  for (size_t i = 0; i + 1 < starts.size(); ++i)
    tallest = std::max(tallest, to.offsets[starts[i + 1]] - to.offsets[starts[i]]);
  const int64_t tiles = (int64_t(starts.size()) - 1) * across;
  // backends/matmul.py explains when oneDNN is used.
  const auto linear = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const Tensor left = fast ? tokens.to(at::kBFloat16) : tokens;
  const Tensor right = fast ? panels.to(at::kBFloat16) : panels;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool use_scratch = !fast && !onednn;  // the other products allocate their result
    const int64_t scratch_size = use_scratch ? tallest * group_step * in_group : 0;
    const Tensor scratch = at::empty({scratch_size}, tokens.options());
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t text = starts[tile / across], last = starts[tile / across + 1];
      const int64_t group = tile % across * group_step;
      const int64_t num_groups = std::min(group_step, n.groups - group);
      const int64_t row = to.offsets[text], height = to.offsets[last] - row;
      const int64_t step = num_groups * in_group;
      const Tensor x = left.narrow(0, row, height), y = right.narrow(0, group * in_group, step);
      Tensor out;
      if (fast) {
        out = at::mm(x, y.t()).to(tokens.scalar_type());
      } else if (onednn) {
        const c10::List<std::optional<at::Scalar>> nothing;
        out = linear->typed<Linear>().call(x, y, std::nullopt, "none", nothing, "");
      } else {
        out = scratch.narrow(0, 0, height * step).view({height, step});
        at::mm_out(out, x, y.t());
      }
      const T* result = out.const_data_ptr<T>();
      for (int64_t a = text; a < last; ++a)
        for (int64_t g = 0; g < num_groups; ++g)
          score_group(result + (to.offsets[a] - row) * step + g * in_group, step, a, group + g, n,
                      to);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& tokens_in, const Tensor& weights_in, const Tensor& offsets, const Tensor& padded,
    const Tensor& frames, const std::optional<Tensor>& frame_weights_in,
    const std::optional<Tensor>& strength_in, const std::optional<Tensor>& neighbour_in,
    bool save, bool fast, bool onednn) {
  const Tensor tokens = tokens_in.contiguous(), weights = weights_in.contiguous();
  Shape n{padded.size(0), tokens.size(0), frames.size(0), frames.size(1), tokens.size(1), 0};
  n.groups = (n.videos + kLanes - 1) / kLanes;
  const Tensor panels = in_lanes(frames, n).view({n.groups * n.frames * kLanes, n.width});
  Tensor frame_weights, strength, neighbour;
  if (frame_weights_in) frame_weights = in_lanes(*frame_weights_in, n);
  if (strength_in) strength = in_lanes(*strength_in, n);
  if (neighbour_in) neighbour = in_lanes(*neighbour_in, n);
  const Tensor scores = at::empty({n.texts, n.videos}, tokens.options());
  const auto bytes = tokens.options().dtype(at::kByte);
  const bool save_tokens = save && frame_weights_in;
  const Tensor best_frame = at::empty({save ? n.tokens : 0, n.videos}, bytes);
  const Tensor best_token = at::empty({save_tokens ? n.texts : 0, n.frames, n.videos}, bytes);
  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "similarity_forward", [&] {
    const auto values = [](const Tensor& table) -> const scalar_t* {
      return table.defined() ? table.const_data_ptr<scalar_t>() : nullptr;
    };
    score_all<scalar_t>(tokens, panels, n,
                        {offsets.const_data_ptr<int64_t>(), padded.const_data_ptr<bool>(),
                         values(weights), values(frame_weights), values(strength),
                         neighbour.defined() ? neighbour.const_data_ptr<int64_t>() : nullptr,
                         scores.data_ptr<scalar_t>(),
                         save ? best_frame.data_ptr<uint8_t>() : nullptr,
                         save_tokens ? best_token.data_ptr<uint8_t>() : nullptr},
                        fast, onednn);
  });
  return {scores, best_frame, best_token};
}

}  // namespace
}  // namespace tvr

TORCH_LIBRARY(tvr_kernels, library) {
  library.def(
      "similarity_forward(Tensor tokens, Tensor weights, Tensor offsets, Tensor padded,"
      " Tensor frames, Tensor? frame_weights, Tensor? strength, Tensor? neighbour,"
      " bool save, bool fast, bool onednn) -> (Tensor, Tensor, Tensor)");
  library.def(
      "similarity_backward(Tensor gradient, Tensor tokens, Tensor weights, Tensor offsets,"
      " Tensor frames, Tensor? frame_weights, Tensor? boosted, Tensor best_frame,"
      " Tensor best_token) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tvr_kernels, CPU, library) {
  library.impl("similarity_forward", &tvr::forward);
}
