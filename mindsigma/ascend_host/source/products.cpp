// Products of matrices and vectors: accumulated in float32, whatever the operands, and rounded once.
#include "cube.h"

namespace {

constexpr std::initializer_list<int> DTYPES = {F32, F16, BF16};

// Shape of a @ b as NumPy has it, vectors included.
Shape product_shape(const aclTensor *a, const aclTensor *b) {
  Shape left = a->shape, right = b->shape;
  bool row = left.size() == 1, column = right.size() == 1;
  if (row) left.insert(left.begin(), 1);
  if (column) right.push_back(1);
  int64_t k = left.back(), other = right[right.size() - 2];
  require(k == other, "the products' common side is %ld in self %s and %ld in mat2 %s", k, text(a->shape).c_str(), other,
          text(b->shape).c_str());
  Shape shape = broadcast(Shape(left.begin(), left.end() - 2), Shape(right.begin(), right.end() - 2));
  if (!row) shape.push_back(left[left.size() - 2]);
  if (!column) shape.push_back(right.back());
  return shape;
}

// The operand with at least two dimensions.
aclTensor widened(const aclTensor *tensor, bool as_row) {
  if (tensor->shape.size() > 1) return *tensor;
  int64_t length = tensor->shape[0], step = tensor->strides[0];
  return as_row ? view(tensor, {1, length}, {length * step, step}, tensor->offset)
                : view(tensor, {length, 1}, {step, 1}, tensor->offset);
}

// a @ b in float32, packed in the product's order.
std::vector<float> product(const aclTensor *left, const aclTensor *right, int8_t math, float alpha = 1.0f) {
  aclTensor a = widened(left, true), b = widened(right, false);
  int dtype = cube_dtype(&a, &b);
  size_t rank = a.shape.size();
  int64_t m = a.shape[rank - 2], k = a.shape.back(), n = b.shape.back();
  Shape batch_a(a.shape.begin(), a.shape.end() - 2), batch_b(b.shape.begin(), b.shape.end() - 2);
  Shape batch = broadcast(batch_a, batch_b);
  int64_t count = elements(batch);
  Matrices x = matrices(&a, dtype, math), y = matrices(&b, dtype, math);
  std::vector<float> result(count * m * n);
  if (elements(batch_b) == 1 && !x.transposed && elements(batch_a) == count) {  // one product with more rows
    multiply(false, y.transposed, count * m, n, k, alpha, x.values.data(), y.values.data(), 0.0f, result.data());
    return result;
  }
  // Which of its matrices each operand gives: offsets in a tensor of batches.
  auto picks = [&](const Shape &own) {
    aclTensor numbers{F32, 0, own, packed_strides(own), 0, own, nullptr};
    return offsets(&numbers, batch);
  };
  std::vector<int64_t> from_a = picks(batch_a), from_b = picks(batch_b);
  in_parallel(count, m * n * k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      multiply(x.transposed, y.transposed, m, n, k, alpha, &x.values[from_a[i] * m * k], &y.values[from_b[i] * k * n],
               0.0f, &result[i * m * n]);
  });
  return result;
}

void require_operands(const aclTensor *a, const aclTensor *b, const aclTensor *out, int8_t math) {
  require_dtype(a, "self", DTYPES);
  require_dtype(b, "mat2", DTYPES);
  require_dtype(out, "out", DTYPES);
  require_cube_math(math);
  cube_dtype(a, b);
}

Run plain_product(const aclTensor *a, const aclTensor *b, aclTensor *out, int8_t math) {
  require_operands(a, b, out, math);
  require_shape(out, "out", product_shape(a, b));
  return [=] { write(out, product(a, b, math)); };
}

