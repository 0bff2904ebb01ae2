#include "arrays.h"

#include <dlfcn.h>

#include <cstdlib>
#include <future>
#include <thread>

int64_t elements(const Shape &shape) {
  int64_t count = 1;
  for (int64_t side : shape) count *= side;
  return count;
}

size_t item_size(int dtype) {
  switch (dtype) {
    case I8: case U8: case BOOL: return 1;
    case F16: case BF16: case I16: case U16: return 2;
    case F32: case I32: case U32: return 4;
    case F64: case I64: case U64: return 8;
    default: return 0;
  }
}

bool is_float(int dtype) { return dtype == F32 || dtype == F16 || dtype == BF16 || dtype == F64; }

bool is_whole(int dtype) { return item_size(dtype) && !is_float(dtype); }

Shape packed_strides(const Shape &shape) {
  Shape strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  return strides;
}

bool contiguous(const aclTensor *tensor) {
  int64_t step = 1;
  for (size_t i = tensor->shape.size(); i-- > 0; step *= tensor->shape[i])
    if (tensor->shape[i] != 1 && tensor->strides[i] != step) return false;
  return true;
}

int64_t axis_of(int64_t axis, size_t rank, const char *name) {
  int64_t size = std::max<int64_t>(rank, 1);
  require(axis >= -size && axis < size, "%s %ld of a tensor with %zu dimensions", name, axis, rank);
  return axis < 0 ? axis + size : axis;
}

Shape broadcast(const Shape &a, const Shape &b) {
  const Shape &longer = a.size() >= b.size() ? a : b, &shorter = a.size() >= b.size() ? b : a;
  Shape shape = longer;
  for (size_t i = 0, skip = longer.size() - shorter.size(); i < shorter.size(); ++i) {
    int64_t &side = shape[skip + i], other = shorter[i];
    require(side == other || side == 1 || other == 1, "shapes %s and %s do not broadcast", text(a).c_str(),
            text(b).c_str());
    if (side == 1) side = other;
  }
  return shape;
}

namespace {

// Strides of a tensor that is broadcast to a shape: 0 where it is repeated.
Shape steps_in(const aclTensor *tensor, const Shape &shape) {
  size_t rank = shape.size(), own = tensor->shape.size();
  require(own <= rank, "shape %s does not broadcast to %s", text(tensor->shape).c_str(), text(shape).c_str());
  Shape steps(rank, 0);
  for (size_t i = 0; i < own; ++i) {
    size_t at = rank - own + i;
    require(tensor->shape[i] == shape[at] || tensor->shape[i] == 1, "shape %s does not broadcast to %s",
            text(tensor->shape).c_str(), text(shape).c_str());
    if (tensor->shape[i] != 1) steps[at] = tensor->strides[i];
  }
  return steps;
}

// Places of everything in the first `rank` dimensions of a shape.
std::vector<int64_t> places(int64_t start, const Shape &steps, const Shape &shape, size_t rank) {
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= shape[i];
  std::vector<int64_t> result(count);
  Shape index(rank, 0);
  int64_t at = start;
  for (int64_t &place : result) {
    place = at;
    for (size_t i = rank; i-- > 0;) {
      at += steps[i];
      if (++index[i] < shape[i]) break;
      at -= steps[i] * shape[i];
      index[i] = 0;
    }
  }
  return result;
}

// A shape as rows: where each starts, and the step within it. Most tensors are many rows with the step 1 or 0.
struct Rows {
  std::vector<int64_t> starts;
  int64_t width, step;
  Rows(const aclTensor *tensor, const Shape &shape) {
    Shape steps = steps_in(tensor, shape);
    size_t rank = shape.size(), outer = rank ? rank - 1 : 0;
    width = rank ? shape[outer] : 1;
    step = rank ? steps[outer] : 0;
    starts = places(tensor->offset, steps, shape, outer);
  }
};

}  // namespace

std::vector<int64_t> offsets(const aclTensor *tensor, const Shape &shape) {
  return places(tensor->offset, steps_in(tensor, shape), shape, shape.size());
}

float half_to_float(uint16_t half) {
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return static_cast<float>(value);
}

uint16_t float_to_half(float value) {
  _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

float bfloat_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

namespace {

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };
struct Truth { uint8_t bits; };

template <class T, class S> T widen(S item) { return static_cast<T>(item); }
template <class T> T widen(Half item) { return static_cast<T>(half_to_float(item.bits)); }
template <class T> T widen(Bfloat item) { return static_cast<T>(bfloat_to_float(item.bits)); }
template <class T> T widen(Truth item) { return static_cast<T>(item.bits != 0); }

template <class S, class T> struct Narrow { static S of(T value) { return static_cast<S>(value); } };
template <class T> struct Narrow<Half, T> { static Half of(T value) { return {float_to_half(static_cast<float>(value))}; } };
template <class T> struct Narrow<Bfloat, T> { static Bfloat of(T value) { return {float_to_bfloat(static_cast<float>(value))}; } };
template <class T> struct Narrow<Truth, T> { static Truth of(T value) { return {static_cast<uint8_t>(value != 0)}; } };

// Call use(item) with an item of the type that the dtype names.
template <class F>
void with_item(int dtype, F use) {
  switch (dtype) {
    case F32: return use(float());
    case F16: return use(Half());
    case BF16: return use(Bfloat());
    case F64: return use(double());
    case I8: return use(int8_t());
    case U8: return use(uint8_t());
    case I16: return use(int16_t());
    case U16: return use(uint16_t());
    case I32: return use(int32_t());
    case U32: return use(uint32_t());
    case I64: return use(int64_t());
    case U64: return use(uint64_t());
    case BOOL: return use(Truth());
    default: throw Refusal{text("dtype %d is not known to this host", dtype)};
  }
}

}  // namespace

