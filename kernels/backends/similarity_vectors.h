// Vectors of 16 numbers, which the compiler maps to the machine's vectors, and shared constants.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

namespace tvr {

constexpr int64_t kLanes = 16;  // videos per vector in the forward, features in the backward

// In best_token: a padded slot (similarity 0) scored higher than every token.
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