// out = beta * self + alpha * (a @ b), summed over the batch if asked for.
Run added_product(const aclTensor *self, const aclTensor *a, const aclTensor *b, const aclScalar *beta,
                  const aclScalar *alpha, aclTensor *out, int8_t math, bool summed = false) {
  require_dtype(self, "self", DTYPES);
  require_operands(a, b, out, math);
  require(beta && alpha, "beta and alpha are missing");
  Shape shape = product_shape(a, b);
  if (summed) shape.erase(shape.begin());
  require_shape(out, "out", shape);
  require(broadcast(self->shape, shape) == shape, "self %s does not broadcast to %s", text(self->shape).c_str(),
          text(shape).c_str());
  float by = value<float>(beta), scale = value<float>(alpha);
  return [=] {
    std::vector<float> result = product(a, b, math, scale);
    if (summed) {
      size_t size = elements(out);
      for (size_t i = size; i < result.size(); ++i) result[i % size] += result[i];
      result.resize(size);
    }
    if (by != 0.0f) {  // what is not a number does not spread from a self that does not count
      std::vector<float> base = read<float>(self, out->shape);
      for (size_t i = 0; i < result.size(); ++i) result[i] += by * base[i];
    }
    write(out, result);
  };
}

}  // namespace

KERNEL(aclnnMm, const aclTensor *self, const aclTensor *mat2, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 2, 2);
    require_rank(mat2, "mat2", 2, 2);
    return plain_product(self, mat2, out, math);
  };
}

KERNEL(aclnnMatmul, const aclTensor *self, const aclTensor *mat2, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 1, 6);
    require_rank(mat2, "mat2", 1, 6);
    return plain_product(self, mat2, out, math);
  };
}

KERNEL(aclnnBatchMatMul, const aclTensor *self, const aclTensor *mat2, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 3, 3);
    require_rank(mat2, "mat2", 3, 3);
    return plain_product(self, mat2, out, math);
  };
}

KERNEL(aclnnMv, const aclTensor *self, const aclTensor *vec, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 2, 2);
    require_rank(vec, "vec", 1, 1);
    return plain_product(self, vec, out, math);
  };
}

KERNEL(aclnnDot, const aclTensor *self, const aclTensor *tensor, aclTensor *out) {
  PLAN {
    require_rank(self, "self", 1, 1);
    require_rank(tensor, "tensor", 1, 1);
    return plain_product(self, tensor, out, KEEP_DTYPE);
  };
}

KERNEL(aclnnAddmm, const aclTensor *self, const aclTensor *mat1, const aclTensor *mat2, const aclScalar *beta,
       const aclScalar *alpha, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 0, 2);
    require_rank(mat1, "mat1", 2, 2);
    require_rank(mat2, "mat2", 2, 2);
    return added_product(self, mat1, mat2, beta, alpha, out, math);
  };
}

KERNEL(aclnnInplaceAddmm, aclTensor *self, const aclTensor *mat1, const aclTensor *mat2, const aclScalar *beta,
       const aclScalar *alpha, int8_t math) {
  PLAN {
    require_rank(mat1, "mat1", 2, 2);
    require_rank(mat2, "mat2", 2, 2);
    return added_product(self, mat1, mat2, beta, alpha, self, math);
  };
}

KERNEL(aclnnBaddbmm, const aclTensor *self, const aclTensor *batch1, const aclTensor *batch2, const aclScalar *beta,
       const aclScalar *alpha, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(self, "self", 1, 3);
    require_rank(batch1, "batch1", 3, 3);
    require_rank(batch2, "batch2", 3, 3);
    require_same_dtype(self, out, "self and out");
    return added_product(self, batch1, batch2, beta, alpha, out, math);
  };
}

KERNEL(aclnnAddbmm, const aclTensor *self, const aclTensor *batch1, const aclTensor *batch2, const aclScalar *beta,
       const aclScalar *alpha, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(batch1, "batch1", 3, 3);
    require_rank(batch2, "batch2", 3, 3);
    return added_product(self, batch1, batch2, beta, alpha, out, math, true);
  };
}

// Its alpha stands before its beta.
KERNEL(aclnnAddmv, const aclTensor *self, const aclTensor *mat, const aclTensor *vec, const aclScalar *alpha,
       const aclScalar *beta, aclTensor *out, int8_t math) {
  PLAN {
    require_rank(mat, "mat", 2, 2);
    require_rank(vec, "vec", 1, 1);
    return added_product(self, mat, vec, beta, alpha, out, math);
  };
}
