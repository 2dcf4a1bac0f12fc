// Vectors of 16 numbers, as the compiler maps them to the machine's, and what both passes share.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace tvr {

constexpr int64_t kLanes = 16;  // videos side by side, and the unit of width

// In best_token: the frame met no token, a padded slot (similarity 0) was better than all of them.
constexpr uint8_t kPadding = 255;

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

}  // namespace tvr