template <class T>
std::vector<T> read(const aclTensor *tensor, const Shape &shape) {
  std::vector<T> values(elements(shape));
  with_item(tensor->dtype, [&](auto item) {
    using S = decltype(item);
    const S *items = reinterpret_cast<const S *>(tensor->data);
    if (shape == tensor->shape && contiguous(tensor)) {
      items += tensor->offset;
      for (size_t i = 0; i < values.size(); ++i) values[i] = widen<T>(items[i]);
    } else {
      Rows rows(tensor, shape);
      T *to = values.data();
      for (int64_t start : rows.starts)
        for (int64_t i = 0; i < rows.width; ++i) *to++ = widen<T>(items[start + i * rows.step]);
    }
  });
  return values;
}

template <class T>
std::vector<T> read(const aclTensor *tensor) { return read<T>(tensor, tensor->shape); }

template <class T>
void write(aclTensor *tensor, const std::vector<T> &values) {
  with_item(tensor->dtype, [&](auto item) {
    using S = decltype(item);
    S *items = reinterpret_cast<S *>(tensor->data);
    if (contiguous(tensor)) {
      items += tensor->offset;
      for (size_t i = 0; i < values.size(); ++i) items[i] = Narrow<S, T>::of(values[i]);
    } else {
      Rows rows(tensor, tensor->shape);
      const T *from = values.data();
      for (int64_t start : rows.starts)
        for (int64_t i = 0; i < rows.width; ++i) items[start + i * rows.step] = Narrow<S, T>::of(*from++);
    }
  });
}

template <class T>
T value(const aclScalar *scalar) {
  if (!scalar) return T(1);
  T result = T();
  with_item(scalar->dtype, [&](auto item) {
    std::memcpy(&item, scalar->bytes, sizeof item);
    result = widen<T>(item);
  });
  return result;
}

#define FOR(T)                                                        \
  template std::vector<T> read<T>(const aclTensor *, const Shape &);  \
  template std::vector<T> read<T>(const aclTensor *);                 \
  template void write<T>(aclTensor *, const std::vector<T> &);        \
  template T value<T>(const aclScalar *);
FOR(float)
FOR(double)
FOR(int64_t)
#undef FOR

namespace {
template <class Item>
void copy_rows(const aclTensor *from, aclTensor *to) {
  Rows source(from, to->shape), target(to, to->shape);
  for (size_t row = 0; row < target.starts.size(); ++row) {
    Item *put = reinterpret_cast<Item *>(to->data) + target.starts[row];
    const Item *get = reinterpret_cast<const Item *>(from->data) + source.starts[row];
    for (int64_t i = 0; i < target.width; ++i) put[i * target.step] = get[i * source.step];
  }
}
}  // namespace

void copy_items(const aclTensor *from, aclTensor *to) {
  size_t size = item_size(to->dtype);
  if (from->shape == to->shape && contiguous(from) && contiguous(to)) {
    std::memmove(to->data + to->offset * size, from->data + from->offset * size, elements(to) * size);
    return;
  }
  switch (size) {
    case 1: return copy_rows<uint8_t>(from, to);
    case 2: return copy_rows<uint16_t>(from, to);
    case 4: return copy_rows<uint32_t>(from, to);
    case 8: return copy_rows<uint64_t>(from, to);
    default: throw Refusal{text("dtype %d is not known to this host", to->dtype)};
  }
}

aclTensor view(const aclTensor *tensor, const Shape &shape, const Shape &strides, int64_t offset) {
  aclTensor seen = *tensor;
  seen.shape = shape;
  seen.strides = strides;
  seen.offset = offset;
  return seen;
}

namespace {
thread_local bool inside = false;  // a piece: it has no cores left to divide
struct Inside {
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};
}  // namespace

void in_parallel(int64_t rows, int64_t cost_of_row, const std::function<void(int64_t, int64_t)> &body) {
  // MINDSIGMA_THREADS bounds it, as for the kernels of the CPU.
  static const int64_t cores = [] {
    const char *named = std::getenv("MINDSIGMA_THREADS");
    int64_t asked = named ? std::atoll(named) : 0;
    return asked > 0 ? asked : std::max<int64_t>(1, std::thread::hardware_concurrency());
  }();
  int64_t pieces = std::min(rows, cores);
  if (inside || pieces < 2 || rows * cost_of_row < 1 << 16) return body(0, rows);
  std::vector<std::future<void>> others;  // which hand on what they throw
  for (int64_t i = 1; i < pieces; ++i)
    others.push_back(std::async(std::launch::async, [=, &body] {
      Inside piece;
      body(rows * i / pieces, rows * (i + 1) / pieces);
    }));
  Inside piece;
  body(0, rows / pieces);
  for (std::future<void> &other : others) other.get();
}

namespace {
using Sgemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t, float,
                      float *, int64_t);
Sgemm find_sgemm() {
  void *library = dlopen(MINDSPORE_DNNL, RTLD_NOW | RTLD_LOCAL);
  void *found = library ? dlsym(library, "dnnl_sgemm") : nullptr;
  if (!found) throw Refusal{text("no dnnl_sgemm in %s", MINDSPORE_DNNL)};
  return reinterpret_cast<Sgemm>(found);
}
}  // namespace

void multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
              const float *b, float beta, float *c) {
  static const Sgemm sgemm = find_sgemm();
  if (!m || !n) return;
  if (!k) {
    for (int64_t i = 0; i < m * n; ++i) c[i] *= beta;
    return;
  }
  in_parallel(m, n * k, [=](int64_t begin, int64_t end) {
    sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', end - begin, n, k, alpha,
          a + (transpose_a ? begin : begin * k), transpose_a ? m : k, b, transpose_b ? k : n, beta, c + begin * n, n);
  });
}
